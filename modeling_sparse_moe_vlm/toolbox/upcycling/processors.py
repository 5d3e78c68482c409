"""The processor of a dense model, which the upcycled model uses as well."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig
from transformers.utils import cached_file

from ..data.rows import apply_chat_template, with_images
from .errors import UpcyclingError

# A checkpoint has a processor, or else a tokenizer, if it has one of these files.
_OF_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_OF_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_processor(
    source: str | os.PathLike,
    gguf_file: str | None = None,
    config: PreTrainedConfig | None = None,
    **options: Any,
) -> Any | None:
    """
    Loads the processor of a model, or its tokenizer if it has no processor.

    Args:
        source (`str` or `os.PathLike`):
            Folder, or name on the Hub.
        gguf_file (`str`, *optional*):
            Name of the GGUF file in the source that contains the tokenizer.
        config (`PreTrainedConfig`, *optional*):
            Configuration of the dense model, if that of the source needs code that must not be run.
        options:
            Further arguments of `from_pretrained`, such as `revision`.

    Returns:
        `ProcessorMixin` or `PreTrainedTokenizerBase`: `None` if the source has neither.

    Raises:
        OSError, ValueError: If there is one, but it cannot be read.
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
    Turns conversations into inputs of a model, one batch for each.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`, *optional*):
            The model's processor or tokenizer, with a chat template.
        rows (`Sequence[dict]`):
            Conversations in the form that [`~toolbox.data.VisionLanguageCollator`] takes.

    Raises:
        UpcyclingError: If there are rows, but no processor.
        ValueError: If a row is malformed or cannot be processed. The message names the row.
    """
    if rows and processor is None:
        raise UpcyclingError("the source has no processor and no tokenizer, which make inputs of examples.")
    return [
        apply_chat_template(processor, {number: with_images(row, number)}, padding_side="right")
        for number, row in enumerate(rows)
    ]


def save_processor(processor: Any | None, folder: Path) -> None:
    """Saves a processor or tokenizer, if there is one, with its chat template."""
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
