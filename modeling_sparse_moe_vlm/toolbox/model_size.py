"""Sizes of models: how many parameters they have, and how many of them a token of each modality uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmTextConfig
from .expert_modules import uses_experts_interface
from .meta_model import model_on_meta_device

# What configurations call the number of experts per token.
CHOSEN_EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_topk")


@dataclass(frozen=True)
class ModelSize:
    """
    Numbers of parameters.

    Args:
        total (`int`): All of them; tied ones count once.
        active (`dict[str, int]`):
            By modality that the model reads, those that one token uses. Empty where that is not known.
    """

    total: int
    active: dict[str, int]


def model_size(config: PreTrainedConfig) -> ModelSize:
    """
    Counts the parameters of a model without making its weights.

    Args:
        config (`PreTrainedConfig`):
            Configuration of ours or of any Transformers model. Of a mixture of experts that Transformers' experts
            interface does not run, what is active is not known.

    Returns:
        [`ModelSize`]

    Raises:
        ValueError: If no auto class knows the configuration.
    """
    if isinstance(config, SparseMoeVlmConfig | SparseMoeVlmTextConfig):
        modalities = config.get_text_config().modalities if isinstance(config, SparseMoeVlmConfig) else ["text"]
        return ModelSize(config.num_parameters(), {name: config.num_active_parameters(name) for name in modalities})
    model = model_on_meta_device(config)
    model.tie_weights()
    total = _count([model])
    idle = _idle_parameters(model)
    if idle is None:
        return ModelSize(total, {})
    if model.get_encoder("image") is model:
        return ModelSize(total, {"text": total - idle})
    head = model.get_output_embeddings()
    reads_text = _count([model.get_decoder(), *([] if head is None else [head])])
    return ModelSize(total, {"text": reads_text - idle, "image": total - idle})


def describe_size(model: PreTrainedModel) -> str:
    """The size of a model as a sentence; of models that are not ours only the total."""
    if not isinstance(model.config, SparseMoeVlmConfig):
        return f"{type(model).__name__} with {model.num_parameters():,} parameters."
    size = model_size(model.config)
    active = ", ".join(f"{number:,} active per {modality} token" for modality, number in size.active.items())
    return f"Model with {size.total:,} parameters ({active})."


def short(number: int) -> str:
    """A number with its unit: `12.3 M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _idle_parameters(model: PreTrainedModel) -> int | None:
    """Parameters of the routed experts that one token leaves unused; `None` where that is not known."""
    config = model.config.get_text_config()
    experts = [module for module in model.modules() if uses_experts_interface(module)]
    if not experts:
        return None if _names_experts(config.to_dict()) else 0
    chosen = next((number for name in CHOSEN_EXPERTS if isinstance(number := getattr(config, name, None), int)), None)
    if chosen is None:
        return None
    return sum(_count([module]) * (module.num_experts - chosen) // module.num_experts for module in experts)


def _names_experts(values: Mapping[str, Any]) -> bool:
    """Whether a configuration says that a model has several experts, by whatever name."""
    return any(
        _names_experts(value) if isinstance(value, dict) else isinstance(value, int) and value > 1 and "experts" in name
        for name, value in values.items()
    )


def _count(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for parameter in nn.ModuleList(modules).parameters())
