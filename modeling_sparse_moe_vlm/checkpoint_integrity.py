"""Files of a checkpoint: whether they are whole, and what is said of them where they are not."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ADVICE = "copy or download the file again, or save the model again."

# Bits of one element, by the format's name of the type (https://github.com/huggingface/safetensors#format).
_DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@contextmanager
def named_damage(checkpoint: str | os.PathLike | None, subfolder: str = "") -> Iterator[None]:
    """
    Names the damaged file where a checkpoint cannot be loaded because of one.

    Args:
        checkpoint (`str` or `os.PathLike`, *optional*):
            The checkpoint. Only folders are looked into.
        subfolder (`str`, *optional*):
            The folder in it that has the weights.

    Raises:
        OSError: If loading failed and a file is damaged or missing; the message names the file and what to do.
    """
    try:
        yield
    except Exception as error:
        if checkpoint is not None and os.path.isdir(checkpoint):
            folder = Path(checkpoint, subfolder)
            try:
                for index in sorted(folder.glob("*.safetensors.index*.json")):
                    weight_map = read_index(index)
                    check_weights((folder / name for name in set(weight_map.values())), weight_map)
                check_weights(sorted(folder.glob("*.safetensors")))
            except OSError as damage:
                raise damage from error
        raise


def check_weights(files: Iterable[str | os.PathLike], weight_map: Mapping[str, str] | None = None) -> None:
    """
    Checks that files of weights are whole, and hold what their index says. Only their headers are read.

    Args:
        files (`Iterable[str or os.PathLike]`):
            The files; those of other formats than safetensors are not looked into.
        weight_map (`Mapping[str, str]`, *optional*):
            The index: the file's name by tensor.

    Raises:
        OSError: If a file is damaged or missing, or lacks a tensor; the message names it and what to do.
    """
    for path in (Path(file) for file in files if os.fspath(file).endswith(".safetensors")):
        try:
            header, start = read_header(path)
        except FileNotFoundError as error:
            raise OSError(f"{path} is missing: {ADVICE}") from error
        size, whole = (
            path.stat().st_size,
            start + max((entry["data_offsets"][1] for entry in header.values()), default=0),
        )
        if size < whole:
            raise OSError(f"{path} is not whole, it has {size} of {whole} bytes: {ADVICE}")
        if size > whole:
            raise OSError(f"{path} is damaged, it has {size} bytes where its header lists {whole}: {ADVICE}")
        for name, file in (weight_map or {}).items():
            if file == path.name and name not in header:
                raise OSError(f"{path} lacks the tensor {name!r}, which lies in it according to the index: {ADVICE}")


def check_names(files: Iterable[str | os.PathLike], expected: Collection[str]) -> None:
    """
    Checks that no tensor seems to be missing only because a bit of its name has flipped: the library would warn, and
    initialise it.

    Args:
        files (`Iterable[str or os.PathLike]`):
            The files of a checkpoint, in the safetensors format.
        expected (`Collection[str]`):
            Names of the tensors that the model has on disk.

    Raises:
        OSError: If a name that is not expected differs in a single bit from one that is missing; the message names the
            file and what to do.
    """
    names = {path: list(read_header(path)[0]) for path in files}
    missing = set(expected).difference(*names.values())
    unexpected = [(path, name) for path in names for name in names[path] if name not in expected]
    for path, name in unexpected:
        for place, bit in itertools.product(range(len(name)), range(7)):
            flipped = chr(ord(name[place]) ^ 1 << bit)
            meant = name[:place] + flipped + name[place + 1 :]
            # Two digits may also be two layers, unless nothing else is wrong.
            if meant in missing and (len(unexpected) == 1 or not (name[place] + flipped).isdigit()):
                raise OSError(f"{path} is damaged, it has the tensor {name!r} instead of {meant!r}: {ADVICE}")


def read_index(path: str | os.PathLike) -> dict[str, str]:
    """
    The index of a checkpoint in several files: by name of a tensor, the file that holds it.

    Args:
        path (`str` or `os.PathLike`):
            The index, a JSON file.

    Raises:
        OSError: If the file is missing or damaged; the message names it and what to do.
    """
    try:
        weight_map = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("it does not give a file for every tensor")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{path} is damaged, it is not the index of a checkpoint ({error!r}): {ADVICE}") from error
    return weight_map


def read_header(path: str | os.PathLike) -> tuple[dict[str, Any], int]:
    """
    The table of contents of a safetensors file, and the byte where its data begin: 8 bytes with the length of the
    header, the header, and the tensors that it lists, one behind the other.

    Args:
        path (`str` or `os.PathLike`):
            The file.

    Returns:
        `tuple[dict[str, Any], int]`: by name of a tensor, its `dtype`, `shape` and `data_offsets`.

    Raises:
        FileNotFoundError: If the file is missing.
        OSError: If it ends within its header, or the header is damaged; the message names the file and what to do.
            That the tensors are there is not looked at.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:  # read only then: a damaged length may be any
            raise OSError(f"{path} is not whole, it has {size} bytes and no whole header: {ADVICE}")
        content = file.read(length)
    try:
        header = json.loads(content)
        _check_header(header)
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} is damaged, its header cannot be read ({error}): {ADVICE}") from error
    header.pop("__metadata__", None)
    return header, 8 + length


def _check_header(header: Any) -> None:
    """Raises `ValueError` unless a header describes tensors that lie one behind the other."""
    if not isinstance(header, dict):
        raise ValueError("it is not a table of tensors")
    metadata = header.get("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise ValueError("its metadata are not strings")
    places = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not (isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= entry.keys()):
            raise ValueError(f"it does not describe the tensor {name!r}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (isinstance(dtype, str) and dtype in _DTYPE_BITS):
            raise ValueError(f"the tensor {name!r} has the unknown dtype {dtype!r}")
        if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
            raise ValueError(f"the tensor {name!r} has the shape {shape!r} and the offsets {offsets!r}")
        if 8 * (offsets[1] - offsets[0]) != math.prod(shape) * _DTYPE_BITS[dtype]:
            raise ValueError(f"the tensor {name!r} of shape {shape} and dtype {dtype} does not fit in bytes {offsets}")
        places.append((*offsets, name))
    end = 0
    for begin, stop, name in sorted(places):
        if begin != end:
            raise ValueError(f"the tensor {name!r} begins at byte {begin} instead of {end}")
        end = stop


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
