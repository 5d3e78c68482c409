"""Reads all data once, without a model, and reports what is in it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .bad_rows import BadRowError, SkippedRows
from .loading import format_of, iterate_rows
from .sources import find_parts

NUM_SHOWN = 10  # bad rows


@dataclass
class DataReport:
    """
    What is in the data.

    Args:
        format (`str`):
            Name of the format.
        sources (`int`):
            Number of files, or of shards of a dataset.
        rows (`int`):
            Number of rows, bad rows included.
        images_per_row (`Counter[int]`):
            Number of good rows by number of images.
        turns_per_row (`Counter[int]`):
            Number of good rows by number of messages.
        smallest_image (`tuple[int, int]`, *optional*):
            Width and height of the image with the fewest pixels.
        largest_image (`tuple[int, int]`, *optional*):
            Width and height of the image with the most pixels.
        bad_rows (`Counter[str]`):
            Number of bad rows by kind of fault.
        examples (`list[str]`):
            The first bad rows, with file, row and reason.
        videos_per_row (`Counter[int]`):
            Number of good rows by number of videos.
    """

    format: str
    sources: int
    rows: int = 0
    images_per_row: Counter[int] = field(default_factory=Counter)
    turns_per_row: Counter[int] = field(default_factory=Counter)
    smallest_image: tuple[int, int] | None = None
    largest_image: tuple[int, int] | None = None
    bad_rows: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    videos_per_row: Counter[int] = field(default_factory=Counter)

    def add(self, item: tuple[dict[str, Any], list[tuple[int, int]]] | BadRowError) -> None:
        """Counts a row, or a bad row."""
        self.rows += 1
        if isinstance(item, BadRowError):
            self.bad_rows[item.kind] += 1
            if len(self.examples) < NUM_SHOWN:
                self.examples.append(str(item))
            return
        row, sizes = item
        self.images_per_row[len(sizes)] += 1
        self.videos_per_row[len(row["videos"])] += 1
        self.turns_per_row[len(row["messages"])] += 1
        for size in sizes:
            pixels = size[0] * size[1]
            if self.smallest_image is None or pixels < self.smallest_image[0] * self.smallest_image[1]:
                self.smallest_image = size
            if self.largest_image is None or pixels > self.largest_image[0] * self.largest_image[1]:
                self.largest_image = size

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as a dict that can be written as JSON. It counts videos if there are any."""
        videos = {}
        if self._has_videos():
            videos["videos_per_row"] = {str(n): self.videos_per_row[n] for n in sorted(self.videos_per_row)}
        return {
            "format": self.format,
            "sources": self.sources,
            "rows": self.rows,
            "images_per_row": {str(number): self.images_per_row[number] for number in sorted(self.images_per_row)},
            **videos,
            "turns_per_row": {str(number): self.turns_per_row[number] for number in sorted(self.turns_per_row)},
            "smallest_image": None if self.smallest_image is None else list(self.smallest_image),
            "largest_image": None if self.largest_image is None else list(self.largest_image),
            "bad_rows": {kind: self.bad_rows[kind] for kind in sorted(self.bad_rows)},
            "examples": self.examples,
        }

    def __str__(self) -> str:
        num_bad = self.bad_rows.total()
        lines = [
            f"format: {self.format}",
            f"rows: {self.rows} ({self.rows - num_bad} good, {num_bad} bad)",
            f"images per row: {_histogram(self.images_per_row)}",
            f"turns per row: {_histogram(self.turns_per_row)}",
        ]
        if self._has_videos():
            lines.insert(3, f"videos per row: {_histogram(self.videos_per_row)}")
        if self.smallest_image is not None and self.largest_image is not None:
            (width, height), (largest_width, largest_height) = self.smallest_image, self.largest_image
            lines.append(f"image sizes: {width}×{height} to {largest_width}×{largest_height} pixels")
        lines += [f"bad rows: {self.bad_rows[kind]} × {kind}" for kind in sorted(self.bad_rows)]
        lines += [f"  {example}" for example in self.examples]
        if num_bad > len(self.examples):
            lines.append(f"  … and {num_bad - len(self.examples)} more")
        return "\n".join(lines)

    def _has_videos(self) -> bool:
        return any(number > 0 for number in self.videos_per_row)


def check_data(
    data: Any,
    format: str | None = None,
    *,
    split: str = "train",
    subset: str | None = None,
    image_root: str | Path | None = None,
    bad_rows_file: str | Path | None = None,
    progress: bool = False,
) -> DataReport:
    """
    Reads all data once, without a model, and reports what is in it. Bad rows are counted and not raised.

    Args:
        data (`str`, `Path`, `Dataset`, `IterableDataset` or a dict of splits):
            The data, as [`~toolbox.data.load_rows`] takes it.
        format (`str`, *optional*):
            Name of the format. Recognised by default.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a folder, of a dict of datasets or of a dataset of the Hub.
        subset (`str`, *optional*):
            Subset (configuration) of a dataset of the Hub.
        image_root (`str` or `Path`, *optional*):
            Folder to which paths of images are relative.
        bad_rows_file (`str` or `Path`, *optional*):
            JSONL file that lists all bad rows. Overwritten.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show the progress on stderr.

    Returns:
        `DataReport`: The report.

    Raises:
        ValueError: If the format is not recognised or ambiguous, or if there are no rows.
        FileNotFoundError: If there is no such file, folder or dataset.
    """
    parts = find_parts(data, split, subset, image_root)
    found = format_of(parts, format)
    if bad_rows_file is not None:
        Path(bad_rows_file).unlink(missing_ok=True)
    listed = SkippedRows(bad_rows_file)
    report = DataReport(found.name, len(parts))
    for item in tqdm(iterate_rows(parts, found), desc="checking", unit=" rows", disable=not progress):
        report.add(item)
        if isinstance(item, BadRowError):
            listed.add(item)
    return report


def _histogram(counts: Counter[int]) -> str:
    """Returns a histogram as a text, such as `0: 3 rows, 1: 97 rows`."""
    texts = [f"{number}: {counts[number]} row{'s' * (counts[number] != 1)}" for number in sorted(counts)]
    return ", ".join(texts) or "–"
