"""The error of a sparse block is that of the modality and of the group that are wrong."""

import pytest
import torch

from modeling_sparse_moe_vlm.experts import make_experts
from modeling_sparse_moe_vlm.experts_config import SparseMoeVlmExpertsConfig
from modeling_sparse_moe_vlm.toolbox.upcycling.arrangement import Start, experts_fields
from modeling_sparse_moe_vlm.toolbox.upcycling.block_parity import block_error
from modeling_sparse_moe_vlm.toolbox.upcycling.starts import GatedWeights, empty_block, start_block, start_pool


def make_weights(width=12, hidden_size=8, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(width, hidden_size)] * 2 + [(hidden_size, width)]
    return GatedWeights(*(torch.randn(shape).to(dtype) for shape in shapes))


def make_block(weights, num_layers=1, **request):
    start, fields = experts_fields(
        widths=dict.fromkeys(range(num_layers), 12),
        num_hidden_layers=num_layers,
        hidden_size=8,
        hidden_act="silu",
        modalities=["text", "image"],
        **request,
    )
    config = SparseMoeVlmExpertsConfig(**fields)
    block = empty_block(config, 0, torch.float32)
    start_block(block, config, weights, start)
    return block, config


def test_an_exact_block(arrangement):
    weights = make_weights()
    assert block_error(*make_block(weights, expert_groups=arrangement), weights) <= 1e-6


def test_the_error_is_relative_to_the_largest_output():
    """Outputs that are 50 % too large have an error of one half."""
    weights = make_weights()
    block, config = make_block(weights, expert_groups="joint")
    block.experts.down_proj.data *= 1.5
    assert block_error(block, config, weights) == pytest.approx(0.5, rel=1e-5)
    block.experts.down_proj.data /= -1.5
    assert block_error(block, config, weights) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_the_experts_of_every_modality_are_compared(modality):
    weights = make_weights()
    block, config = make_block(weights)
    block.shared_experts[modality].down_proj.weight.data.zero_()
    assert block_error(block, config, weights) > 0.5


def test_the_comparison_is_in_float32_for_any_dtype():
    weights = make_weights(dtype=torch.bfloat16)
    assert block_error(*make_block(weights), weights) == 0.0


def test_the_error_is_reproducible():
    weights = make_weights()
    block, config = make_block(weights, expert_groups="joint", start="drop")
    state = torch.random.get_rng_state()
    error = block_error(block, config, weights)
    assert error > 0.1
    assert block_error(block, config, weights) == error
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_layer_of_a_pool():
    weights = make_weights()
    block, config = make_block(weights, expert_groups="joint", num_layers=2, expert_pool=[0, 0], pool_start="first")
    with torch.device("meta"):
        experts = make_experts(config, config.layer_expert_groups(0, always_on=False))
    experts = experts.to_empty(device="cpu")
    start_pool(experts, config, 0, [weights, weights], Start("copy", pool_start="first"))
    assert block_error(block, config, weights, experts) <= 1e-6
    experts.down_proj.data *= 1.5
    assert block_error(block, config, weights, experts) == pytest.approx(0.5, rel=1e-5)
