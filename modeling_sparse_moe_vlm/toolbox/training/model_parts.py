"""Divides the parameters of any model into parts: the vision encoder, the connector, the experts and so on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..expert_modules import (
    base_model_of,
    ends_of,
    expert_banks,
    is_pool,
    modules_of,
    name_without_adapters,
    names_for_text,
    sparse_blocks,
    stacks,
)
from ..model_size import encoders_of

# Modules of a vision encoder that are its connector, by the name or the class of the module: Qwen-VL's patch mergers
# are part of its vision encoder, for example.
CONNECTORS = re.compile(r"merger|projector|connector|aligner|resampler", re.IGNORECASE)
OTHERS = "rest"
PARTS = ("vision_encoder", "connector", "embeddings", "attention", "experts", "routers", OTHERS)


def model_parts(model: PreTrainedModel) -> dict[str, dict[str, nn.Parameter]]:
    """
    Divides the parameters of a model into parts. Every parameter belongs to exactly one part. A parameter that several
    modules share belongs to the part of the first one.

    Args:
        model (`PreTrainedModel`):
            A model of this package, an upcycled model or any other Transformers model. It can have adapters: an adapter
            belongs to the part of the module that it adapts.

    Returns:
        `dict[str, dict[str, nn.Parameter]]`: Parameters by name, by part, in the order of the following list. Parts
        without parameters are left out.

        - `"vision_encoder"`: the encoder of images and videos.
        - `"connector"`: the modules between the encoders and the decoder.
        - `"embeddings"`: the embeddings of tokens and positions, and the language modelling head.
        - `"attention"`: the attention of the decoder, including its norms of queries and keys.
        - `"experts.<group>"`: the experts of one group. Experts without a group are the part `"experts"`.
        - `"routers"`: the routers of the experts.
        - `"rest"`: everything else: norms and dense feed-forward blocks of the decoder, encoders of other modalities,
          and the scale and the bias of a retrieval model.
    """
    rules = list(_rules(model))
    parts: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        own = name_without_adapters(name)
        part = next(part for prefix, part in rules if own.startswith(prefix))
        parts.setdefault(part, {})[name] = parameter
    return {part: parts[part] for part in sorted(parts, key=lambda part: PARTS.index(part.partition(".")[0]))}


def is_attention(name: str, module: nn.Module) -> bool:
    """Whether a module is an attention module, including linear attention."""
    return type(module).__name__.endswith("Attention") or name.endswith("attn")


def _rules(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Yields prefixes of the names of parameters, each with its part. The first prefix that matches a name counts."""
    base = base_model_of(model)
    modules = dict(modules_of(model))
    names = {module: name for name, module in modules.items()}
    encoders = encoders_of(base)
    text_encoder = base.get_encoder() if base.config.is_encoder_decoder else None
    if "image" in encoders:
        yield from _rules_of_vision(encoders["image"], text_encoder, modules, names)

    of_text = (*names_for_text(base), *([] if text_encoder is None else [f"{names[text_encoder]}."]))
    yield from _rules_of_experts(model, modules)
    ends = ends_of(model)
    in_text = {name: module for name, module in modules.items() if f"{name}.".startswith(of_text)}
    yield from ((f"{name}.", "attention") for name, module in in_text.items() if is_attention(name, module))
    for name, module in modules.items():
        if name in ends or (name in in_text and isinstance(module, nn.Embedding)):
            yield f"{name}.", "embeddings"

    yield from ((prefix, OTHERS) for prefix in of_text)
    if "audio" in encoders:
        yield f"{names[encoders['audio']]}.", OTHERS
    for module in modules.values():
        for own in getattr(module, "modality_encoders", {}).values():
            yield f"{names[own.encoder]}.", OTHERS
    # Scale and bias of a contrastive loss. Connectors also have parameters of one element, but in modules of their own.
    yield from ((name, OTHERS) for name, own in base.named_parameters(recurse=False) if own.numel() == 1)
    yield "", "connector" if encoders else OTHERS


def _rules_of_vision(
    encoder: Any,
    text_encoder: Any,
    modules: dict[str, nn.Module],
    names: dict[nn.Module, str],
) -> Iterator[tuple[str, str]]:
    """Yields the prefixes of the encoders of images and videos, and of connectors within them, each with its part."""
    for child, _ in encoder.named_children():
        name = f"{names[encoder]}.{child}".removeprefix(".")
        # Without adapters: PEFT wraps a module that trains in full.
        if CONNECTORS.search(child) or CONNECTORS.search(type(modules[name]).__name__):
            yield f"{name}.", "connector"
    if encoder is text_encoder:  # it reads text and contains the encoder of images
        encoder = encoder.get_encoder("image")
    yield f"{names[encoder]}.", "vision_encoder"
    parent = names[encoder].rpartition(".")[0]
    for module in modules[parent].children():  # a model can have a second encoder, such as one of videos
        if isinstance(module, PreTrainedModel) and module.main_input_name in ("pixel_values", "pixel_values_videos"):
            yield f"{names[module]}.", "vision_encoder"


def _rules_of_experts(model: PreTrainedModel, modules: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Yields the prefixes of experts and routers, each with its part."""
    blocks = sparse_blocks(model)
    of_blocks = tuple(f"{name}." for name in blocks)
    yield from ((f"{name}.gate.", "routers") for name in blocks)
    for bank in expert_banks(model):
        part = "experts" if bank.group is None else f"experts.{bank.group}"
        yield from ((f"{name}.", part) for name in bank.parts)
        if not bank.name.startswith(of_blocks) and not is_pool(bank.name):
            yield from _rules_of_block(bank.name, modules)
    known = {module for bank in expert_banks(model) for module in bank.parts.values()}
    for name, module in modules.items():
        if module not in known and isinstance(getattr(module, "num_experts", None), int) and stacks(module):
            yield f"{name}.", "experts"
            yield from _rules_of_block(name, modules)


def _rules_of_block(experts: str, modules: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """
    Yields the prefixes of the router and of the shared experts next to an experts module that is not of this package.
    """
    parent = experts.rpartition(".")[0]
    number = getattr(modules[experts], "num_experts", None)
    for name, parameter in modules[parent].named_parameters(recurse=False):
        if parameter.dim() and parameter.shape[0] == number:
            yield f"{parent}.{name}", "routers"
    children = dict(modules[parent].named_children())
    for name, child in children.items():
        matrices = [parameter for parameter in child.parameters() if parameter.dim() == 2 and min(parameter.shape) > 1]
        if len(matrices) == 1 and matrices[0].shape[0] == number:
            yield f"{parent}.{name}.", "routers"
    if not any(is_attention(name, child) for name, child in children.items()):  # a block, not a whole layer
        yield f"{parent}.", "experts"
