"""Sources of data: local files and folders, datasets of the Hub, and datasets in memory or streamed."""

from __future__ import annotations

import csv
import glob
import json
import os
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)
from datasets.config import DATASET_STATE_JSON_FILENAME, DATASETDICT_JSON_FILENAME
from datasets.data_files import DataFilesDict, get_data_patterns

from .bad_rows import NOT_JSON, NOT_UTF8, RowFault
from .columns import IMAGE_FIELDS, VIDEO_FIELDS

NUM_ROWS_AT_ONCE = 16  # few, because rows can contain images
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


@dataclass(frozen=True)
class Part:
    """
    A part of the data that is read in order by one process: a file, or a shard of a dataset.

    Args:
        name (`str`):
            The path of the file, or the name of the dataset.
        dataset (`Dataset` or `IterableDataset`, *optional*):
            The dataset, if it is not a file.
        image_root (`str`, *optional*):
            Folder to which paths of images are relative.
    """

    name: str
    dataset: Dataset | IterableDataset | None = None
    image_root: str | None = None

    def rows(self) -> Iterator[Any]:
        """
        Yields the rows, with images and videos as dicts with `bytes` or `path`. A `RowFault` instead of a row says that
        the row cannot be read.
        """
        if self.dataset is not None:
            yield from _without_decoding(self.dataset)
            return
        try:
            yield from _READERS[Path(self.name).suffix.lower()](self.name)
        except Exception as error:  # each library raises its own types
            raise ValueError(f"{self.name} cannot be read: {error}") from error


def find_parts(
    data: Any,
    split: str = "train",
    subset: str | None = None,
    image_root: str | Path | None = None,
    streaming: bool = False,
) -> list[Part]:
    """
    Finds the parts of the data.

    Args:
        data (`str`, `Path`, `Dataset`, `IterableDataset` or a dict of them):
            A file (JSONL, JSON, parquet or CSV), a folder of such files or of images with `metadata.jsonl`,
            `metadata.csv` or `metadata.parquet`, a folder that `save_to_disk` of `datasets` wrote, the id of a dataset
            on the Hub, or a dataset.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a folder or of a dataset of the Hub.
        subset (`str`, *optional*):
            Subset (configuration) of a dataset of the Hub.
        image_root (`str` or `Path`, *optional*):
            Folder to which paths of images are relative. By default, the folder of the file that names them.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to stream a dataset of the Hub instead of downloading it. A dataset of `save_to_disk` then has a
            part for each of its files.

    Returns:
        `list[Part]`: The parts, in order.

    Raises:
        ValueError: If there is no such split, or if a file or folder has no data that can be read.
        FileNotFoundError: If there is no such file, folder or dataset.
    """
    root = None if image_root is None else os.fspath(image_root)
    if root is not None and not os.path.isdir(root):
        raise FileNotFoundError(f"`image_root` {root!r} is not a folder.")
    if isinstance(data, DatasetDict | IterableDatasetDict):
        data = _split_of(data, split, "the data")
    if isinstance(data, Dataset | IterableDataset):
        return _shards(data, "the dataset", root)
    if not isinstance(data, str | os.PathLike) or not os.fspath(data):
        raise ValueError(
            f"the data must be a path, the id of a dataset on the Hub, or a dataset, but got "
            f"{repr(data) if isinstance(data, str) else type(data)}."
        )
    name = os.fspath(data)
    if os.path.isfile(name):
        _check_compression(name)
        if Path(name).suffix.lower() not in _READERS:
            raise ValueError(f"{name} cannot be read as data: its name must end with one of {', '.join(_READERS)}.")
        files = [name]
    elif os.path.isdir(name):
        if _is_saved(name):
            return _saved(name, split, root or os.path.abspath(name), streaming)
        files = _files_of(name, split)
    elif Path(name).suffix.lower() in _READERS or name.count("/") > 1 or name.startswith((".", "/")):
        raise FileNotFoundError(f"there is no file or folder {name!r}.")
    else:
        try:
            loaded = load_dataset(name, subset, split=split, streaming=streaming)
        except (ConnectionError, FileNotFoundError) as error:
            message = f"there is no file or folder {name!r}, and no dataset of the Hub can be loaded: {error}"
            raise type(error)(message) from error
        return _shards(loaded, f"{name} ({split})", root)
    return [Part(file, image_root=root or os.path.dirname(os.path.abspath(file))) for file in files]


def _split_of(data: Any, split: str, name: str) -> Any:
    """Returns a split of a dict of datasets."""
    if split not in data:
        raise ValueError(f"{name} has no split {split!r}: its splits are {', '.join(data)}.")
    return data[split]


def _is_saved(folder: str) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote a folder."""
    if os.path.isfile(os.path.join(folder, DATASETDICT_JSON_FILENAME)):
        return True
    has_state = os.path.isfile(os.path.join(folder, DATASET_STATE_JSON_FILENAME))
    return has_state and any(name.endswith(".arrow") for name in os.listdir(folder))


def _saved(folder: str, split: str, image_root: str, streaming: bool) -> list[Part]:
    """Returns the parts of a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    try:
        data = load_from_disk(folder)
    except Exception as error:  # damaged and missing files raise many types
        raise ValueError(f"the dataset in {folder} (of `save_to_disk`) cannot be read: {error}") from error
    name = folder
    if isinstance(data, DatasetDict):
        data, name = _split_of(data, split, folder), f"{folder} ({split})"
    elif split != "train":
        raise ValueError(f"{folder} has no split {split!r}: it contains a single dataset, whose split is 'train'.")
    number = max(1, min(len(data.cache_files), len(data))) if streaming else 1
    if number == 1:
        return [Part(name, data, image_root)]
    return [
        Part(f"{name}, shard {i} of {number}", data.shard(num_shards=number, index=i, contiguous=True), image_root)
        for i in range(number)
    ]


def _files_of(folder: str, split: str) -> list[str]:
    """Returns the data files of a split of a folder. Files of metadata describe images and go before other files."""
    nothing = (
        f"{folder} has no data: it needs files that end with {', '.join(_READERS)}, or the files of `save_to_disk` of "
        "`datasets`."
    )
    try:
        base = glob.escape(os.path.abspath(folder))
        by_split = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    except FileNotFoundError as error:  # EmptyDatasetError is one
        raise ValueError(nothing) from error
    if split not in by_split:
        raise ValueError(f"{folder} has no split {split!r}: its splits are {', '.join(map(str, by_split))}.")
    for file in by_split[split]:
        _check_compression(file)
    files = sorted(file for file in by_split[split] if Path(file).suffix.lower() in _READERS)
    files = [file for file in files if Path(file).stem == "metadata"] or files
    if not files:
        raise ValueError(nothing)
    return files


def _check_compression(file: str) -> None:
    """Raises `ValueError` for a compressed file of data."""
    path = Path(file)
    if path.suffix.lower() in _COMPRESSED and Path(path.stem).suffix.lower() in _READERS:
        raise ValueError(f"{file} cannot be read as data, because it is compressed: decompress it.")


def _shards(dataset: Dataset | IterableDataset, name: str, image_root: str | None) -> list[Part]:
    """Returns the shards of a streamed dataset as parts, so that several workers can read them."""
    number = dataset.num_shards if isinstance(dataset, IterableDataset) else 1
    if number <= 1:
        return [Part(name, dataset, image_root)]
    return [
        Part(f"{name}, shard {i} of {number}", dataset.shard(num_shards=number, index=i), image_root)
        for i in range(number)
    ]


def _without_decoding(dataset: Dataset | IterableDataset) -> Iterator[dict[str, Any]]:
    """Yields the rows of a dataset with images and videos as dicts with `bytes` and `path`."""
    if isinstance(dataset, Dataset):
        if dataset.format["type"] == "custom":  # a transform, which makes its own rows
            yield from dataset
            return
        dataset = dataset.with_format(None).to_iterable_dataset()
    yield from _all_rows(dataset.decode(False) if dataset.features is not None else dataset)


def _all_rows(dataset: IterableDataset) -> Iterator[dict[str, Any]]:
    """Yields all rows. In a worker of a `DataLoader`, iterating over the dataset itself would yield a part of them."""
    size = 1 if dataset.features is None else NUM_ROWS_AT_ONCE  # without features, rows can have different fields
    for batch in dataset.iter(batch_size=size):
        for values in zip(*batch.values()):
            yield dict(zip(batch, values))


# `datasets` infers the types of JSON columns from the first megabytes of a file. A field that first occurs later, or
# with another type, is an error for the whole file. Here, each row has its own types, and errors name the row.


def _read_json_lines(path: str) -> Iterator[Any]:
    with open(path, "rb") as file:
        if file.read(len(BOM_UTF8)) != BOM_UTF8:
            file.seek(0)
        for line in file:
            if line.strip():
                yield _read_json_line(line)


def _read_json_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowFault(NOT_UTF8, f"the line is not UTF-8 ({error}): convert the file to UTF-8.")
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits
        return RowFault(NOT_JSON, f"the line is not valid JSON: {error}.")


def _read_json(path: str) -> Iterator[Any]:
    with open(path, encoding="utf-8-sig") as file:
        text = file.read()
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if not text.lstrip().startswith("{"):
            raise ValueError(f"it is not valid JSON: {error}.") from error
        yield from _read_json_lines(path)  # JSON lines are often called .json
        return
    del text
    if isinstance(rows, dict) and len(rows) == 1 and isinstance(next(iter(rows.values())), list):
        (rows,) = rows.values()  # such as {"data": […]}
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list):
        raise ValueError(f"it must contain a list of rows, but got {type(rows)}.")
    yield from rows


def _read_csv(path: str) -> Iterator[Any]:
    # Texts stay as they are: "7.0" is not a number, and "none" is not a missing value.
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is too small for long conversations
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = (cells for cells in csv.reader(file) if len(cells) > 1 or any(cell.strip() for cell in cells))
        columns = next(lines, [])
        for column in columns:
            if column and columns.count(column) > 1:
                raise ValueError(f"it has several columns with the name {column!r}: rename or remove all but one.")
        for number, cells in enumerate(lines):
            if any(cells[len(columns) :]):
                raise ValueError(
                    f"row {number} has {len(cells)} cells, but the first line names {len(columns)} columns. Texts with "
                    "commas need quotes."
                )
            try:
                "".join(cells).encode("utf-8")
            except UnicodeEncodeError:
                yield RowFault(NOT_UTF8, "the row is not UTF-8: convert the file to UTF-8.")
                continue
            row = dict(zip(columns, cells + [""] * (len(columns) - len(cells))))
            # An empty cell of a column of images or videos is a row without them.
            fields = (*IMAGE_FIELDS, *VIDEO_FIELDS)
            yield {key: None if value == "" and key in fields else value for key, value in row.items()}


def _read_parquet(path: str) -> Iterator[dict[str, Any]]:
    if os.path.getsize(path) > 0:
        yield from _without_decoding(
            load_dataset("parquet", data_files=glob.escape(os.path.abspath(path)), split="train", streaming=True)
        )


_READERS = {".jsonl": _read_json_lines, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv}
