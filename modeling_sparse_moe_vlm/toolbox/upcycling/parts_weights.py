"""The weights of a model from parts: copied layer by layer, initial experts, and random weights for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ...configuration_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmTextConfig
from ...experts import SparseMoeVlmSparseMoeBlock
from ...modeling_sparse_moe_vlm import (
    SparseMoeVlmForCausalLM,
    SparseMoeVlmForConditionalGeneration,
    SparseMoeVlmTextModel,
)
from .arrangement import Start
from .decoder_layout import DecoderLayout
from .errors import UpcyclingError
from .router_rows import BlockInputs
from .starts import start_block, start_pool

# The attribute with which Transformers marks parameters that have been loaded.
_KEEP = "_is_hf_initialized"

BuiltModel = SparseMoeVlmForCausalLM | SparseMoeVlmForConditionalGeneration


def decoder_of(model: BuiltModel) -> SparseMoeVlmTextModel:
    """Returns the decoder of a model with or without a vision tower."""
    return model.model if isinstance(model, SparseMoeVlmForCausalLM) else model.model.language_model


def empty_model(config: SparseMoeVlmTextConfig | SparseMoeVlmConfig, like: PreTrainedModel) -> BuiltModel:
    """Allocates a model without initialising it, in the dtype and on the device of another model."""
    is_text = isinstance(config, SparseMoeVlmTextConfig)
    model_class = SparseMoeVlmForCausalLM if is_text else SparseMoeVlmForConditionalGeneration
    # Some towers draw random numbers nevertheless.
    with torch.random.fork_rng(), torch.device(like.device), init.no_init_weights():
        model = model_class._from_config(config, dtype=like.dtype)
    model.tie_weights()
    return model


@torch.no_grad()
def copy_decoder(model: BuiltModel, layout: DecoderLayout) -> None:
    """Copies everything except the experts, layer by layer. New rows of the vocabulary are the mean of the others."""
    decoder = decoder_of(model)
    for name, weight in layout.outer_weights().items():
        place = (model if name.startswith("lm_head.") else decoder).get_parameter(name)
        place[: len(weight)].copy_(weight)
        place[len(weight) :] = weight.float().mean(dim=0)
        _keep([place])
    for number, layer in enumerate(decoder.layers):
        weights = layout.layer_weights(number)
        if not layer.is_sparse:
            block = layout.block_weights(number)
            weights |= {f"mlp.{part}_proj.weight": weight for part, weight in block._asdict().items()}
        for name, weight in weights.items():
            layer.get_parameter(name).copy_(weight)
            _keep([layer.get_parameter(name)])


def start_experts(
    model: BuiltModel, layout: DecoderLayout, start: Start, seed: int, inputs: Mapping[int, BlockInputs]
) -> None:
    """Fills the sparse blocks and the expert pools from the dense blocks of their layers."""
    decoder = decoder_of(model)
    config = decoder.config
    for number in config.sparse_layers:
        block = cast(SparseMoeVlmSparseMoeBlock, decoder.layers[number].mlp)
        start_block(block, config, layout.block_weights(number), start, seed=seed, inputs=inputs.get(number))
        _keep(block.parameters())
    for pool, layers in config.pools.items():
        experts = decoder.expert_pools[str(pool)]
        start_pool(experts, config, pool, map(layout.block_weights, layers), start, seed=seed)
        _keep(experts.parameters())


def copy_tower(model: SparseMoeVlmForConditionalGeneration, vision_encoder: PreTrainedModel) -> None:
    """
    Copies the weights of a vision tower from a model that is one or contains one. If that has no pooling layer,
    [`initialize_rest`] initialises it; its output is not used.

    Raises:
        UpcyclingError: If no part of the model has the tower's weights.
    """
    tower = model.model.vision_tower
    needed = {name: tensor.shape for name, tensor in tower.state_dict().items()}
    unlike = []
    for part in vision_encoder.modules():
        if not isinstance(part, PreTrainedModel) or type(part.config) is not type(tower.config):
            continue
        state = part.state_dict()
        shapes = {name: tensor.shape for name, tensor in state.items()}
        unlike = sorted(name for name in needed.keys() | shapes.keys() if needed.get(name) != shapes.get(name))
        if all(name.startswith("pooler.") and name not in shapes for name in unlike):
            tower.load_state_dict(state, strict=False)
            _keep(tensor for name, tensor in tower.named_parameters() if name in state)
            return
    raise UpcyclingError(
        f"the weights of {type(vision_encoder).__name__} are not those of the {type(tower).__name__} that its "
        f"configuration describes: {', '.join(unlike[:3])} and {max(len(unlike) - 3, 0)} more differ."
    )


def initialize_rest(model: BuiltModel, seed: int) -> None:
    """Initialises the weights that have not been copied, such as those of the connector."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.initialize_weights()
    for parameter in model.parameters():
        parameter.__dict__.pop(_KEEP, None)


def _keep(parameters: Iterable[nn.Parameter]) -> None:
    """Marks parameters that [`initialize_rest`] must not change."""
    for parameter in parameters:
        setattr(parameter, _KEEP, True)
