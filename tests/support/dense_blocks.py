"""Dense feed-forward blocks, their outputs, and the sparse blocks that start from them."""

from typing import Any

import torch
import torch.nn.functional as F

from modeling_sparse_moe_vlm.experts import SparseMoeVlmSparseMoeBlock, make_experts
from modeling_sparse_moe_vlm.experts_config import SparseMoeVlmExpertsConfig
from modeling_sparse_moe_vlm.routing import RoutingPlanner
from modeling_sparse_moe_vlm.toolbox.upcycling.arrangement import Start, experts_fields
from modeling_sparse_moe_vlm.toolbox.upcycling.starts import GatedWeights, empty_block, start_block, start_pool

HIDDEN_SIZE = 32
WIDTH = 24
TEXT, IMAGE = 0, 1
# Modality ids of the tokens (2, 40): one row with text and images, one with only text.
MODALITY_IDS = torch.tensor([[TEXT] * 7 + [IMAGE] * 20 + [TEXT] * 13, [TEXT] * 40])
BASE = {
    "num_hidden_layers": 1,
    "hidden_size": HIDDEN_SIZE,
    "hidden_act": "silu",
    "modalities": ["text", "image"],
    "initializer_range": 0.2,
}


def dense_weights(width: int = WIDTH, seed: int = 0, dtype: torch.dtype = torch.float32) -> GatedWeights:
    """Returns three random weights, with different means and standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    gate = 0.3 * torch.randn(width, HIDDEN_SIZE, generator=generator) + 0.02
    up = 0.2 * torch.randn(width, HIDDEN_SIZE, generator=generator) - 0.05
    down = 0.4 * torch.randn(HIDDEN_SIZE, width, generator=generator) + 0.1
    return GatedWeights(gate.to(dtype), up.to(dtype), down.to(dtype))


def hidden_states(seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*MODALITY_IDS.shape, HIDDEN_SIZE, generator=generator).to(dtype)


def dense(states: torch.Tensor, weights: GatedWeights, act=F.silu) -> torch.Tensor:
    """Computes the dense block neuron by neuron, in float64."""
    states = states.double()
    gate, up, down = (weight.double() for weight in weights)
    neurons = zip(gate, up, down.T, strict=True)
    return sum((act(states @ g) * (states @ u))[..., None] * d for g, u, d in neurons)


def arrange(widths: dict[int, int] | None = None, **request: Any) -> tuple[Start, SparseMoeVlmExpertsConfig]:
    """Returns how the experts of a request start, and their configuration."""
    start, fields = experts_fields(**(BASE | {"widths": {0: WIDTH} if widths is None else widths} | request))
    config = SparseMoeVlmExpertsConfig(**fields)
    config._experts_implementation = "eager"
    return start, config


def upcycled_block(
    config: SparseMoeVlmExpertsConfig, weights: GatedWeights, start: Start, layer: int = 0, **options: Any
) -> SparseMoeVlmSparseMoeBlock:
    block = empty_block(config, layer, weights.gate.dtype)
    for parameter in block.parameters():
        parameter.data.fill_(torch.nan)  # weights that the start does not set become visible
    start_block(block, config, weights, start, **options)
    return block


def upcycled_pool(config: SparseMoeVlmExpertsConfig, pool: int, weights: list[GatedWeights], start: Start, **options):
    experts = make_experts(config, config.layer_expert_groups(config.pools[pool][0], always_on=False))
    for parameter in experts.parameters():
        parameter.data.fill_(torch.nan)
    start_pool(experts, config, pool, iter(weights), start, **options)
    return experts.to(weights[0].gate.dtype)


def run(block, config, states: torch.Tensor, ids: torch.Tensor | None = MODALITY_IDS, pooled=None) -> torch.Tensor:
    plan = RoutingPlanner(config)(ids, states.device, None, states.shape[0] * states.shape[1])
    return block(states, plan, pooled)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference, relative to the largest expected value."""
    expected = expected.double()
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()
