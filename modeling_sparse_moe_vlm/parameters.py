"""Number of parameters of a model, total and active per token, computed from its configuration."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel, initialization

from .experts_config import SparseMoeVlmExpertsConfig


def count_parameters(
    config: PreTrainedConfig, modality: str, model_class: type[PreTrainedModel] | None = None
) -> tuple[int, int]:
    """
    Counts the parameters of a model on the meta device, so no memory is allocated.

    Args:
        config (`SparseMoeVlmConfig` or `SparseMoeVlmTextConfig`):
            Configuration of the whole model or of the decoder.
        modality (`str`):
            Modality of the token whose active parameters are counted.
        model_class (`type[PreTrainedModel]`, *optional*):
            Class of the model. By default, the class with a language head.

    Returns:
        `tuple[int, int]`: Number of all parameters, and number of parameters that one token of the modality uses.

    Raises:
        ValueError: If the configuration does not have the modality.
    """
    # Imported here, because that file imports this one.
    from .modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmForConditionalGeneration

    text_config = config.get_text_config()
    if modality not in text_config.modalities:
        raise ValueError(f"unknown modality {modality!r}: the configuration has {text_config.modalities}.")
    with torch.device("meta"), initialization.no_init_weights():
        if model_class is None:
            model_class = SparseMoeVlmForCausalLM if text_config is config else SparseMoeVlmForConditionalGeneration
        model = model_class._from_config(copy.deepcopy(config))
    model.tie_weights()

    total = model.num_parameters()
    idle = idle_experts(text_config, modality)
    if modality == "text" and text_config is not config:
        vision = (model.model.vision_tower, model.model.multi_modal_projector)
        idle += sum(parameter.numel() for module in vision for parameter in module.parameters())
    return total, total - idle


def idle_experts(config: SparseMoeVlmExpertsConfig, modality: str) -> int:
    """
    Counts the parameters of the experts of all layers that a token does not use.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        modality (`str`):
            Modality of the token.

    Returns:
        `int`: The number of parameters.
    """
    layers = [[layer] for layer in range(config.num_hidden_layers) if config.layer_pool(layer) is None]
    return sum(_idle_experts(config, shared, modality) for shared in [*layers, *config.pools.values()])


def _idle_experts(config: SparseMoeVlmExpertsConfig, layers: list[int], modality: str) -> int:
    """Counts the unused parameters of the experts of one layer, or of layers that share their routed experts."""
    per_unit = 3 * config.hidden_size  # gate, up and down weights per unit of the intermediate size
    idle = 0
    for layer in layers:
        for group in config.layer_expert_groups(layer, always_on=True):
            idle += 0 if group.serves(modality) else group.num_experts * group.intermediate_size
    # The number of used parameters is an upper bound: if groups differ in width, the widest experts that serve the
    # token are counted; if layers share experts, different experts are counted in each layer.
    widths = []
    for group in config.layer_expert_groups(layers[0], always_on=False):
        idle += group.num_experts * group.intermediate_size
        widths += [group.intermediate_size] * (group.num_experts if group.serves(modality) else 0)
    num_chosen = config.experts_per_token(modality) * len(layers)
    return per_unit * (idle - sum(sorted(widths, reverse=True)[:num_chosen]))
