"""Experts that start from a dense block have the same outputs. Each start is compared with its literal formula."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from modeling_sparse_moe_vlm.toolbox.upcycling.arrangement import Start
from modeling_sparse_moe_vlm.toolbox.upcycling.router_rows import BlockInputs
from modeling_sparse_moe_vlm.toolbox.upcycling.starts import GatedWeights, empty_block, seeded_generator, start_block
from tests.support.dense_blocks import (
    HIDDEN_SIZE,
    MODALITY_IDS,
    TEXT,
    WIDTH,
    arrange,
    dense,
    dense_weights,
    hidden_states,
    relative_error,
    run,
    upcycled_block,
    upcycled_pool,
)

pytestmark = pytest.mark.newest

# Routed experts of both kinds with one router.
OVERLAPPING = [
    {"name": "text", "num_experts": 2, "modalities": ["text"]},
    {"name": "joint", "num_experts": 4},
    {"name": "image", "num_experts": 2, "modalities": ["image"]},
]
SHARED = [{"name": "joint", "num_experts": 4}, {"name": "everyone", "num_experts": 2, "always_on": True}]
EXACT = {
    "hybrid": {},
    "hybrid-fine": {"granularity": 4, "num_experts": 12, "num_experts_per_tok": 3},
    "hybrid-wide": {"moe_intermediate_size": 40},
    "hybrid-unnormalised": {"norm_topk_prob": False},
    "hybrid-capacity": {"expert_capacity_factor": 0.5},
    "hybrid-top_p": {"router": "top_p"},
    "hybrid-copy": {"start": "copy"},
    "hybrid-split": {"start": "split", "num_experts": 12, "num_experts_per_tok": 4, "granularity": 2},
    "joint": {"expert_groups": "joint", "num_experts_per_tok": 3},
    "joint-1": {"expert_groups": "joint", "num_experts_per_tok": 1},
    "joint-sigmoid": {"expert_groups": "joint", "router": "sigmoid"},
    "joint-top_p": {"expert_groups": "joint", "router": "top_p", "num_experts_per_tok": 4},
    "joint-bias": {"expert_groups": "joint", "router_bias_update_rate": 1e-3},
    "joint-by_modality": {"expert_groups": "joint", "num_experts_per_tok_by_modality": {"image": 1}},
    "joint-split": {"expert_groups": "joint", "start": "split"},
    "joint-split-8": {"expert_groups": "joint", "start": "split", "granularity": 8, "num_experts_per_tok": 8},
    "joint-split-sigmoid": {"expert_groups": "joint", "start": "split", "router": "sigmoid"},
    "joint-split-bias": {"expert_groups": "joint", "start": "split", "router_bias_update_rate": 1e-3},
    "joint-split-by_modality": {
        "expert_groups": "joint",
        "granularity": 2,
        "num_experts_per_tok_by_modality": {"image": 6},
    },
    "joint-drop-0": {"expert_groups": "joint", "start": "drop", "drop_ratio": 0},
    "isolated": {"expert_groups": "isolated"},
    "isolated-split": {"expert_groups": "isolated", "start": "split"},
    "overlapping": {"expert_groups": OVERLAPPING, "num_experts_per_tok": 3},
    "overlapping-split": {"expert_groups": OVERLAPPING, "start": "split", "num_experts_per_tok": 4, "granularity": 2},
    "shared": {"expert_groups": SHARED},
    "shared-copy": {"expert_groups": SHARED, "start": "copy"},
    # Two always-on experts of half the width form the dense block together.
    "shared-halves": {"expert_groups": [SHARED[0], SHARED[1] | {"intermediate_size": WIDTH // 2}]},
    "shared-and-own": {
        "expert_groups": [
            SHARED[0],
            {"name": "vision", "num_experts": 1, "modalities": ["image"], "always_on": True, "intermediate_size": 8},
            SHARED[1],
        ]
    },
}
needs_every_kind = pytest.mark.parametrize("name", EXACT)


def stacks(block) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weights of the experts of a block with one routed group, `(E, 2 I, D)` and `(E, D, I)`."""
    return block.experts.gate_up_proj.data, block.experts.down_proj.data


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("ids", [MODALITY_IDS, torch.ones_like(MODALITY_IDS), None], ids=["mixed", "images", "text"])
@needs_every_kind
def test_exact_starts_compute_the_dense_block(name, ids):
    start, config = arrange(**EXACT[name])
    weights, states = dense_weights(), hidden_states()
    block = upcycled_block(config, weights, start)
    assert start.is_exact
    assert relative_error(run(block, config, states, ids), dense(states, weights)) < 1e-6


@needs_every_kind
def test_exact_starts_from_data_compute_the_dense_block(name):
    start, config = arrange(**EXACT[name])
    weights, states = dense_weights(), hidden_states()
    inputs = BlockInputs(states.reshape(-1, HIDDEN_SIZE), MODALITY_IDS.flatten())
    block = upcycled_block(config, weights, start, inputs=inputs)
    assert relative_error(run(block, config, states), dense(states, weights)) < 1e-6


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "relu2"])
@pytest.mark.parametrize("name", ["hybrid", "joint", "joint-split-8"])
def test_starts_are_exact_for_any_activation(name, activation):
    from transformers.activations import ACT2FN

    start, config = arrange(**EXACT[name], hidden_act=activation)
    weights, states = dense_weights(), hidden_states()
    expected = dense(states, weights, ACT2FN[activation])
    assert relative_error(run(upcycled_block(config, weights, start), config, states), expected) < 1e-6
    assert relative_error(expected, dense(states, weights)) > 1e-2


@pytest.mark.parametrize("name", ["hybrid", "joint", "joint-split", "overlapping", "overlapping-split", "isolated"])
def test_shards_start_like_the_whole_stack(name):
    start, config = arrange(**EXACT[name])
    weights, states = dense_weights(), hidden_states()
    whole = [*upcycled_block(config, weights, start).experts.parameters()]
    config.num_expert_shards = 3  # does not divide the number of experts of any group
    sharded = upcycled_block(config, weights, start)
    assert relative_error(run(sharded, config, states), dense(states, weights)) < 1e-6
    experts = lambda parameters, kind: torch.cat([p for p in parameters if p.shape[1:] == kind])  # noqa: E731
    for kind in {parameter.shape[1:] for parameter in whole}:
        assert torch.equal(experts(sharded.experts.parameters(), kind), experts(whole, kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@needs_every_kind
def test_half_precision_rounds_no_more_than_the_dense_block(name, dtype):
    """
    Measured as the root mean square of the difference to the block in float64, which the dense block also has. A sum of
    experts rounds a few times more; one token that took the wrong parts would be off by hundreds of times that.
    """
    start, config = arrange(**EXACT[name])
    weights, states = dense_weights(dtype=dtype), hidden_states(dtype=dtype)
    expected = dense(states, weights)
    alone = F.linear(F.silu(F.linear(states, weights.gate)) * F.linear(states, weights.up), weights.down)
    rounding = (alone.double() - expected).square().mean().sqrt()
    difference = run(upcycled_block(config, weights, start), config, states).double() - expected
    assert difference.square().mean().sqrt() < 2 * rounding
    assert difference.abs().max() < 4 * (alone.double() - expected).abs().max()


def test_parts_of_a_block_are_chosen_together_if_copies_tie():
    """The router rows have few different values, so many tokens have equal scores for two copies of the dense block."""
    start, config = arrange(expert_groups="joint", start="split", num_experts=16)
    weights = dense_weights(dtype=torch.bfloat16)
    states = hidden_states(dtype=torch.bfloat16)
    block = upcycled_block(config, weights, start)
    block.gate.weight.data = torch.sign(block.gate.weight.data)
    states = torch.sign(states)
    assert relative_error(run(block, config, states), dense(states, weights)) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_is_bit_identical_if_the_network_is_the_same(dtype):
    start, config = arrange(expert_groups=[SHARED[0], {"name": "everyone", "num_experts": 1, "always_on": True}])
    weights, states = dense_weights(dtype=dtype), hidden_states(dtype=dtype)
    alone = F.linear(F.silu(F.linear(states, weights.gate)) * F.linear(states, weights.up), weights.down)
    assert torch.equal(run(upcycled_block(config, weights, start), config, states), alone)


def test_layers_of_different_widths_compute_their_blocks():
    widths = {0: 24, 2: 40, 3: 24}
    for request in ({}, {"expert_groups": "joint"}, {"expert_groups": "isolated", "start": "split"}):
        start, config = arrange(widths, num_hidden_layers=4, **request)
        assert config.sparse_layers == [0, 2, 3]
        states = hidden_states()
        for layer, width in widths.items():
            weights = dense_weights(width, seed=layer)
            block = upcycled_block(config, weights, start, layer)
            assert relative_error(run(block, config, states), dense(states, weights)) < 1e-6


# ---------------------------------------------------------------- copy and split, literally


def test_copies_equal_the_dense_block():
    start, config = arrange(expert_groups="joint", num_experts=3)
    weights = dense_weights()
    gate_up, down = stacks(upcycled_block(config, weights, start))
    assert gate_up.shape[0] == 3
    for expert in range(3):
        assert torch.equal(gate_up[expert], torch.cat([weights.gate, weights.up]))
        assert torch.equal(down[expert], weights.down)


@pytest.mark.parametrize(("granularity", "num_copies"), [(2, 3), (4, 2), (1, 2)])
def test_parts_equal_those_of_the_literal_formula(granularity, num_copies):
    start, config = arrange(
        expert_groups="joint",
        start="split",
        granularity=granularity,
        num_experts=granularity * num_copies,
        num_experts_per_tok=granularity,
    )
    weights = dense_weights()
    block = upcycled_block(config, weights, start)
    gate_up, down = stacks(block)
    size = WIDTH // granularity
    assert down.shape == (granularity * num_copies, HIDDEN_SIZE, size)
    for copy, part, neuron in itertools.product(range(num_copies), range(granularity), range(size)):
        expert, source = copy * granularity + part, part * size + neuron
        assert torch.equal(gate_up[expert, neuron], weights.gate[source])
        assert torch.allclose(gate_up[expert, size + neuron], math.sqrt(granularity) * weights.up[source], rtol=1e-6)
        assert torch.allclose(down[expert, :, neuron], math.sqrt(granularity) * weights.down[:, source], rtol=1e-6)
    rows = block.gate.weight.data.unflatten(0, (num_copies, granularity))
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert rows[:, 0].unique(dim=0).shape[0] == num_copies


def test_scaled_weights_are_rounded_once():
    start, config = arrange(expert_groups="joint", start="split")
    weights = dense_weights(dtype=torch.bfloat16)
    gate_up, down = stacks(upcycled_block(config, weights, start))
    half = WIDTH // 2
    assert gate_up.dtype == down.dtype == torch.bfloat16
    expected = (weights.up.float() * math.sqrt(2)).bfloat16()
    assert torch.equal(gate_up[1, half:], expected[half:])
    assert torch.equal(down[0], (weights.down.float() * math.sqrt(2)).bfloat16()[:, :half])


# ---------------------------------------------------------------- residual


def test_residual_experts_start_from_the_dense_block_and_output_zero():
    start, config = arrange(num_experts=3)
    weights = dense_weights()
    block = upcycled_block(config, weights, start)
    gate_up, down = stacks(block)
    assert torch.equal(gate_up, torch.cat([weights.gate, weights.up]).expand_as(gate_up))
    assert not down.any()
    for name in ("text", "image"):
        always_on = block.shared_experts[name]
        assert torch.equal(always_on.gate_proj.weight, weights.gate)
        assert torch.equal(always_on.up_proj.weight, weights.up)
        assert torch.equal(always_on.down_proj.weight, weights.down)


def sources(rows: torch.Tensor, of: torch.Tensor) -> list[int]:
    """Returns the index in a matrix of each row. Fails for a row that is not in it."""
    return [(of == row).all(dim=1).nonzero().item() for row in rows]


def test_finer_residual_experts_sample_neurons_of_the_dense_block():
    start, config = arrange(granularity=2, num_experts=4)
    weights = dense_weights()
    gate_up, down = stacks(upcycled_block(config, weights, start))
    drawn = []
    for expert in gate_up:
        neurons = sources(expert[: WIDTH // 2], weights.gate)
        assert neurons == sources(expert[WIDTH // 2 :], weights.up)
        assert len(set(neurons)) == WIDTH // 2
        drawn.append(frozenset(neurons))
    assert len(set(drawn)) == 4
    assert not down.any()


def assert_alike(values: torch.Tensor, like: torch.Tensor) -> None:
    """Checks the mean and standard deviation of normally distributed values, within four standard errors."""
    std, mean = torch.std_mean(like, correction=0)
    assert (values.mean() - mean).abs() < 4 * std / math.sqrt(values.numel())
    assert (values.std() / std - 1).abs() < 4 / math.sqrt(2 * values.numel())
    assert values.unique().numel() > 0.99 * values.numel()


def test_wider_residual_experts_have_new_neurons_after_those_of_the_dense_block():
    start, config = arrange(moe_intermediate_size=100, num_experts=2)
    weights = dense_weights()
    gate_up, down = stacks(upcycled_block(config, weights, start))
    gate, up = gate_up.unflatten(1, (2, 100)).unbind(1)
    assert torch.equal(gate[:, :WIDTH], weights.gate.expand(2, -1, -1))
    assert torch.equal(up[:, :WIDTH], weights.up.expand(2, -1, -1))
    assert_alike(gate[:, WIDTH:], weights.gate)
    assert_alike(up[:, WIDTH:], weights.up)
    assert not down.any()


def test_several_always_on_experts_contain_the_dense_block_once():
    start, config = arrange(expert_groups=[SHARED[0], SHARED[1] | {"num_experts": 3}])
    weights = dense_weights()
    shared = upcycled_block(config, weights, start).shared_experts["everyone"]
    assert shared.gate_proj.weight.shape == (3 * WIDTH, HIDDEN_SIZE)
    assert torch.equal(shared.gate_proj.weight[:WIDTH], weights.gate)
    assert torch.equal(shared.up_proj.weight[:WIDTH], weights.up)
    assert torch.equal(shared.down_proj.weight[:, :WIDTH], weights.down)
    assert_alike(shared.gate_proj.weight[WIDTH:].data, weights.gate)
    assert_alike(shared.up_proj.weight[WIDTH:].data, weights.up)
    assert not shared.down_proj.weight[:, WIDTH:].any()


@pytest.mark.parametrize("start_name", ["copy", "drop"])
def test_always_on_experts_next_to_copies_output_zero(start_name):
    start, config = arrange(start=start_name)
    weights = dense_weights()
    shared = upcycled_block(config, weights, start).shared_experts
    for name in ("text", "image"):
        assert not shared[name].down_proj.weight.any()
        assert_alike(shared[name].gate_proj.weight.data, weights.gate)
        assert_alike(shared[name].up_proj.weight.data, weights.up)
    assert not torch.equal(shared["text"].gate_proj.weight, shared["image"].gate_proj.weight)


def test_dense_block_is_contained_once_if_always_on_groups_overlap():
    start, config = arrange(**EXACT["shared-and-own"])
    shared = upcycled_block(config, dense_weights(), start).shared_experts
    assert not shared["vision"].down_proj.weight.any()
    assert shared["everyone"].down_proj.weight.any()


# ---------------------------------------------------------------- drop


def changed_neurons(expert: torch.Tensor, down: torch.Tensor, weights: GatedWeights) -> list[set[int]]:
    """Returns the neurons that differ from those of the dense block, in gate, up and down."""
    gate, up = expert.chunk(2)
    return [
        set(changed.nonzero().flatten().tolist())
        for changed in (
            (gate != weights.gate).any(dim=1),
            (up != weights.up).any(dim=1),
            (down != weights.down).any(dim=0),
        )
    ]


@pytest.mark.parametrize(("ratio", "number"), [(0.25, 6), (0.5, 12), (1.0, 24), (0.02, 0), (0.03, 1)])
def test_drop_draws_one_set_of_neurons_per_expert(ratio, number):
    start, config = arrange(expert_groups="joint", start="drop", drop_ratio=ratio)
    weights = dense_weights()
    sets = []
    for expert, down in zip(*stacks(upcycled_block(config, weights, start)), strict=True):
        gate_set, up_set, down_set = changed_neurons(expert, down, weights)
        assert gate_set == up_set == down_set
        assert len(gate_set) == number
        sets.append(frozenset(gate_set))
    if 1 < number < WIDTH:
        assert len(set(sets)) == len(sets) == 8


def test_drop_redraws_with_the_statistics_of_the_replaced_neurons():
    """Half of the neurons are far from the others, so the statistics of all neurons would be wrong."""
    start, config = arrange({0: 2}, expert_groups="joint", start="drop", num_experts=400)
    weights = GatedWeights(
        torch.stack([torch.full((32,), 3.0), torch.linspace(-2, -1, 32)]),
        torch.stack([torch.linspace(5, 6, 32), torch.full((32,), 1.0)]),
        torch.stack([torch.full((32,), -4.0), torch.linspace(7, 9, 32)], dim=1),
    )
    gate_up, down = stacks(upcycled_block(config, weights, start))
    is_first = (gate_up[:, 0] != weights.gate[0]).any(dim=1) | (gate_up[:, 2] != weights.up[0]).any(dim=1)
    assert 150 < is_first.sum() < 250
    # Neuron 0: gate and down are constant, so they are redrawn unchanged. Up is spread over 5 to 6.
    assert (gate_up[is_first, 0] == 3).all()
    assert (down[is_first, :, 0] == -4).all()
    assert_alike(gate_up[is_first, 2], weights.up[0])
    # Neuron 1 in other experts.
    assert (gate_up[~is_first, 3] == 1).all()
    assert_alike(gate_up[~is_first, 1], weights.gate[1])
    assert_alike(down[~is_first, :, 1], weights.down[:, 1])


def test_drop_without_dropping_is_copy():
    weights = dense_weights()
    drop, copy = (
        upcycled_block(config, weights, start)
        for start, config in (
            arrange(start="drop", drop_ratio=0),
            arrange(start="copy"),
        )
    )
    for name, parameter in copy.named_parameters():
        assert torch.equal(drop.get_parameter(name), parameter)


def test_drop_changes_the_output():
    start, config = arrange(expert_groups="joint", start="drop")
    assert start == Start("drop", drop_ratio=0.5)
    assert not start.is_exact
    weights, states = dense_weights(), hidden_states()
    assert relative_error(run(upcycled_block(config, weights, start), config, states), dense(states, weights)) > 0.1


# ---------------------------------------------------------------- pools

POOLED = {"widths": {0: WIDTH, 1: WIDTH, 3: WIDTH}, "num_hidden_layers": 4, "expert_pool": [7, 7, None, 7]}
OWN_BLOCKS = {layer: dense_weights(seed=layer) for layer in (0, 1, 3)}


@pytest.mark.parametrize("name", ["hybrid", "shared", "shared-and-own", "hybrid-fine"])
def test_residual_is_exact_in_every_layer_of_a_pool(name):
    start, config = arrange(**POOLED, **EXACT[name])
    experts = upcycled_pool(config, 7, [*OWN_BLOCKS.values()], start)
    for layer, weights in OWN_BLOCKS.items():
        block = upcycled_block(config, weights, start, layer)
        assert block.experts is None
        states = hidden_states(seed=layer)
        assert relative_error(run(block, config, states, pooled=experts), dense(states, weights)) < 1e-6


def test_residual_pool_starts_from_its_layers_in_turn():
    start, config = arrange(**POOLED, num_experts=7)
    experts = upcycled_pool(config, 7, [*OWN_BLOCKS.values()], start)
    for number, layer in enumerate([0, 1, 3, 0, 1, 3, 0]):
        weights = OWN_BLOCKS[layer]
        assert torch.equal(experts.gate_up_proj[number], torch.cat([weights.gate, weights.up]))
    assert not experts.down_proj.any()


@pytest.mark.parametrize("name", ["joint", "joint-split", "isolated", "hybrid-copy"])
@pytest.mark.parametrize("pool_start", ["first", "mean"])
def test_pool_starts_from_its_first_layer_or_their_mean(name, pool_start):
    start, config = arrange(**POOLED, **EXACT[name], pool_start=pool_start)
    assert not start.is_exact
    experts = upcycled_pool(config, 7, [*OWN_BLOCKS.values()], start)
    weights = OWN_BLOCKS[0]
    if pool_start == "mean":
        weights = GatedWeights(
            *((OWN_BLOCKS[0][i] + OWN_BLOCKS[1][i] + OWN_BLOCKS[3][i]) / 3 for i in range(len(weights)))
        )
    states = hidden_states()
    for layer in (0, 1, 3):
        block = upcycled_block(config, OWN_BLOCKS[layer], start, layer)
        assert relative_error(run(block, config, states, pooled=experts), dense(states, weights)) < 1e-6


def test_pool_of_equal_blocks_is_exact():
    weights, states = dense_weights(), hidden_states()
    for pool_start in ("first", "mean"):
        start, config = arrange(**POOLED, expert_groups="joint", pool_start=pool_start)
        experts = upcycled_pool(config, 7, [weights] * 3, start)
        block = upcycled_block(config, weights, start, 3)
        assert relative_error(run(block, config, states, pooled=experts), dense(states, weights)) < 1e-6


def test_dropped_pool_has_one_set_of_neurons_per_expert():
    start, config = arrange(**POOLED, expert_groups="joint", start="drop", pool_start="first")
    experts = upcycled_pool(config, 7, [*OWN_BLOCKS.values()], start)
    sets = [
        changed_neurons(expert, down, OWN_BLOCKS[0])
        for expert, down in zip(experts.gate_up_proj, experts.down_proj, strict=True)
    ]
    assert {len(neurons) for three in sets for neurons in three} == {WIDTH // 2}
    assert len({frozenset(three[0]) for three in sets}) == 8


@pytest.mark.parametrize("request_", [{}, {"start": "copy", "pool_start": "mean"}])
def test_pool_requires_the_block_of_every_layer(request_):
    start, config = arrange(**POOLED, **request_)
    with pytest.raises(ValueError, match="shorter"):
        upcycled_pool(config, 7, [OWN_BLOCKS[0], OWN_BLOCKS[1]], start)


@pytest.mark.parametrize(
    "request_", [{}, {"start": "copy", "pool_start": "first"}, {"start": "copy", "pool_start": "mean"}]
)
def test_weights_of_another_model_are_refused_in_pools(request_):
    start, config = arrange(**POOLED, **request_)
    wrong = GatedWeights(*(torch.zeros(size) for size in ((WIDTH, 8), (WIDTH, 8), (8, WIDTH))))
    with pytest.raises(ValueError, match="the dense block of layer 0 has weights of the shapes"):
        upcycled_pool(config, 7, [wrong] * 3, start)
    if start.pool_start != "first":
        with pytest.raises(ValueError, match="the dense block of layer 3 has weights of the shapes"):
            upcycled_pool(config, 7, [OWN_BLOCKS[0], OWN_BLOCKS[1], wrong], start)


# ---------------------------------------------------------------- seeds


RANDOM = {"start": "drop", "num_hidden_layers": 2, "widths": {0: WIDTH, 1: WIDTH}}


def tensors(block) -> dict[str, torch.Tensor]:
    return {name: parameter.data.clone() for name, parameter in block.named_parameters()}


def test_same_seed_gives_the_same_bits_in_any_order_of_layers():
    start, config = arrange(**RANDOM)
    weights = dense_weights()
    forwards = [tensors(upcycled_block(config, weights, start, layer, seed=3)) for layer in (0, 1)]
    backwards = [tensors(upcycled_block(config, weights, start, layer, seed=3)) for layer in (1, 0)]
    for first, second in zip(forwards, reversed(backwards), strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    other = tensors(upcycled_block(config, weights, start, 0, seed=4))
    for name, tensor in forwards[0].items():
        if "shared_experts" in name and "down_proj" in name:
            continue  # zero
        assert not torch.equal(tensor, forwards[1][name])
        assert not torch.equal(tensor, other[name])


def test_pools_differ_by_number_and_seed():
    request = POOLED | {"expert_pool": [7, 2, None, 2], "start": "drop", "pool_start": "first"}
    start, config = arrange(**request)
    weights = dense_weights()
    experts = [
        tensors(upcycled_pool(config, pool, [weights] * len(config.pools[pool]), start, seed=seed))["down_proj"]
        for pool, seed in ((7, 0), (2, 0), (7, 1), (7, 0))
    ]
    assert torch.equal(experts[0], experts[3])
    assert not torch.equal(experts[0], experts[1])
    assert not torch.equal(experts[0], experts[2])
    assert torch.equal(experts[0], tensors(upcycled_pool(config, 7, [weights], start))["down_proj"])


def test_starting_does_not_change_the_global_random_state():
    start, config = arrange(**RANDOM)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    upcycled_block(config, dense_weights(), start, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_router_rows_do_not_change_the_random_numbers_of_experts():
    start, config = arrange(**RANDOM)
    weights = dense_weights()
    inputs = BlockInputs(hidden_states().reshape(-1, HIDDEN_SIZE), MODALITY_IDS.flatten())
    plain = tensors(upcycled_block(config, weights, start))
    from_data = tensors(upcycled_block(config, weights, start, inputs=inputs))
    assert {name for name in plain if not torch.equal(plain[name], from_data[name])} == {"gate.weight"}


def test_results_of_a_seed_do_not_change():
    """Exact values: a model that is upcycled again with the same seed must not change."""
    assert seeded_generator(0, "router", 3).initial_seed() == 8670820804917938130
    start, config = arrange(start="copy")
    block = upcycled_block(config, dense_weights(), start)
    assert torch.allclose(block.gate.weight[1, :3], torch.tensor([0.063785, 0.257408, -0.119941]), atol=1e-6)
    always_on = block.shared_experts["text"].gate_proj.weight
    assert torch.allclose(always_on[0, :3], torch.tensor([0.510308, 0.135884, -0.153811]), atol=1e-6)


def test_half_precision_draws_the_rounded_values_of_full_precision():
    start, config = arrange(**RANDOM)
    exact = dense_weights(dtype=torch.bfloat16)
    full = tensors(upcycled_block(config, GatedWeights(*(weight.float() for weight in exact)), start))
    half = tensors(upcycled_block(config, exact, start))
    for name, tensor in half.items():
        assert torch.equal(tensor, full[name].bfloat16())


# ---------------------------------------------------------------- other properties


def test_bias_of_the_router_starts_at_zero():
    start, config = arrange(expert_groups="joint", router_bias_update_rate=1e-3)
    block = empty_block(config, 0, torch.bfloat16)
    block.gate.e_score_correction_bias.fill_(5.0)
    start_block(block, config, dense_weights(dtype=torch.bfloat16), start)
    assert block.gate.e_score_correction_bias.dtype == torch.float32
    assert not block.gate.e_score_correction_bias.any()


def test_empty_block_has_the_layer_dtype_and_no_random_draws():
    _, config = arrange(num_hidden_layers=2, widths={0: WIDTH, 1: WIDTH})
    before = torch.get_rng_state()
    block = empty_block(config, 1, torch.float16)
    assert torch.equal(torch.get_rng_state(), before)
    assert block.layer_idx == 1
    assert {parameter.dtype for parameter in block.parameters()} == {torch.float16}
    assert {parameter.device.type for parameter in block.parameters()} == {"cpu"}


@pytest.mark.parametrize("wrong", ["gate", "up", "down"])
def test_weights_of_another_model_are_refused(wrong):
    start, config = arrange()
    weights = dense_weights()._replace(**{wrong: torch.zeros(WIDTH, HIDDEN_SIZE + 1)})
    with pytest.raises(ValueError, match="the dense block of layer 0 has weights of the shapes"):
        start_block(empty_block(config, 0, torch.float32), config, weights, start)


def gradients_of_steps(name: str, steps: int) -> list[dict[str, torch.Tensor]]:
    """Returns the gradients of a block's parameters in a few steps of gradient descent towards other outputs."""
    start, config = arrange(**EXACT[name])
    block = upcycled_block(config, dense_weights(), start)
    states, target = hidden_states(), hidden_states(seed=5)
    found = []
    for _ in range(steps):
        block.zero_grad()
        (run(block, config, states) - target).square().mean().backward()
        found.append({name: parameter.grad.clone() for name, parameter in block.named_parameters()})
        with torch.no_grad():
            for parameter in block.parameters():
                parameter -= 0.1 * parameter.grad
    return found


@pytest.mark.parametrize(
    "name", ["hybrid", "hybrid-fine", "hybrid-copy", "hybrid-split", "joint", "joint-split", "isolated", "shared"]
)
def test_gradients_reach_every_parameter(name):
    first, *_, last = gradients_of_steps(name, 3)
    for parameter, gradient in last.items():
        per_expert = gradient.flatten(1) if gradient.dim() == 3 else gradient
        assert per_expert.any(dim=1).all(), parameter
    if name.startswith("hybrid") and name not in ("hybrid-copy", "hybrid-split"):
        # Routed experts still output zero, so their down projections are trained first.
        assert first["experts.down_proj"].flatten(1).any(dim=1).all()
        assert not first["experts.gate_up_proj"].any()
        assert not first["gate.weight"].any()


def test_image_experts_get_no_gradients_from_text():
    start, config = arrange(expert_groups="isolated")
    block = upcycled_block(config, dense_weights(), start)
    run(block, config, hidden_states(), torch.full_like(MODALITY_IDS, TEXT)).square().mean().backward()
    assert block.experts["text"].down_proj.grad.any()
    assert not block.experts["image"].down_proj.grad.any()
