"""Experts that start from a dense block compute what it does; each start is compared with its literal formula."""

import pytest

from tests.support.dense_blocks import arrange, dense, dense_weights, hidden_states, relative_error, run, upcycled_block

EXACT = {
    "hybrid": {},
    "joint": {"expert_groups": "joint"},
    "isolated": {"expert_groups": "isolated"},
    "joint-split": {"expert_groups": "joint", "start": "split"},
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_starts_compute_the_dense_block(name):
    start, config = arrange(**EXACT[name])
    weights, states = dense_weights(), hidden_states()
    block = upcycled_block(config, weights, start)
    assert relative_error(run(block, config, states), dense(states, weights)) < 1e-6
