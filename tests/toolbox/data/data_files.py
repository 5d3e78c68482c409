"""Small data files and rows for the tests of data."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

RED, GREEN = (255, 0, 0), (0, 255, 0)


def write_image(path: Path, size: tuple[int, int] = (4, 6), color: tuple[int, int, int] = RED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return path


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def turn(role: str, *parts: str | None) -> dict:
    """A message in the form of the collator. `None` is the place of an image."""
    return {"role": role, "content": [{"type": "image"} if part is None else text(part) for part in parts]}


def plain(messages: list[dict]) -> list[dict]:
    """Messages without the keys that are `None` in the rows of a dataset."""
    return [
        message
        | {"content": [{key: value for key, value in part.items() if value is not None} for part in message["content"]]}
        for message in messages
    ]


def colors(row: dict) -> list[tuple[int, int, int]]:
    return [image.convert("RGB").getpixel((0, 0)) for image in row["images"]]
