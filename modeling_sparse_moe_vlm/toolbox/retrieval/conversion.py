"""Makes a retrieval model of a vision-language model."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ...checks import check
from ...configuration_retrieval import SparseMoeVlmRetrievalConfig
from ...configuration_upcycled_retrieval import retrieval_config_class
from ...modeling_retrieval import SparseMoeVlmForImageTextRetrieval
from ...modeling_upcycled_retrieval import retrieval_model_class
from ...retrieval_config import RetrievalConfigMixin
from ..data.retrieval import retrieval_inputs

# Images of these sizes (width and height) get the same prompt if the number of image tokens is fixed.
PROBE_SIZES = ((64, 64), (96, 32), (300, 500))
# Fields of a configuration that belong to its class.
OWN_FIELDS = ("model_type", "auto_map", "architectures", "transformers_version")
# Attributes of configurations that are not saved.
IMPLEMENTATIONS = ("_attn_implementation_internal", "_experts_implementation_internal")


def to_retrieval(
    model: PreTrainedModel, processor: ProcessorMixin | PreTrainedTokenizerBase, **fields: Any
) -> PreTrainedModel:
    """
    Makes a retrieval model of a trained model. It has the same modules, without the language head, and a new learned
    scale. The weights are shared: training one model changes both.

    Args:
        model (`PreTrainedModel`):
            A [`SparseMoeVlmForConditionalGeneration`], or any upcycled model.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Its processor. The prompt for an image that is given only as `pixel_values` comes from its chat template.
        fields (`Any`):
            Fields of the head, such as `pooling` and `contrastive_loss`: see [`SparseMoeVlmRetrievalConfig`].

    Returns:
        `PreTrainedModel`: The retrieval model, in the mode of the given model.

    Raises:
        ValueError: If the model is of another type, or if a field is invalid.
    """
    check(
        isinstance(model, PreTrainedModel),
        f"`to_retrieval` needs a model of Transformers, but got {type(model).__name__}. Merge adapters into it first.",
    )
    config_class, model_class = _classes_for(model.config)
    if "image_prompt_ids" not in fields:
        prompt = image_prompt(processor)
        reads_images = not isinstance(processor, PreTrainedTokenizerBase)
        if reads_images and config_class is SparseMoeVlmRetrievalConfig:
            num_tokens = (prompt or []).count(model.config.image_token_id)
            # The number of tokens depends on the size of images that have several tiles or native sizes.
            is_fixed = model.config.image_sizing == "fixed" and num_tokens == model.config.image_seq_length
            prompt = prompt if is_fixed else []
        fields["image_prompt_ids"] = prompt
    config = with_head(config_class, model.config, fields)
    with no_init_weights():  # the trained weights stay as they are
        made = model_class(config, model.base_model)
    initial = {"logit_scale": config.initial_logit_scale, "logit_bias": config.logit_bias_init_value}
    for name, parameter in list(made.named_parameters(recurse=False)):
        value = torch.full_like(parameter, initial[name], device=model.device, dtype=model.dtype)
        made.register_parameter(name, torch.nn.Parameter(value))
    made.training = model.training
    return made


def _classes_for(config: PreTrainedConfig) -> tuple[Any, Any]:
    """Returns the classes of the configuration and the model for retrieval."""
    if config.model_type == SparseMoeVlmRetrievalConfig.tower_model_type:
        return SparseMoeVlmRetrievalConfig, SparseMoeVlmForImageTextRetrieval
    check(
        hasattr(config, "base_model_type") and not hasattr(config, "pooling"),
        f"`to_retrieval` needs a model of type {SparseMoeVlmRetrievalConfig.tower_model_type!r} or an upcycled model, "
        f"but got one of type {config.model_type!r}. Upcycle dense models with `upcycle` first.",
    )
    base: Any = CONFIG_MAPPING[config.base_model_type]  # type: ignore[attr-defined]
    return retrieval_config_class(base), retrieval_model_class(base)


def with_head(config_class: Any, config: PreTrainedConfig, fields: dict[str, Any]) -> Any:
    """
    Returns a configuration with the fields of a head. It has the same sub-configurations, as the same objects.

    Args:
        config_class (`type`):
            Class of the configuration with a head.
        config (`PreTrainedConfig`):
            Configuration without a head.
        fields (`dict[str, Any]`):
            Fields of the head.

    Returns:
        `PreTrainedConfig`: The configuration.
    """
    values = {name: value for name, value in config.to_dict().items() if name not in OWN_FIELDS}
    shared = {name: getattr(config, name) for name in (*config.sub_configs, "experts_config") if name in values}
    chosen = [{name: getattr(part, name, None) for name in IMPLEMENTATIONS} for part in (config, *shared.values())]
    made = config_class(**values | shared, **fields)
    # A new configuration resets the implementations of attention and experts of its sub-configurations.
    for part, implementations in zip((made, *shared.values()), chosen, strict=True):
        for name, implementation in implementations.items():
            setattr(part, name, implementation)
    return made


def without_head(config: PreTrainedConfig) -> Any:
    """
    Returns the configuration of the model that a retrieval model was made from.

    Args:
        config (`PreTrainedConfig`):
            Configuration of a retrieval model.

    Returns:
        `PreTrainedConfig`: A new configuration, without the fields of the head.
    """
    kinds = type(config).__mro__
    start = next(i for i, kind in enumerate(kinds) if kind is RetrievalConfigMixin)
    tower: Any = kinds[start + 1]
    of_head = {field.name for field in fields(RetrievalConfigMixin)}
    values = {name: value for name, value in config.to_dict().items() if name not in {*OWN_FIELDS, *of_head}}
    return tower.from_dict(values)


def image_prompt(processor: ProcessorMixin | PreTrainedTokenizerBase) -> list[int] | None:
    """
    Returns the token ids of the prompt for one image.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor of a model, with a chat template.

    Returns:
        `list[int]`, *optional*: The ids, or `None` if they depend on the size of the image or if the processor takes no
        images.
    """
    if isinstance(processor, PreTrainedTokenizerBase):
        return None
    prompts = [retrieval_inputs(processor, [Image.new("RGB", size)])["input_ids"][0].tolist() for size in PROBE_SIZES]
    return prompts[0] if all(prompt == prompts[0] for prompt in prompts) else None
