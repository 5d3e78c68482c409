"""The processor of a dense model, which is the upcycled model's, too."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig
from transformers.utils import cached_file

from ..data.rows import apply_chat_template, with_images
from .errors import UpcyclingError

# Files by which a processor, or else a tokenizer, is found.
_OF_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_OF_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_processor(
    source: str | os.PathLike,
    gguf_file: str | None = None,
    config: PreTrainedConfig | None = None,
    **options: Any,
) -> Any | None:
    """
    The processor of a model, or its tokenizer where it has no processor.

    Args:
        source (`str` or `os.PathLike`):
            Folder, or name on the Hub.
        gguf_file (`str`, *optional*):
            The GGUF file in it that the tokenizer is read from.
        config (`PreTrainedConfig`, *optional*):
            The configuration of the dense model, where that of the source needs code that is not to be run.
        options:
            Further arguments of `from_pretrained`, such as `revision`.

    Returns:
        `ProcessorMixin` or `PreTrainedTokenizerBase`: `None` where the source has neither.

    Raises:
        OSError, ValueError: If it is there, but cannot be read.
    """
    if gguf_file is not None:
        return AutoTokenizer.from_pretrained(source, gguf_file=gguf_file, **options)
    given = {} if config is None else {"config": config}
    for auto_class, names in ((AutoProcessor, _OF_PROCESSORS), (AutoTokenizer, _OF_TOKENIZERS)):
        if any(_has(source, name, **options) for name in names):
            return auto_class.from_pretrained(source, **given, **options)
    return None


def batches_of(processor: Any | None, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """
    Inputs of a model, one conversation each.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`, *optional*):
            The model's processor or tokenizer, with a chat template.
        rows (`Sequence[dict]`):
            Conversations, as [`~toolbox.data.VisionLanguageCollator`] takes them.

    Raises:
        UpcyclingError: If there are rows, but no processor.
        ValueError: If a row is wrong, or cannot be processed; the message names it.
    """
    if rows and processor is None:
        raise UpcyclingError("the source has no processor and no tokenizer, which make inputs of examples.")
    return [
        apply_chat_template(processor, {number: with_images(row, number)}, padding_side="right")
        for number, row in enumerate(rows)
    ]


def save_processor(processor: Any | None, folder: Path) -> None:
    """Saves a processor or tokenizer, with its chat template; without one, nothing."""
    if processor is not None:
        processor.save_pretrained(folder)


def _has(source: str | os.PathLike, name: str, **options: Any) -> bool:
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **options,
    )
    return found is not None
