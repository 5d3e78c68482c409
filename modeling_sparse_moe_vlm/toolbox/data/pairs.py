"""Loads images with captions, hard negatives and identities of images, for retrieval."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from ...checks import shown
from ...control_tokens import check_encodable
from .bad_rows import (
    EMPTY_ANSWER,
    MISSING_FIELD,
    ON_BAD_ROW,
    TYPED_IMAGE_TOKEN,
    WRONG_TYPE,
    BadRowError,
    RowFault,
    SkippedRows,
)
from .columns import without_nan
from .loading import generated, new_skipped_rows
from .media_sources import check_image, image_source
from .reading import raw_rows
from .retrieval import CAPTION_COLUMNS, row_images
from .sources import Part, find_parts
from .validation import IMAGE_TOKENS

FEATURES = Features(
    {
        "images": List(Image()),
        "captions": List(Value("string")),
        "negatives": List({"text": Value("string"), "image": Image()}),
        "image_id": Value("string"),
        "source": Value("string"),
        "row": Value("int64"),
    }
)


def load_pairs(
    data: Any,
    *,
    split: str = "train",
    subset: str | None = None,
    image_root: str | Path | None = None,
    on_bad_row: str = "error",
    skipped_file: str | Path | SkippedRows | None = None,
) -> Dataset:
    """
    Loads images with captions for retrieval. Every row is validated, and its images are decoded once.

    Args:
        data (`str`, `Path`, `Dataset` or a dict of splits):
            The data, as [`~toolbox.data.load_rows`] takes it. Its rows have an image (`image`, `images`, `file_name` or
            `file_names`), captions (`captions` or `references`, each a list, or `caption` or `text`), and optionally
            `negatives` (a list of hard negatives: strings are captions, and dicts with `image` are images) and
            `image_id` (the same for rows with the same image).
        split (`str`, *optional*, defaults to `"train"`):
            Split of a folder, of a dict of datasets or of a dataset of the Hub.
        subset (`str`, *optional*):
            Subset (configuration) of a dataset of the Hub.
        image_root (`str` or `Path`, *optional*):
            Folder to which paths of images are relative. By default, the folder of the file that names them.
        on_bad_row (`str`, *optional*, defaults to `"error"`):
            `"error"` or `"skip"`. Skipped rows are counted in a warning after the last row.
        skipped_file (`str`, `Path` or `SkippedRows`, *optional*):
            JSONL file that lists the skipped rows with `source`, `row`, `kind` and `reason`. Overwritten. A list of
            skipped rows, which other data can share, is extended.

    Returns:
        `Dataset`: Rows with `images`, `captions`, `negatives`, `image_id`, `source` and `row`, as
        [`~toolbox.data.RetrievalCollator`] and [`~toolbox.evaluation.evaluate_retrieval`] take them. Images are decoded
        when a row is read.

    Raises:
        BadRowError: If a row cannot be used and `on_bad_row="error"`. The message names file, row and reason.
        ValueError: If there are no rows, or if an argument is invalid.
        FileNotFoundError: If there is no such file, folder or dataset.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"`on_bad_row` must be one of {', '.join(ON_BAD_ROW)}, but got {on_bad_row!r}.")
    parts = find_parts(data, split, subset, image_root)
    listed = new_skipped_rows(skipped_file)
    skipped = listed if on_bad_row == "skip" else None
    rows = pairs_of(parts, skipped)
    if skipped is not None:
        skipped.warn()
    return rows


def pairs_of(parts: list[Part], skipped: SkippedRows | None) -> Dataset:
    """
    Loads the rows of parts of the data, see [`load_pairs`].

    Args:
        parts (`list[Part]`):
            The parts.
        skipped (`SkippedRows`, *optional*):
            Where bad rows are counted and listed. Without it, they are an error.

    Returns:
        `Dataset`: The rows.

    Raises:
        BadRowError: If a row cannot be used and there is no `skipped`.
        ValueError: If no row can be used.
    """
    return generated(_generate, FEATURES, {"parts": parts, "skipped": skipped}, parts[0].name, skipped)


def _generate(parts: list[Part], skipped: SkippedRows | None) -> Iterator[dict[str, Any]]:
    for raw in raw_rows(parts):
        try:
            yield validated_pair(raw.content, raw.image_root) | {"source": raw.source, "row": raw.row}
        except RowFault as fault:
            error = BadRowError(raw.source, raw.row, fault.kind, fault.reason)
            if skipped is None:
                raise error from fault
            skipped.add(error)


def validated_pair(row: Any, image_root: str | Path | None = None) -> dict[str, Any]:
    """
    Validates a row with an image and captions.

    Args:
        row (`Any`):
            The row.
        image_root (`str` or `Path`, *optional*):
            Folder to which paths of images are relative.

    Returns:
        `dict[str, Any]`: The row with `images`, `captions`, `negatives` and `image_id`.

    Raises:
        RowFault: If the row cannot be used. The images are decoded once to find out.
    """
    if isinstance(row, RowFault):
        raise row
    if not isinstance(row, Mapping):
        raise RowFault(WRONG_TYPE, f"the row must be a dict, but got {shown(row)}.")
    row = without_nan(row)
    images = row_images(row)
    if not images:
        raise RowFault(MISSING_FIELD, f"the row has no image: its fields are {list(row)}.")
    field = next((field for field in CAPTION_COLUMNS if row.get(field)), None)
    if field is None:
        raise RowFault(MISSING_FIELD, f"the row has no caption: its fields are {list(row)}.")
    captions = row[field] if isinstance(row[field], list | tuple) else [row[field]]
    negatives = row.get("negatives") or []
    if not isinstance(negatives, list | tuple):
        raise RowFault(WRONG_TYPE, f"`negatives` must be a list of texts or images, but got {shown(negatives)}.")
    image_id = row.get("image_id")
    return {
        "images": [_source(image, i, image_root) for i, image in enumerate(images)],
        "captions": [_caption(caption, f"{field}[{i}]") for i, caption in enumerate(captions)],
        "negatives": [_negative(item, f"negatives[{i}]", i, image_root) for i, item in enumerate(negatives)],
        "image_id": None if image_id is None else str(image_id),
    }


def _negative(item: Any, name: str, number: int, image_root: str | Path | None) -> dict[str, Any]:
    if isinstance(item, Mapping) and item.get("text") is not None:
        item = item["text"]
    if isinstance(item, str):
        return {"text": _caption(item, name), "image": None}
    image = item["image"] if isinstance(item, Mapping) and "image" in item else item
    try:
        return {"text": None, "image": _source(image, number, image_root)}
    except RowFault as fault:
        raise RowFault(fault.kind, fault.reason.replace(f"images[{number}]", name, 1)) from fault


def _source(image: Any, number: int, image_root: str | Path | None) -> Any:
    source = image_source(image, f"images[{number}]", image_root)
    check_image(source, number)
    return source


def _caption(caption: Any, name: str) -> str:
    if not isinstance(caption, str):
        raise RowFault(WRONG_TYPE, f"`{name}` must be a string, but got {shown(caption)}.")
    if not caption.strip():
        raise RowFault(EMPTY_ANSWER, f"the caption in `{name}` is empty: give a text, or drop the row.")
    try:
        check_encodable(caption, name)
    except ValueError as error:
        raise RowFault(WRONG_TYPE, str(error)) from None
    if found := [token for token in IMAGE_TOKENS if token in caption]:
        raise RowFault(TYPED_IMAGE_TOKEN, f"`{name}` contains the image token {found[0]!r}: remove it.")
    return caption
