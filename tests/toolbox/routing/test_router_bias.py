"""Auxiliary-loss-free load balancing: the update of the paper, per modality, and equal in all processes."""

import pytest
import torch

from modeling_sparse_moe_vlm.routing import router_biases
from modeling_sparse_moe_vlm.toolbox.routing import RoutingCounts, measure_routing
from modeling_sparse_moe_vlm.toolbox.routing.router_bias import bias_direction, update_router_bias
from tests.support.models import make_inputs, make_model
from tests.support.oracles import MANY_GROUPS
from tests.support.processes import run_in_processes


def counts_of(wanted: list) -> RoutingCounts:
    wanted = torch.tensor(wanted)
    return RoutingCounts(
        torch.zeros(2, dtype=torch.long), wanted, torch.zeros_like(wanted), torch.zeros(len(wanted), 2, 1)
    )


def literal_update(bias: list[list[float]], chosen, serving, rate: float) -> list[list[float]]:
    """Returns the update of algorithm 1 in arXiv 2408.15664, one modality after the other."""
    updated = []
    for own_bias, load, serves in zip(bias, chosen, serving, strict=True):
        mean = sum(c for c, s in zip(load, serves, strict=True) if s) / sum(serves)
        error = [mean - c if s else 0.0 for c, s in zip(load, serves, strict=True)]
        updated.append([b + rate * ((e > 0) - (e < 0)) for b, e in zip(own_bias, error, strict=True)])
    return updated


def test_direction_equals_that_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        chosen = torch.randint(0, 6, (2, 5), generator=generator)
        serving = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
        chosen *= serving
        expected = literal_update([[0.0] * 5] * 2, chosen.tolist(), serving.tolist(), 1.0)
        assert bias_direction(chosen, serving).tolist() == expected


@pytest.mark.parametrize("rate", [None, 0.5])
def test_biases_of_each_modality_are_updated_separately(rate):
    """Expert 0 has too much text and no images. The totals of 4 tokens per expert would look balanced."""
    model = make_model(expert_groups="joint", num_hidden_layers=1, router_bias_update_rate=1e-3)
    (bias,) = router_biases(model)
    for _ in range(3):
        update_router_bias(model, counts_of([[[4, 2, 1, 1], [0, 2, 3, 3]]]), rate)
    step = 3 * (rate or 1e-3)
    expected = torch.tensor([[-step, 0, step, step], [step, 0, -step, -step]])
    torch.testing.assert_close(bias, expected)
    update_router_bias(model, counts_of([[[2, 2, 2, 2], [0, 0, 0, 0]]]), rate)
    torch.testing.assert_close(bias, expected, msg="balanced or absent: nothing changes")


def test_a_rate_of_zero_updates_nothing():
    model = make_model(router_bias_update_rate=0.0)
    update_router_bias(model, measure_routing(model, [make_inputs()]))
    assert all((bias == 0).all() for bias in router_biases(model))


def test_biases_of_experts_that_do_not_serve_do_not_change():
    model = make_model(expert_groups=MANY_GROUPS, num_experts=None, router_bias_update_rate=1e-3)
    update_router_bias(model, measure_routing(model, [make_inputs()]))
    for bias in router_biases(model):
        assert (bias[0, 5:] == 0).all()
        assert (bias[1, :2] == 0).all()
        assert (bias[0, :5] != 0).any()
        assert (bias[1, 2:] != 0).any()


def test_layers_that_share_experts_are_balanced_by_their_sum():
    model = make_model(
        expert_groups="joint", num_hidden_layers=3, expert_pool=[0, None, 0], router_bias_update_rate=1.0
    )
    update_router_bias(
        model,
        counts_of([[[4, 0, 0, 0], [0] * 4], [[0, 0, 0, 8], [0] * 4], [[0, 2, 2, 0], [0] * 4]]),
    )
    text = [bias[0].tolist() for bias in router_biases(model)]
    assert text == [[-1, 0, 0, 1], [1, 1, 1, -1], [-1, 0, 0, 1]]


def test_model_without_bias():
    model = make_model()
    with pytest.raises(ValueError, match=r"no bias: set `router_bias_update_rate`"):
        update_router_bias(model, measure_routing(model, [make_inputs()]))


DISTRIBUTED = """
import os
import torch
import torch.distributed as dist
from modeling_sparse_moe_vlm.routing import router_biases
from modeling_sparse_moe_vlm.toolbox.routing import update_router_bias
from modeling_sparse_moe_vlm.toolbox.routing import measure_routing
from tests.support.models import make_inputs, make_model

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
model = make_model(expert_groups="joint", router_bias_update_rate=1e-3)
batches = [make_inputs(batch_size=3), make_inputs(seed=1, batch_size=2, images_per_row=0)]  # one without images
update_router_bias(model, measure_routing(model, batches))
expected = [bias.clone() for bias in router_biases(model)]
alone = make_model(expert_groups="joint", router_bias_update_rate=1e-3)
update_router_bias(alone, measure_routing(alone, batches[rank:rank + 1]))

dist.init_process_group("gloo")
shared = make_model(expert_groups="joint", router_bias_update_rate=1e-3)
counts = measure_routing(shared, batches[rank:rank + 1])
before = counts.wanted.clone()
update_router_bias(shared, counts)
assert torch.equal(counts.wanted, before)
for bias, whole in zip(router_biases(shared), expected, strict=True):
    assert torch.equal(bias, whole)
differs = any(not torch.equal(bias, whole) for bias, whole in zip(router_biases(alone), expected, strict=True))
assert differs, "one process alone would move elsewhere"
dist.destroy_process_group()
"""


@pytest.mark.extensive
def test_all_processes_make_the_same_update(tmp_path):
    result = run_in_processes(DISTRIBUTED, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
