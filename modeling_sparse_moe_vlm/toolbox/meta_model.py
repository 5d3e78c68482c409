"""Builds models without weights from their configuration."""

from __future__ import annotations

import copy

import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)

from .installed_code import register


def model_on_meta_device(
    config_or_model: PreTrainedConfig | PreTrainedModel, dtype: torch.dtype | str | None = None
) -> PreTrainedModel:
    """
    Builds a model on the meta device, where tensors have shapes but no memory.

    Args:
        config_or_model (`PreTrainedConfig` or `PreTrainedModel`):
            Configuration of any Transformers model, or a model. A model is returned unchanged if `dtype` is `None`.
        dtype (`torch.dtype` or `str`, *optional*):
            Data type of the weights, such as `"bfloat16"`.

    Returns:
        `PreTrainedModel`: A model of the class that the configuration names in `architectures`. Otherwise, the first
        auto class that knows the configuration chooses the class, in the order image-text-to-text, causal LM, base.

    Raises:
        ValueError: If no auto class knows the configuration, or `dtype` is not a data type for weights.
    """
    if isinstance(config_or_model, nn.Module):
        if dtype is None:
            return config_or_model
        config_or_model = config_or_model.config
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(f'`dtype` must be a type of weights such as "bfloat16" or "float32", got {dtype!r}.')
    register(type(config_or_model))
    options = {} if dtype is None else {"dtype": dtype}
    architectures = getattr(config_or_model, "architectures", None)
    models = []
    with torch.device("meta"), initialization.no_init_weights():
        for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel):
            config = copy.deepcopy(config_or_model)
            try:
                model = auto_class.from_config(config, trust_remote_code=True, **options)
            except ValueError as error:
                if "Unrecognized configuration class" in str(error):
                    continue
                raise
            if type(model).__name__ in (architectures or [type(model).__name__]):
                return model
            models.append(model)
        named = [getattr(transformers, name, None) for name in architectures or []]
        if not models and named and named[0] is not None:  # some decoders of larger models have no auto class
            models.append(named[0]._from_config(copy.deepcopy(config_or_model), **options))
    if not models:
        raise ValueError(f"no auto class of Transformers knows a configuration of type {type(config).__name__}.")
    return models[0]
