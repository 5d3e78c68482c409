"""Loads the model of the web page, its processor and its adapters from folders or from the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedModel

from ...checks import check
from ..expert_lora import load_adapter, load_expert_lora
from ..expert_modules import base_model_of
from ..training.models import from_checkpoint
from .recording import decoder_of
from .settings import NO_ADAPTER


def load_model(path: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Any]:
    """
    Loads a model on the accelerator, if there is one, with eager attention, which returns its attention matrices.

    Args:
        path (`str`):
            Folder of a vision-language model or a language model, or its name on the Hub.
        trust_remote_code (`bool`, defaults to `False`):
            Whether to run the code that comes with the checkpoint.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin or PreTrainedTokenizerBase]`: the processor of a vision-language model,
        or the tokenizer of a language model.
    """
    model, processor = from_checkpoint(path, trust_remote_code, language_models=True)
    read_attention_matrices(model.eval())
    device = torch.accelerator.current_accelerator()
    return model if device is None else model.to(device), processor


def read_attention_matrices(model: PreTrainedModel) -> None:
    """
    Switches the decoder to eager attention, if it supports this. The vision tower keeps its implementation, which needs
    less memory.
    """
    decoder = decoder_of(model)
    if isinstance(decoder, PreTrainedModel):
        decoder.set_attn_implementation("eager")


def load_adapters(model: PreTrainedModel, paths: Mapping[str, str]) -> Any:
    """
    Loads LoRA adapters onto a model.

    Args:
        model (`PreTrainedModel`):
            The model.
        paths (`Mapping[str, str]`):
            Path to a folder, or name on the Hub, by the name of the adapter.

    Returns:
        `PreTrainedModel` or `PeftModel`: The model with the adapters.

    Raises:
        OSError: If a file of an adapter is missing or damaged; the message names it.
        ValueError: If an adapter does not fit the model; the message names it.
    """
    adapted: Any = model
    for name, path in paths.items():
        adapted = (load_expert_lora if _is_of_experts(path) else load_adapter)(adapted, path, name)
    return adapted


def _is_of_experts(path: str) -> bool:
    """Returns whether an adapter names `target_parameters`, as adapters of experts do."""
    try:
        return bool(getattr(PeftConfig.from_pretrained(path), "target_parameters", None))
    except (ValueError, TypeError):
        return False  # a damaged file, which is reported when the adapter is loaded


def parse_adapters(options: Sequence[str]) -> dict[str, str]:
    """
    Parses the values of `--adapter NAME=PATH`.

    Args:
        options (`Sequence[str]`):
            The values.

    Returns:
        `dict[str, str]`: Paths by name.

    Raises:
        ValueError: If a value is not of that form, a name has other characters than letters, digits, `_` and `-`, or
            two adapters have the same name.
    """
    paths: dict[str, str] = {}
    for option in options:
        name, equals, path = option.partition("=")
        check(bool(name and equals and path), f"--adapter: {option!r} must be NAME=PATH, such as spanish=adapters/es.")
        check(
            name != NO_ADAPTER and re.fullmatch(r"[\w-]+", name) is not None,
            f"--adapter: {name!r} cannot be a name: use letters, digits, '_' and '-', and not {NO_ADAPTER!r}.",
        )
        check(name not in paths, f"--adapter: there are two adapters named {name!r}: give each its own name.")
        paths[name] = os.path.expanduser(path)
    return paths


def max_length(model: Any) -> int | None:
    """Returns the maximum number of tokens of a model, or `None` if its configuration does not contain it."""
    length = getattr(base_model_of(model).config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
