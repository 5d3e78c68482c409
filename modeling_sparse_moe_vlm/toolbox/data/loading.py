"""Loads data of any format as rows that the collator takes."""

from __future__ import annotations

import atexit
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List, Value
from transformers.utils import logging

from .bad_rows import ON_BAD_ROW, BadRowError, RowFault, SkippedRows
from .formats import DataFormat, find_format, recognise_format
from .sources import Part, find_parts
from .validation import validated_row

logger = logging.get_logger(__name__)

# Images are decoded when a row is read.
FEATURES = Features(
    {
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List(Image()),
    }
)


def load_rows(
    data: Any,
    format: str | None = None,
    *,
    split: str = "train",
    subset: str | None = None,
    image_root: str | Path | None = None,
    streaming: bool = False,
    on_bad_row: str = "error",
    skipped_file: str | Path | None = None,
) -> Dataset | IterableDataset:
    """
    Loads data of any supported format as rows with `messages` and `images`.

    Every row is validated, and its images are decoded once to find broken ones. With `streaming=False`, this happens
    now; otherwise, it happens when the rows are read. The returned rows contain the paths or bytes of their images,
    which are decoded again when a row is read.

    Args:
        data (`str`, `Path`, `Dataset`, `IterableDataset` or a dict of splits):
            A file (JSONL, JSON, parquet or CSV), a folder of such files or of images with `metadata.jsonl`,
            `metadata.csv` or `metadata.parquet`, the id of a dataset on the Hub, or a dataset.
        format (`str`, *optional*):
            `"messages"`, `"prompt-completion"`, `"llava"`, `"texts"`, `"vqa"` or `"captions"`. By default, the format
            is recognised by the fields of the first row, and logged.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a folder, of a dict of datasets or of a dataset of the Hub.
        subset (`str`, *optional*):
            Subset (configuration) of a dataset of the Hub.
        image_root (`str` or `Path`, *optional*):
            Folder to which paths of images are relative. By default, the folder of the file that names them.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to return an `IterableDataset`, whose shards are the files (or the shards of a streamed dataset).
        on_bad_row (`str`, *optional*, defaults to `"error"`):
            `"error"` or `"skip"`. Skipped rows are counted in a warning after the last row.
        skipped_file (`str` or `Path`, *optional*):
            JSONL file that lists the skipped rows with `source`, `row`, `kind` and `reason`. Overwritten.

    Returns:
        `Dataset` or `IterableDataset`: The rows, in order.

    Raises:
        BadRowError: If a row cannot be used and `on_bad_row="error"`. The message names file, row and reason. Rows are
            counted from 0.
        ValueError: If the format is not recognised or ambiguous, if there are no rows, or if an argument is invalid.
        FileNotFoundError: If there is no such file, folder or dataset.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"`on_bad_row` must be one of {', '.join(ON_BAD_ROW)}, but got {on_bad_row!r}.")
    parts = find_parts(data, split, subset, image_root, streaming)
    found = format_of(parts, format)
    logger.info(f"The format of the data is {found.name}.")
    if skipped_file is not None:
        Path(skipped_file).unlink(missing_ok=True)
    # `datasets` distributes the items of lists among workers and processes.
    arguments = {
        "parts": parts,
        "format_name": found.name,
        "on_bad_row": on_bad_row,
        "skipped_file": None if skipped_file is None else str(skipped_file),
    }
    if streaming:
        return IterableDataset.from_generator(_generate, features=FEATURES, gen_kwargs=arguments)
    # The rows are written to a file that is mapped into memory. It is not reused: files can change between runs.
    folder = tempfile.mkdtemp(prefix="sparse-moe-vlm-rows-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        return Dataset.from_generator(_generate, features=FEATURES, gen_kwargs=arguments, cache_dir=folder)
    except Exception as error:
        # `datasets` wraps the errors of generators.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, BadRowError):
            cause = cause.__cause__
        raise (cause or error) from None


def format_of(parts: list[Part], format: str | None) -> DataFormat:
    """
    Returns the format with a name, or the format of the first row of the data that is a dict.

    Raises:
        ValueError: If the format is unknown, not recognised or ambiguous, or if there are no rows.
    """
    if format is not None:
        found = find_format(format)
    names = [part.name for part in parts]
    where = names[0] if len(names) == 1 else f"the data ({names[0]}, …)"
    rows = itertools.chain.from_iterable(part.rows() for part in parts)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{where} has no rows.")
    if format is not None:
        return found
    fields = next((row for row in itertools.chain([first], rows) if isinstance(row, dict)), None)
    if fields is None:
        raise ValueError(f"the format of {where} is not recognised: none of its rows is a dict.")
    return recognise_format(list(fields), where)


def iterate_rows(parts: list[Part], format: DataFormat) -> Iterator[tuple[dict[str, Any], list] | BadRowError]:
    """Yields each row with the sizes of its images, or the error of a bad row."""
    for part in parts:
        for number, row in enumerate(part.rows()):
            try:
                if isinstance(row, RowFault):
                    raise row
                yield validated_row(row, format, part.image_root)
            except RowFault as fault:
                yield BadRowError(part.name, number, fault.kind, fault.reason)


def _generate(
    parts: list[Part], format_name: str, on_bad_row: str, skipped_file: str | None
) -> Iterator[dict[str, Any]]:
    skipped = SkippedRows(skipped_file)
    for item in iterate_rows(parts, find_format(format_name)):
        if not isinstance(item, BadRowError):
            yield item[0]
        elif on_bad_row == "skip":
            skipped.add(item)
        else:
            raise item
    skipped.warn()
