"""Descriptions of models for model cards, made from their configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from ...configuration_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmTextConfig
from ...retrieval_config import RetrievalConfigMixin
from ..expert_modules import our_experts_config
from ..model_size import model_size
from ..retrieval.conversion import without_head
from ..upcycling.costs import costs_of, costs_table
from ..upcycling.native import dense_config
from ..upcycling.receipt import ParityReceipt
from .parents import link_to
from .sections import memory_rows

IMAGE_TEXT, CAUSAL_LM = AutoModelForImageTextToText.__name__, AutoModelForCausalLM.__name__
CLASSIFICATION = AutoModelForSequenceClassification.__name__
# By the auto class that loads a model, the task that the Hub lists it under; earlier ones are preferred.
TASKS = {
    IMAGE_TEXT: "image-text-to-text",
    CAUSAL_LM: "text-generation",
    AutoModelForMultimodalLM.__name__: "any-to-any",
    CLASSIFICATION: "text-classification",
    AutoModel.__name__: None,
}
OUR_TYPES = {SparseMoeVlmConfig.model_type: IMAGE_TEXT, SparseMoeVlmTextConfig.model_type: CAUSAL_LM}


@dataclass(frozen=True)
class Description:
    """
    The parts of a model card that describe a model.

    Args:
        text (`str`): Short description of the model.
        facts (`str`): Tables in Markdown of its size and its experts.
        auto_class (`str`): Name of the class of Transformers that loads the model.
        tags (`list[str]`): Tags of the card.
        needs_code (`bool`): Whether the model is loaded with the code in its repository.
        reads_images (`bool`): Whether the model reads images.
        origin (`str`, *optional*): How the model was made from others, in addition to the short description.
        variables (`dict[str, Any]`): Further variables for the template.
    """

    text: str
    facts: str
    auto_class: str
    tags: list[str]
    needs_code: bool
    reads_images: bool
    origin: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)


def describe(
    config: PreTrainedConfig,
    parents: Sequence[str],
    start: Mapping[str, Any],
    whole: PreTrainedConfig | None = None,
) -> Description:
    """
    Describes a model of this package, an upcycled model, or any other model of Transformers.

    Args:
        config (`PreTrainedConfig`):
            Configuration of the model.
        parents (`Sequence[str]`):
            The models that it was made from. Of a model from parts: the language model, then the vision encoder.
        start (`Mapping[str, Any]`):
            The start of its experts, as in `experts_config.start`; empty if the model was not upcycled.
        whole (`PreTrainedConfig`, *optional*):
            Configuration of the model with the head whose size is described, if `config` does not contain its head.
    """
    model_type = config.model_type
    whole = config if whole is None else whole
    if isinstance(config, RetrievalConfigMixin):
        tower = describe(without_head(config), parents, start, config)
        task, inputs = "text retrieval", "texts"
        if tower.reads_images:
            task, inputs = "image-text retrieval", "texts, images, and texts with images"
        return replace(
            tower,
            text=f"{tower.text} This model has a head for {task} (`{model_type}`): it embeds {inputs}.",
            auto_class=AutoModel.__name__,
            tags=[*tower.tags, *["image-text-retrieval"] * tower.reads_images, "sentence-transformers"],
        )
    if config.model_type in OUR_TYPES:
        return _ours(config, whole, parents, start)
    experts = our_experts_config(config)
    if experts is not None:
        return _upcycled(config, whole, experts, parents, start)
    return _of_transformers(config, parents, start)


def _ours(config: Any, whole: Any, parents: Sequence[str], start: Mapping[str, Any]) -> Description:
    text_config, auto_class = config.get_text_config(), OUR_TYPES[config.model_type]
    has_images = auto_class == IMAGE_TEXT
    modalities = text_config.modalities if has_images else ["text"]
    active = {modality: f"{whole.num_active_parameters(modality):,}" for modality in modalities}
    variables = {
        "vision_model_type": config.vision_config.model_type if has_images else None,
        "num_parameters": f"{whole.num_parameters():,}",
        "active_parameters": active,
        "expert_groups": _groups(text_config),
        "num_experts_per_tok": text_config.num_experts_per_tok,
    }
    rows = {
        "parameters": variables["num_parameters"],
        **{f"active per {modality} token": number for modality, number in active.items()},
        "expert groups": variables["expert_groups"],
        "routed experts per token": variables["num_experts_per_tok"],
        **_routing_rows(text_config),
        **memory_rows(whole.num_parameters()),
    }
    kind, parts, experts = "language model", "a decoder", "experts"
    if has_images:
        kind = "vision-language model"
        parts = f"a vision tower (`{variables['vision_model_type']}`), a connector, and a decoder"
        experts = "experts for the modalities of the tokens"
    return Description(
        text=f"A sparse mixture-of-experts {kind} (`{config.model_type}`): {parts} whose feed-forward blocks are "
        f"{experts}.",
        facts=_table(rows),
        auto_class=auto_class,
        tags=["moe", *(["vision-language"] if has_images else []), *(["upcycled"] if start else []), "custom_code"],
        needs_code=True,
        reads_images=has_images,
        origin=_origin_of_parts(parents, start) if start else None,
        variables=variables,
    )


def _origin_of_parts(parents: Sequence[str], start: Mapping[str, Any]) -> str:
    language_model = f"the language model {link_to(parents[0])}" if any(parents[:1]) else "a dense language model"
    text = f"The decoder was made from {language_model} by upcycling: its feed-forward blocks became experts."
    if any(parents[1:]):
        text += f" The vision tower is that of {link_to(parents[1])}. The connector between them started at random."
    return "\n\n".join([text, _start_and_parity(start)])


def _upcycled(config: Any, whole: Any, experts: Any, parents: Sequence[str], start: Mapping[str, Any]) -> Description:
    costs = costs_table({"dense": costs_of(dense_config(config)), "sparse": costs_of(whole)})
    rows = {
        "start": describe_start(start),
        "groups": _groups(experts),
        "routed experts per token": experts.num_experts_per_tok,
        **_routing_rows(experts),
    }
    named = tuple(f".{name}" for name in config.architectures or [])
    classes = [name for name, place in config.auto_map.items() if not named or place.endswith(named)]
    auto_class = next(name for name in TASKS if name in classes)
    reads_images = _reads_images(config, auto_class)
    text = (
        f"A sparse mixture of experts, made from {_dense(parents)} by upcycling: its feed-forward blocks became "
        f"experts, and everything else is the dense model's own, including the "
        f"{'processor' if reads_images else 'tokenizer'}."
    )
    if auto_class == CLASSIFICATION:
        text += f" A layer for sequence classification (`num_labels={config.num_labels}`) replaces the language head."
    return Description(
        text=text,
        facts="\n\n".join([costs, _table(rows, "experts")]),
        auto_class=auto_class,
        tags=["moe", "upcycled", "custom_code"],
        needs_code=True,
        reads_images=reads_images,
        origin=_parity(start),
    )


def _of_transformers(config: PreTrainedConfig, parents: Sequence[str], start: Mapping[str, Any]) -> Description:
    name, auto_class = _classes_of(config)
    size = model_size(config)
    rows = {"parameters": f"{size.total:,}"} | {
        f"active per {modality} token": f"{number:,}" for modality, number in size.active.items()
    }
    rows |= memory_rows(size.total)
    text = f"A `{name}`, which is a class of Transformers."
    if start:
        text = f"A sparse mixture of experts, made from {_dense(parents)} by upcycling and saved as a `{name}`."
    return Description(
        text=text,
        facts=_table(rows),
        auto_class=auto_class,
        tags=["moe", "upcycled"] if start else [],
        needs_code=False,
        reads_images=_reads_images(config, auto_class),
        origin=_start_and_parity(start) if start else None,
    )


def _reads_images(config: PreTrainedConfig, auto_class: str) -> bool:
    """Whether a model reads images. Models with other heads than for generation do if they have a vision tower."""
    if auto_class in (CLASSIFICATION, AutoModel.__name__):
        return getattr(config, "vision_config", None) is not None
    return auto_class != CAUSAL_LM


def _classes_of(config: PreTrainedConfig) -> tuple[str, str]:
    """The class of a model of Transformers, and the auto class that loads it (or the class itself)."""
    named = config.architectures or []
    auto_classes: tuple[Any, ...] = tuple(getattr(transformers, name) for name in TASKS)
    for auto_class in auto_classes:
        found = auto_class._model_mapping.get(type(config), ())
        for model_class in found if isinstance(found, tuple) else (found,):
            if not named or model_class.__name__ == named[0]:
                return model_class.__name__, auto_class.__name__
    return named[0], named[0]


def _dense(parents: Sequence[str]) -> str:
    return f"the dense model {link_to(parents[0])}" if any(parents[:1]) else "a dense model"


def _start_and_parity(start: Mapping[str, Any]) -> str:
    lines = [f"Start of the experts: {describe_start(start)}.", _parity(start)]
    return "\n\n".join(line for line in lines if line is not None)


def _parity(start: Mapping[str, Any]) -> str | None:
    parity = start.get("parity")
    return None if parity is None else f"Before any training: {ParityReceipt(**parity)}."


def describe_start(start: Mapping[str, Any]) -> str:
    """Describes the start of experts in words, without the figures that were measured."""
    details = {name: value for name, value in start.items() if name in ("granularity", "drop_ratio", "pool_start")}
    details = {name: value for name, value in details.items() if value != 1} | {
        "router rows": start["router_init"],
        "seed": start["seed"],
    }
    return f"{start['name']} ({', '.join(f'{name} {value}' for name, value in details.items())})"


def _groups(experts: Any) -> str:
    return ", ".join(
        f"{group['name']} ({group['num_experts']} × {group['intermediate_size']}"
        f"{', always on' if group['always_on'] else ''})"
        for group in experts.expert_groups
    )


def _routing_rows(experts: Any) -> dict[str, str]:
    """Returns the rows of the table about the router, the sparse layers and the expert pools."""
    by_modality = experts.num_experts_per_tok_by_modality or {}
    rows = {f"routed experts per {modality} token": str(number) for modality, number in by_modality.items()}
    rows |= {"router": experts.router, "sparse layers": f"{len(experts.sparse_layers)} of {experts.num_hidden_layers}"}
    if experts.pools:
        rows["expert pools"] = ", ".join(
            f"{pool} (layers {', '.join(map(str, of))})" for pool, of in experts.pools.items()
        )
    return rows


def _table(rows: Mapping[str, Any], title: str = "") -> str:
    return "\n".join([f"| {title} | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
