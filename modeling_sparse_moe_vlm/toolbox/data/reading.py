"""Reads rows: validates them, decodes their images and applies the policy for bad rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from .bad_rows import BROKEN_IMAGE, BadRowError, RowFault, SkippedRows
from .formats import DataFormat, find_format
from .media_sources import check_files, check_image
from .repeated_rows import RepeatedRow
from .sources import Part
from .validation import validated_row

# Images are decoded when a row is read, and videos when a batch is made. `source` and `row` say where a row comes from.
FEATURES = Features(
    {
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List(Image()),
        # A video has `path`, `bytes` or `frames`. `fps` is the frame rate of the frames.
        "videos": List(
            {
                "path": Value("string"),
                "bytes": Value("binary"),
                "frames": List(Image(decode=False)),
                "fps": Value("float64"),
            }
        ),
        "references": List(Value("string")),
        "source": Value("string"),
        "row": Value("int64"),
    }
)
_WITHOUT_DECODING = List(Image(decode=False))


@dataclass(frozen=True)
class RawRow:
    """
    A row as its source contains it, before validation.

    Args:
        content (`Any`):
            The row. A `RowFault` says that it cannot be read.
        source (`str`):
            File or dataset of the row.
        row (`int`):
            Number of the row in its source, counted from 0.
        image_root (`str`, *optional*):
            Folder to which paths of images are relative.
    """

    content: Any
    source: str
    row: int
    image_root: str | None

    def validated(self, format: DataFormat) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        """Returns the row with undecoded images, and the sizes of the images. Raises `BadRowError`."""
        try:
            if isinstance(self.content, RowFault):
                raise self.content
            row, sizes = validated_row(self.content, format, self.image_root)
        except RowFault as fault:
            raise BadRowError(self.source, self.row, fault.kind, fault.reason) from fault.__cause__
        return row | {"source": self.source, "row": self.row}, sizes


def raw_rows(parts: list[Part]) -> Iterator[RawRow]:
    """Yields the rows of parts of the data, in order. No image is opened."""
    for part in parts:
        for number, row in enumerate(part.rows()):
            yield RawRow(row, part.name, number, part.image_root)


@dataclass
class RowReader:
    """
    Reads single rows and applies the policy for bad rows.

    Args:
        format (`str`):
            Name of the format.
        on_bad_row (`str`):
            `"error"` or `"skip"`.
        skipped (`SkippedRows`):
            Where skipped rows are counted and listed.
        check (`Callable[[dict], None]`, *optional*):
            Further validation of a row with undecoded images, which raises `RowFault`.
    """

    format: str
    on_bad_row: str
    skipped: SkippedRows
    check: Callable[[dict[str, Any]], None] | None = None

    def validate(self, raw: RawRow) -> dict[str, Any] | None:
        """Returns a row with undecoded images, or `None` if it is skipped. Raises `BadRowError`."""
        try:
            row = raw.validated(find_format(self.format))[0]
            if self.check is not None:
                self.check(row)
            return row
        except BadRowError as error:
            self.refuse(error)
        except RowFault as fault:
            self.refuse(BadRowError(raw.source, raw.row, fault.kind, fault.reason))
        return None

    def read(self, raw: RawRow) -> dict[str, Any] | None:
        """Returns a row with decoded images, or `None` if it is skipped. Raises `BadRowError`."""
        row = self.validate(raw)
        if row is None:
            return None
        try:
            return FEATURES.decode_example(FEATURES.encode_example(row))
        except Exception as error:  # each image format of Pillow raises its own types
            self.refuse(BadRowError(raw.source, raw.row, BROKEN_IMAGE, f"an image cannot be decoded: {error}"))
            return None

    def refuse(self, error: BadRowError) -> None:
        """Skips a bad row, or raises its error."""
        if self.on_bad_row != "skip":
            raise error
        self.skipped.add(error)


class Rows(Dataset):
    """
    Validated rows in a file that is mapped into memory. Images are decoded when a row is read. If an image cannot be
    read any more (it was readable when the rows were validated), the policy for bad rows applies.
    """

    reader: RowReader

    @classmethod
    def of(cls, dataset: Dataset, reader: RowReader) -> Rows:
        """Returns the rows of a dataset with `source` and `row`."""
        rows = cls(
            dataset.data,
            info=dataset.info.copy(),
            split=dataset.split,
            indices_table=dataset._indices,
            fingerprint=dataset._fingerprint,
        )
        rows.reader = reader
        return rows

    # `select`, `shuffle`, `sort`, `shard` and `filter` make their results with these two methods.

    def _new_dataset_with_indices(self, *args: Any, **kwargs: Any) -> Rows:
        return Rows.of(super()._new_dataset_with_indices(*args, **kwargs), self.reader)

    def _select_contiguous(self, *args: Any, **kwargs: Any) -> Rows:
        return Rows.of(super()._select_contiguous(*args, **kwargs), self.reader)

    def __getitem__(self, key: Any) -> Any:
        """
        Returns a row, rows or a column. Raises `BadRowError` if an image of a row cannot be read any more, or a file of
        a video is missing.
        """
        try:
            item = super().__getitem__(key)
        except Exception:
            if isinstance(key, int) and (error := self._fault_of(key)):
                raise error from None
            raise
        if isinstance(key, int) and (error := _missing_video(item)):
            raise error
        return item

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        """
        Returns rows for a batch. Rows that are skipped are missing. If all of them are skipped, returns the next row
        that can be read as a `RepeatedRow`, because a batch must not be empty.
        """
        try:
            rows = super().__getitems__(keys)
            if not any(_missing_video(row) for row in rows):
                return rows
        except Exception:
            pass  # an image cannot be read: the rows are read one by one
        rows = [row for key in keys if (row := self._readable(key)) is not None]
        for step in range(1, len(self)):
            if rows:
                break
            row = self._readable((keys[-1] + step) % len(self))
            rows = [] if row is None else [RepeatedRow(row)]
        if not rows:
            raise ValueError(f"no row of the data can be read: {self.reader.skipped.summary()}")
        return rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the rows that can be read."""
        for key in range(len(self)):
            if (row := self._readable(key)) is not None:
                yield row

    def _readable(self, key: int) -> dict[str, Any] | None:
        try:
            return self[key]
        except BadRowError as error:
            self.reader.refuse(error)
            return None

    def _fault_of(self, key: int) -> BadRowError | None:
        """Returns the fault of a row whose images cannot be read."""
        if not {"images", "source", "row"} <= set(self.column_names) or not -len(self) <= key < len(self):
            return None
        row = Dataset.__getitem__(self.with_format(None).cast_column("images", _WITHOUT_DECODING), key)
        for number, image in enumerate(row["images"]):
            try:
                check_image(image, number)
            except RowFault as fault:
                return BadRowError(row["source"], row["row"], fault.kind, fault.reason)
        return None


def _missing_video(row: Any) -> BadRowError | None:
    """Returns the fault of a row with a video whose file is missing. Videos are decoded later."""
    if not isinstance(row, Mapping) or not {"videos", "source", "row"} <= set(row):
        return None
    try:
        for number, video in enumerate(row["videos"]):
            check_files(video, number)
    except RowFault as fault:
        return BadRowError(row["source"], row["row"], fault.kind, fault.reason)
    return None
