"""LoRA on the language model of models without experts: on its attention and feed-forward blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...checks import check
from ..expert_modules import base_model_of, decoder_name, ends_of, expert_banks, layers_of_modules, modules_of
from ..model_size import encoders_of
from .full_modules import connector_modules
from .selection import ROUTER_NAMES, expert_lora_config

# Arguments of `expert_lora_config` that choose experts.
_OF_EXPERTS = ("groups", "modalities", "experts", "projections", "expert_ranks", "routers")


def decoder_lora_config(
    model: PreTrainedModel,
    *,
    layers: Collection[int] | None = None,
    attention: bool = True,
    feed_forward: bool = True,
    connector: bool = False,
    r: int = 8,
    **options: Any,
) -> LoraConfig:
    """
    Makes the PEFT configuration for LoRA on the language model of a model without experts, such as LLaVA. The vision
    encoder, the connector, the embeddings and the head get no adapters, but the connector can train in full. The
    configuration contains full module names, so no other module gets an adapter. Names such as `"q_proj"` would also
    match the vision encoder.

    Args:
        model (`PreTrainedModel`):
            A vision-language model or a language model of Transformers without experts.
        layers (`Collection[int]`, *optional*):
            Indices of the layers to adapt. By default, all layers.
        attention (`bool`, *optional*, defaults to `True`):
            Whether to adapt the linear layers of the attention.
        feed_forward (`bool`, *optional*, defaults to `True`):
            Whether to adapt the other linear layers: those of the feed-forward blocks.
        connector (`bool`, *optional*, defaults to `False`):
            Whether to train the connector in full and save it with the adapter.
        r (`int`, *optional*, defaults to 8):
            Rank of the adapters.
        options:
            Additional arguments of `peft.LoraConfig`, such as `lora_alpha`, `lora_dropout` or `use_dora`.

    Returns:
        `LoraConfig`: The configuration.

    Raises:
        ValueError: If the model has experts, if it does not have one of the layers or a connector, or if nothing would
            get an adapter.
    """
    model = base_model_of(model)
    check(
        not expert_banks(model),
        f"{type(model).__name__} has experts: use `expert_lora_config`, which also adapts attention "
        "(`attention=True`).",
    )
    number = model.config.get_text_config(decoder=True).num_hidden_layers
    beyond = [layer for layer in layers or () if not 0 <= layer < number]
    check(layers is None or len(layers) > 0, "`layers` is empty: leave it out for all of them.")
    check(not beyond, f"`layers` names {beyond}, but the model has layers 0 to {number - 1}.")
    layer_of = layers_of_modules(model)
    targets = [
        name
        for name, is_attention in _linear_layers(model)
        if (attention if is_attention else feed_forward) and (layers is None or layer_of[name] in layers)
    ]
    check(bool(targets), "nothing gets an adapter: set `attention` or `feed_forward` to `True`.")
    in_full = connector_modules(model) if connector else None
    return LoraConfig(r=r, target_modules=targets, modules_to_save=in_full, **options)


def lora_config_of(model: PreTrainedModel, lora: Mapping[str, Any]) -> LoraConfig:
    """
    Makes the PEFT configuration of a recipe, for models with and without experts. In models without experts, the
    feed-forward blocks get adapters instead of experts.

    Args:
        model (`PreTrainedModel`):
            The model.
        lora (`Mapping[str, Any]`):
            The section `lora` of the recipe: arguments of [`~toolbox.expert_lora.expert_lora_config`].

    Returns:
        `LoraConfig`: The configuration.

    Raises:
        ValueError: As [`~toolbox.expert_lora.expert_lora_config`] and [`decoder_lora_config`] do, and if the section
            chooses experts, but the model has none.
    """
    if expert_banks(base_model_of(model)):
        return expert_lora_config(model, **lora)
    arguments = dict(lora)
    without = arguments.get("experts") is not None and not arguments["experts"]
    for name in _OF_EXPERTS:
        value = arguments.pop(name, None)
        check(
            value is None or value is False or (name == "experts" and without),
            f"`lora.{name}` chooses experts, but {type(model).__name__} has none: leave it out. Its feed-forward "
            "blocks get adapters instead, unless `lora.experts` is `[]`.",
        )
    arguments.setdefault("attention", False)
    return decoder_lora_config(model, feed_forward=not without, **arguments)


def _linear_layers(model: PreTrainedModel) -> list[tuple[str, bool]]:
    """Returns the names of the linear layers in the layers of the decoder, and whether they belong to attention."""
    decoder = decoder_name(model)
    prefix = f"{decoder}." if decoder else ""
    modules = dict(modules_of(model))
    encoders = list(encoders_of(model).values())
    others = [*ends_of(model), *(name for name, module in modules.items() if module in encoders)]
    found = []
    for name, module in modules.items():
        parts = name.removeprefix(prefix).split(".")
        is_router = parts[-1] in ROUTER_NAMES and hasattr(modules[name.rpartition(".")[0]], "experts")
        if (
            isinstance(module, nn.Linear | Conv1D)
            and name.startswith(prefix)
            and any(part.isdigit() for part in parts)
            and not any(f"{name}.".startswith(f"{other}.") for other in others)
            and not is_router
        ):
            found.append((name, any("attn" in part or "attention" in part for part in parts)))
    return found
