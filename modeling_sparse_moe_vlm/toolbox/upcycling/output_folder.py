"""The folder that an upcycled model is written to, which gets a complete model or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ...registered.staged_saves import staged_folder
from .errors import UpcyclingError
from .shard_files import check_shard_size

# If a folder has one of these files, it contains a model.
_OF_MODELS = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf")


def check_output(output: Path, source: str | os.PathLike | None = None, overwrite: bool = False) -> None:
    """
    Checks that a model may be written to a folder, which need not exist.

    Args:
        output (`Path`):
            The folder.
        source (`str` or `os.PathLike`, *optional*):
            Folder of the dense model, or its name on the Hub. The dense model is never overwritten.
        overwrite (`bool`, defaults to `False`):
            Whether another model may be replaced.

    Raises:
        UpcyclingError: If the output is not a folder, contains a model already, or is the folder of the dense model.
    """
    if output.exists() and not output.is_dir():
        raise UpcyclingError(f"{output} is a file: choose a folder for the sparse model.")
    if source is not None and Path(source).is_dir() and Path(source).resolve() == output.resolve():
        raise UpcyclingError(f"{output} is the folder of the dense model: choose another one for the sparse model.")
    found = sorted(path.name for pattern in _OF_MODELS for path in output.glob(pattern))
    if found and not overwrite:
        raise UpcyclingError(
            f"{output} already contains a model ({found[0]}): choose another folder, or replace the model with "
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
    """Raises `UpcyclingError` if a value is wrong: see [`~checkpoints.upcycle_checkpoint`] for the arguments."""
    check_dtype(dtype)
    check_shard_size(max_shard_size)
    if output is not None:
        check_output(Path(output), source, overwrite)


def check_dtype(dtype: str) -> None:
    """Raises `UpcyclingError` unless `dtype` is `"auto"` or the name of a floating-point type of at least 16 bits."""
    found = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1):
        raise UpcyclingError(f'`dtype` must be "auto" or a type of weights such as "bfloat16", got {dtype!r}.')


@contextmanager
def whole_folder(output: Path, size: int) -> Iterator[Path]:
    """
    Yields a folder to write to, whose files replace those of `output` all at once. If writing fails or the process
    ends, `output` is unchanged.

    Args:
        output (`Path`):
            See [`check_output`].
        size (`int`):
            Number of bytes that will be written.

    Yields:
        `Path`: The folder to write to.

    Raises:
        UpcyclingError: If the disk has too little free space.
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
