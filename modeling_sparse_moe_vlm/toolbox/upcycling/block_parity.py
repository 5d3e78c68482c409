"""The difference between the outputs of a sparse block and of the dense block that it starts from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from ...experts import SparseMoeVlmSparseMoeBlock
from ...experts_config import SparseMoeVlmExpertsConfig
from ...routing import RoutingPlanner
from ...token_modalities import TokenModalities
from .starts import GatedWeights, seeded_generator

TOKENS_PER_MODALITY = 16


@torch.no_grad()
def block_error(
    block: SparseMoeVlmSparseMoeBlock,
    config: SparseMoeVlmExpertsConfig,
    weights: GatedWeights,
    pooled_experts: nn.Module | None = None,
) -> float:
    """
    Compares a sparse block with its dense block on random inputs of unit scale, for tokens of every modality.

    Args:
        block (`SparseMoeVlmSparseMoeBlock`):
            The sparse block of one layer, in float32.
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the block.
        weights ([`GatedWeights`]):
            The dense block, of any type. It is computed in float32.
        pooled_experts (`nn.Module`, *optional*):
            The routed experts, if the layer belongs to a pool.

    Returns:
        `float`: Largest difference of two outputs, relative to the largest output of the dense block.
    """
    num_tokens = TOKENS_PER_MODALITY * len(config.modalities)
    generator = seeded_generator(0, "parity", block.layer_idx)
    inputs = torch.randn(1, num_tokens, config.hidden_size, generator=generator)
    ids = torch.arange(num_tokens)[None] % len(config.modalities)
    routing = RoutingPlanner(config).plan(TokenModalities(ids, None), inputs.device)
    sparse = block.eval()(inputs, routing, pooled_experts)
    gate, up, down = (weight.float() for weight in weights)
    dense = F.linear(ACT2FN[config.hidden_act](F.linear(inputs, gate)) * F.linear(inputs, up), down)
    return ((sparse - dense).abs().max() / dense.abs().max()).item()
