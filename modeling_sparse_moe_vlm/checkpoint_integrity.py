"""Files of a checkpoint: what is said of damaged ones, and that none is left that holds weights of two models."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def named_damage(folder: str | os.PathLike | None) -> Iterator[None]:
    """
    Says which file was cut off where the checkpoint of a folder cannot be read for that reason.

    Args:
        folder (`str` or `os.PathLike`, *optional*):
            The checkpoint; nothing is known of one that is no folder.

    Raises:
        OSError: If a file is shorter than its header says; the message names it and what to do.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "SafetensorError" and folder is not None and os.path.isdir(folder):
            for path in sorted(Path(folder).rglob("*.safetensors")):
                missing = _missing_bytes(path)
                if missing:
                    raise OSError(
                        f"{path} is not whole, {missing}: copy or download the file again, or save the model again."
                    ) from error
        raise


@contextmanager
def no_mixture(folder: str | os.PathLike) -> Iterator[None]:
    """
    Keeps a save that failed half-way from leaving new weights beside older ones, which would load as one checkpoint:
    their index is removed. The files themselves are written in one piece or not at all.

    Args:
        folder (`str` or `os.PathLike`):
            Where a model is saved.
    """
    before = _weights(folder)
    try:
        yield
    except BaseException:
        if _weights(folder) != before:
            for index in Path(folder).glob("*.safetensors.index*.json"):
                index.unlink(missing_ok=True)
        raise


def _weights(folder: str | os.PathLike) -> dict[str, tuple[int, int]]:
    """By name of a file with weights, what changes when it is written anew."""
    files = {path.name: path.stat() for path in Path(folder).glob("*.safetensors")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in files.items()}


def read_header(path: str | os.PathLike) -> tuple[dict[str, Any], int]:
    """
    The table of contents of a safetensors file, and the byte where its data begin: 8 bytes with the length of the
    header, the header, and the tensors that it lists.

    Raises:
        OSError: If the file is not there.
        ValueError: If it ends within its header, or the header is none.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _missing_bytes(path: Path) -> str | None:
    """What a safetensors file lacks of what its header lists."""
    size = path.stat().st_size
    try:
        header, start = read_header(path)
    except ValueError:
        return f"it has {size} bytes and no whole header"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    whole = start + max(ends, default=0)
    return None if size >= whole else f"it has {size} of {whole} bytes"
