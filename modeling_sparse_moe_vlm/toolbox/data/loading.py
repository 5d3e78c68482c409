"""Loads data of any format as rows that the collator takes."""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from .bad_rows import ON_BAD_ROW, BadRowError, RowFault, SkippedRows, process_number
from .formats import DataFormat, find_format, recognise_format
from .reading import FEATURES, RawRow, RowReader, Rows, raw_rows
from .row_sizes import check_limits, check_size
from .sources import Part, find_parts
from .stream import RowStream, is_text_file

logger = logging.get_logger(__name__)


def load_rows(
    data: Any,
    format: str | None = None,
    *,
    split: str = "train",
    subset: str | None = None,
    image_root: str | Path | None = None,
    streaming: bool = False,
    on_bad_row: str = "error",
    skipped_file: str | Path | SkippedRows | None = None,
    processor: ProcessorMixin | PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    max_image_tokens: int | None = None,
    max_rows: int | None = None,
) -> Dataset | IterableDataset:
    """
    Loads data of any supported format as rows with `messages`, `images`, `videos` and `references` (all right answers).
    The fields `source` and `row` name the file and the number of the row in it.

    Every row is validated. Its images and some frames of its videos are decoded once to find broken ones. With
    `streaming=False`, this happens now; otherwise, it happens when the rows are read. The returned rows contain the
    paths or bytes of their images and videos. Images are decoded again when a row is read, and videos when a batch is
    made.

    Args:
        data (`str`, `Path`, `Dataset`, `IterableDataset` or a dict of splits):
            A file (JSONL, JSON, parquet or CSV), a folder of such files or of images with `metadata.jsonl`,
            `metadata.csv` or `metadata.parquet`, a folder that `save_to_disk` of `datasets` wrote, the id of a dataset
            on the Hub, or a dataset.
        format (`str`, *optional*):
            `"messages"`, `"prompt-completion"`, `"llava"`, `"texts"`, `"vqa"` or `"captions"`. By default, the format
            is recognised by the fields of the first row, and logged.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a folder, of a dict of datasets or of a dataset of the Hub.
        subset (`str`, *optional*):
            Subset (configuration) of a dataset of the Hub.
        image_root (`str` or `Path`, *optional*):
            Folder to which paths of images and videos are relative. By default, the folder of the file that names
            them.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to return an `IterableDataset`, whose shards are the files (or the shards of a streamed dataset).
        on_bad_row (`str`, *optional*, defaults to `"error"`):
            `"error"` or `"skip"`. Skipped rows are counted in a warning after the last row.
        skipped_file (`str`, `Path` or `SkippedRows`, *optional*):
            JSONL file that lists the skipped rows with `source`, `row`, `kind` and `reason`. Overwritten. A list of
            skipped rows, which other data can share, is extended.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`, *optional*):
            Processor of the model. It processes every row in the validation, so that rows which it cannot process are
            bad rows. Needed for the limits.
        max_length (`int`, *optional*):
            Largest number of tokens in a row, image tokens included. Longer rows are bad rows; nothing is truncated.
        max_image_tokens (`int`, *optional*):
            Largest number of image tokens in a row, those of videos included. Rows with more are bad rows.
        max_rows (`int`, *optional*):
            Number of good rows after which to stop reading. By default, all rows are read. Use `take` for streams.

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
    check_limits(max_length=max_length, max_image_tokens=max_image_tokens, max_rows=max_rows)
    if processor is None and (max_length is not None or max_image_tokens is not None):
        raise ValueError("`max_length` and `max_image_tokens` need the `processor` of the model, which counts tokens.")
    parts = find_parts(data, split, subset, image_root, streaming)
    found = format_of(parts, format)
    logger.info(f"The format of the data is {found.name}.")
    check = None
    if processor is not None:
        check = partial(check_size, processor=processor, max_length=max_length, max_image_tokens=max_image_tokens)
    reader = RowReader(found.name, on_bad_row, new_skipped_rows(skipped_file), check)
    # `datasets` distributes the items of lists among workers and processes.
    arguments: dict[str, Any] = {"parts": parts, "reader": reader}
    if streaming:
        if max_rows is not None:
            raise ValueError("`max_rows` cannot be combined with `streaming=True`: call `take` of the stream.")
        rows = IterableDataset.from_generator(_generate, features=FEATURES, gen_kwargs=arguments)
        raw = IterableDataset.from_generator(_generate_raw, gen_kwargs={"parts": parts})
        atexit.register(reader.skipped.warn_of_new)  # rows that workers skipped
        return RowStream(rows, raw, reader, is_text=all(is_text_file(part.name) for part in parts))
    # The rows are written to a file that is mapped into memory. It is not reused: files can change between runs.
    arguments["max_rows"] = max_rows
    rows = generated(_generate, FEATURES, arguments, parts[0].name, reader.skipped)
    reader.skipped.warn()
    atexit.register(reader.skipped.warn_of_new)  # rows whose images broke later
    return Rows.of(rows, reader)


def new_skipped_rows(file: str | Path | SkippedRows | None) -> SkippedRows:
    """Returns the list of skipped rows, or an empty one in a file. Workers need a file: they do not share memory."""
    if isinstance(file, SkippedRows):
        return file
    if file is None:
        return SkippedRows(Path(_temporary_folder()) / "skipped.jsonl", is_temporary=True)
    if process_number() == 0:
        Path(file).unlink(missing_ok=True)
    return SkippedRows(file)


def generated(
    generate: Callable[..., Iterator[dict[str, Any]]],
    features: Features,
    arguments: dict[str, Any],
    name: str,
    skipped: SkippedRows | None,
) -> Dataset:
    """
    Writes the rows of a generator to a file that is mapped into memory.

    Args:
        generate (`Callable`):
            Function that yields the rows.
        features (`Features`):
            Columns of the rows.
        arguments (`dict[str, Any]`):
            Arguments of `generate`.
        name (`str`):
            Name of the data, for error messages.
        skipped (`SkippedRows`, *optional*):
            The rows that `generate` skips.

    Returns:
        `Dataset`: The rows.

    Raises:
        BadRowError: If `generate` raises it.
        ImportError: If no package can decode a video.
        ValueError: If there are no rows.
    """
    try:
        return Dataset.from_generator(generate, features=features, gen_kwargs=arguments, cache_dir=_temporary_folder())
    except Exception as error:
        # `datasets` wraps the errors of generators.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (BadRowError, ImportError)):
            cause = cause.__cause__
        if cause is None and "corresponds to no data" in str(error):
            summary = None if skipped is None else skipped.summary()
            raise ValueError(
                f"{name} has no rows." if summary is None else f"all rows of {name} are bad. {summary}"
            ) from None
        raise (cause or error) from None


def _temporary_folder() -> str:
    folder = tempfile.mkdtemp(prefix="sparse-moe-vlm-rows-")
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # not in a process that was forked from the one that made the folder
        shutil.rmtree(folder, ignore_errors=True)


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
    nothing = object()  # a row can be `None`
    first = next(rows, nothing)
    if first is nothing:
        raise ValueError(f"{where} has no rows.")
    if format is not None:
        return found
    fields = next((row for row in itertools.chain([first], rows) if isinstance(row, dict)), None)
    if fields is None:
        why = f" The first row: {first.reason}" if isinstance(first, RowFault) else ""
        raise ValueError(f"the format of {where} is not recognised: none of its rows is a dict.{why}")
    return recognise_format(list(fields), where)


def iterate_rows(parts: list[Part], format: DataFormat) -> Iterator[tuple[dict[str, Any], list] | BadRowError]:
    """Yields each row with the sizes of its images, or the error of a bad row."""
    for raw in raw_rows(parts):
        try:
            yield raw.validated(format)
        except BadRowError as error:
            yield error


def _generate(parts: list[Part], reader: RowReader, max_rows: int | None = None) -> Iterator[dict[str, Any]]:
    good = (row for raw in raw_rows(parts) if (row := reader.validate(raw)) is not None)
    yield from itertools.islice(good, max_rows)


def _generate_raw(parts: list[Part]) -> Iterator[dict[str, RawRow]]:
    for raw in raw_rows(parts):
        yield {"raw": raw}
