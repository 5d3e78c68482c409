"""The folder that an upcycled model is written to: it gets a whole model, or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ...staged_saves import staged_folder
from .errors import UpcyclingError
from .shard_files import check_shard_size

# Files that a folder with a model has some of.
_OF_MODELS = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf")


def check_output(output: Path, source: str | os.PathLike | None = None, overwrite: bool = False) -> None:
    """
    Checks that a model may be written to a folder, which need not be there.

    Args:
        output (`Path`):
            The folder.
        source (`str` or `os.PathLike`, *optional*):
            Where the dense model comes from: it is never overwritten.
        overwrite (`bool`, defaults to `False`):
            Whether another model may be replaced.

    Raises:
        UpcyclingError: If it is not a folder, holds a model, or is the source's.
    """
    if output.exists() and not output.is_dir():
        raise UpcyclingError(f"{output} is a file: choose a folder for the sparse model.")
    if source is not None and Path(source).is_dir() and Path(source).resolve() == output.resolve():
        raise UpcyclingError(f"{output} is the folder of the dense model: choose another one for the sparse model.")
    found = sorted(path.name for pattern in _OF_MODELS for path in output.glob(pattern))
    if found and not overwrite:
        raise UpcyclingError(
            f"{output} holds a model already ({found[0]}): choose another folder, or replace the model with "
            "`overwrite=True` (--overwrite)."
        )


def check_files(
    output: str | os.PathLike | None,
    source: str | os.PathLike | None,
    *,
    dtype: str,
    max_shard_size: int | str,
    overwrite: bool,
) -> None:
    """Raises `UpcyclingError` unless a model can be written so: see [`~checkpoints.upcycle_checkpoint`]."""
    check_dtype(dtype)
    check_shard_size(max_shard_size)
    if output is not None:
        check_output(Path(output), source, overwrite)


def check_dtype(dtype: str) -> None:
    """Raises `UpcyclingError` unless weights can be of a type, or of that of their source (`"auto"`)."""
    found = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1):
        raise UpcyclingError(f'`dtype` must be "auto" or a type of weights such as "bfloat16", got {dtype!r}.')


@contextmanager
def whole_folder(output: Path, size: int) -> Iterator[Path]:
    """
    A folder to write into, which becomes `output` as a whole. If writing fails or the process ends, `output` is as it
    was.

    Args:
        output (`Path`):
            See [`check_output`].
        size (`int`):
            Bytes that are going to be written.

    Yields:
        `Path`: the folder to write into.

    Raises:
        UpcyclingError: If that does not fit on the disk.
    """
    made = [path for path in (output, *output.parents) if not path.exists()]
    output.mkdir(parents=True, exist_ok=True)
    try:
        free = shutil.disk_usage(output).free
        if free < size:
            raise UpcyclingError(
                f"{output} is on a disk with {free / 1e9:.1f} GB of free space, but the model needs "
                f"{size / 1e9:.1f} GB."
            )
        with staged_folder(output) as stage:
            yield stage
    except BaseException:
        for path in made:
            if not any(path.iterdir()):
                path.rmdir()
        raise
