"""Sizes of models: the number of their parameters, and the number that a token of each modality uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..parameters import idle_experts
from .expert_modules import experts_of_base, our_experts_config, uses_experts_interface
from .meta_model import model_on_meta_device

# Names of the number of experts per token in configurations.
CHOSEN_EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_topk")


@dataclass(frozen=True)
class ModelSize:
    """
    Numbers of parameters.

    Args:
        total (`int`): Number of all parameters; tied parameters count once.
        active (`dict[str, int]`):
            Number of parameters that one token uses, by modality that the model reads. Empty if it is not known.
    """

    total: int
    active: dict[str, int]


def model_size(config: PreTrainedConfig | PreTrainedModel) -> ModelSize:
    """
    Counts the parameters of a model without allocating its weights.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`):
            Configuration of a model of this package or of any Transformers model, or the model itself, which may be on
            the meta device. The active parameters of a mixture of experts are only known if it uses Transformers'
            experts interface.

    Returns:
        [`ModelSize`]

    Raises:
        ValueError: If no auto class knows the configuration.
    """
    # Not by class, because the classes of a checkpoint that came with its code are different ones.
    own: Any = config.config if isinstance(config, PreTrainedModel) else config
    if hasattr(own, "num_active_parameters"):
        text_config = own.get_text_config()
        modalities = ["text"] if text_config is own else text_config.modalities
        return ModelSize(own.num_parameters(), {name: own.num_active_parameters(name) for name in modalities})
    model = model_on_meta_device(config)
    model.tie_weights()
    total, encoders = _count([model]), encoders_of(model)
    active = {}
    for modality, idle in idle_parameters(model).items():
        if modality == "text" and encoders:
            used = _count(text_modules(model))
        else:
            own = encoders.get("image" if modality == "video" else modality)
            used = total - _count({encoder for encoder in encoders.values() if encoder is not own})
        active[modality] = used - idle
    return ModelSize(total, active)


def encoders_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Returns the encoders of modalities other than text, by modality. Video is encoded like images."""
    encoders = {modality: model.get_encoder(modality) for modality in ("image", "audio")}
    return {modality: encoder for modality, encoder in encoders.items() if encoder not in (None, model)}


def text_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the modules that a text token passes through: the decoder, and the head if there is one."""
    head = model.get_output_embeddings()
    return [model.get_decoder(), *([] if head is None else [head])]


def idle_parameters(model: PreTrainedModel) -> dict[str, int]:
    """
    Counts the parameters of a model's experts that a token does not use.

    Args:
        model (`PreTrainedModel`):
            The model, which may be on the meta device.

    Returns:
        `dict[str, int]`: Number of parameters of experts that one token does not use, by modality that the model reads.
        Empty if it is not known.
    """
    config = our_experts_config(model.config)
    if config is not None:
        of_base = _idle_parameters(model, list(experts_of_base(model).values()))
        if of_base is None:
            return {}
        return {modality: idle_experts(config, modality) + of_base for modality in config.modalities}
    experts = [module for module in model.modules() if uses_experts_interface(module)]
    if not experts and _names_experts(model.config.get_text_config().to_dict()):
        return {}
    idle = _idle_parameters(model, experts)
    return {} if idle is None else dict.fromkeys(["text", *encoders_of(model)], idle)


def describe_size(model: PreTrainedModel) -> str:
    """Returns the size of a model as a sentence. For models without expert groups, it contains only the total."""
    if our_experts_config(model.config) is None:
        return f"{type(model).__name__} with {model.num_parameters():,} parameters."
    size = model_size(model.config)
    active = ", ".join(f"{number:,} active per {modality} token" for modality, number in size.active.items())
    return f"Model with {size.total:,} parameters ({active})."


def short(number: int) -> str:
    """Returns a number with its unit, such as `12.3 M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _idle_parameters(model: PreTrainedModel, experts: list[Any]) -> int | None:
    """Counts the parameters of experts modules that one token does not use; `None` if it is not known."""
    if not experts:
        return 0
    config = model.config.get_text_config()
    chosen = next((number for name in CHOSEN_EXPERTS if isinstance(number := getattr(config, name, None), int)), None)
    if chosen is None:
        return None
    return sum(_count([module]) * (module.num_experts - chosen) // module.num_experts for module in experts)


def _names_experts(values: Mapping[str, Any]) -> bool:
    """Returns whether a configuration has a field for a number of experts that is greater than 1."""
    return any(
        _names_experts(value) if isinstance(value, dict) else isinstance(value, int) and value > 1 and "experts" in name
        for name, value in values.items()
    )


def _count(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for parameter in nn.ModuleList(modules).parameters())
