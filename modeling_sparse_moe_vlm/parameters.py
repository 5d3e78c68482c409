"""Number of parameters of a model, total and active per token, from its configuration alone."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, initialization


def count_parameters(config: PreTrainedConfig, modality: str) -> tuple[int, int]:
    """
    Counts on the meta device, where modules have shapes but no memory.

    Args:
        config (`SparseMoeVlmConfig` or `SparseMoeVlmTextConfig`):
            Configuration of the whole model, or of the decoder alone.
        modality (`str`):
            The modality of the token whose active parameters are counted.

    Returns:
        `tuple[int, int]`: all parameters, and those that one token of the modality uses.

    Raises:
        ValueError: If the configuration does not know the modality.
    """
    text_config = config.get_text_config()
    if modality not in text_config.modalities:
        raise ValueError(f"unknown modality {modality!r}: the configuration has {text_config.modalities}.")
    with torch.device("meta"), initialization.no_init_weights():
        # By the auto class, since the model imports this file. Code that came with a checkpoint is running already.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=True)
    model.tie_weights()

    total = model.num_parameters()
    idle = sum(_idle_experts(text_config, layer, modality) for layer in range(text_config.num_hidden_layers))
    if modality == "text" and text_config is not config:
        vision = (model.model.vision_tower, model.model.multi_modal_projector)
        idle += sum(parameter.numel() for module in vision for parameter in module.parameters())
    return total, total - idle


def _idle_experts(config: PreTrainedConfig, layer_idx: int, modality: str) -> int:
    """Parameters of a layer's experts that one token of the modality leaves unused."""
    per_unit = 3 * config.hidden_size  # gate, up and down weights per unit of an expert's width
    groups = config.layer_expert_groups(layer_idx)
    idle = 0
    # Where groups differ in width, the k widest experts that serve the token are an upper bound of what it uses.
    widths = []
    for group in groups:
        size = group.num_experts * group.intermediate_size * per_unit
        if group.always_on:
            idle += 0 if group.serves(modality) else size
        else:
            idle += size
            widths += [group.intermediate_size] * (group.num_experts if group.serves(modality) else 0)
    return idle - per_unit * sum(sorted(widths, reverse=True)[: config.experts_per_token(modality)])
