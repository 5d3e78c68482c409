"""Where the experts of a module lie while they are paged: in host memory, or in files, read in place one by one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset

# Names that the safetensors format has for types, https://github.com/huggingface/safetensors#format.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class ExpertSource(Protocol):
    """One stacked parameter of an experts module, `(experts, ...)`, of which single experts are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: bool  # whether `read` waits for a device, so that it is worth a thread of its own

    def read(self, expert: int, slot: torch.Tensor) -> None:
        """Copies an expert into `slot`, a tensor of an expert's shape, and converts it to the slot's dtype."""


class MemorySource:
    """Experts that lie in host memory; pinned, so that copies to a GPU run beside its computations."""

    blocks = False

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype

    def read(self, expert: int, slot: torch.Tensor) -> None:
        slot.copy_(self.tensor[expert], non_blocking=True)


@dataclass(frozen=True)
class FileSource:
    """
    Experts that lie one behind the other in a file. They are read by position rather than mapped: a mapped file that
    gets shorter ends the process with a bus error, a read one raises.

    Args:
        path (`str`): The file.
        offset (`int`): Where the first expert begins, in bytes.
        shape (`tuple[int, ...]`): Shape of the stack, `(experts, ...)`.
        dtype (`torch.dtype`): Type in the file.
    """

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks = True

    def __post_init__(self):
        try:
            # Stays open, so that the experts outlive the file's name.
            object.__setattr__(self, "_file", open(self.path, "rb", buffering=0))  # noqa: SIM115
        except OSError as error:
            raise OSError(f"cannot read experts from {self.path}: {error.strerror}. Load the model again.") from error
        end = self.offset + math.prod(self.shape) * self.dtype.itemsize
        if os.fstat(self._file.fileno()).st_size < end:
            raise _truncated(self.path, end)

    def read(self, expert: int, slot: torch.Tensor) -> None:
        direct = slot.device.type == "cpu" and slot.dtype == self.dtype and slot.is_contiguous()
        buffer = slot if direct else torch.empty(self.shape[1:], dtype=self.dtype)
        view = memoryview(buffer.view(-1).view(torch.uint8).numpy())
        position = self.offset + expert * view.nbytes
        while view.nbytes:  # the system may hand over less than asked for
            count = os.preadv(self._file.fileno(), [view], position)
            if count == 0:
                raise _truncated(self.path, position + view.nbytes)
            view, position = view[count:], position + count
        if not direct:
            slot.copy_(buffer)


def _truncated(path: str, end: int) -> OSError:
    return OSError(
        f"{path} is truncated: experts are expected in it up to byte {end}, but it has {os.path.getsize(path)}"
        " bytes. Write or download the file again, then load the model again."
        if os.path.exists(path)
        else f"{path} was truncated and removed while experts were paged from it. Load the model again."
    )


def find_sources(weights: Mapping[str, Any], names: Iterable[str], pin: bool) -> dict[str, ExpertSource]:
    """
    Where offloaded parameters lie.

    Args:
        weights (`Mapping[str, torch.Tensor]`):
            The `weights_map` of an Accelerate hook: a plain mapping, or one of Accelerate's views of host memory,
            safetensors files and its own `.dat` files.
        names (`Iterable[str]`):
            Names of parameters in `weights`.
        pin (`bool`):
            Whether to pin what lies in host memory.

    Returns:
        `dict[str, ExpertSource]`: by name.

    Raises:
        OSError: If a file is gone, truncated or not what it should be.
    """
    headers: dict[str, tuple[dict[str, Any], int]] = {}
    return {name: _find_source(weights, name, pin, headers) for name in names}


def _find_source(
    weights: Mapping[str, Any], name: str, pin: bool, headers: dict[str, tuple[dict[str, Any], int]]
) -> ExpertSource:
    key = name
    while isinstance(weights, PrefixedDataset):
        weights, key = weights.dataset, f"{weights.prefix}{key}"
    if not isinstance(weights, OffloadedWeightsLoader) or key in weights.state_dict:
        in_memory: Any = getattr(weights, "state_dict", weights)
        if pin:
            in_memory[key] = in_memory[key].pin_memory()
        return MemorySource(in_memory[key])
    entry = weights.index[key]
    path = entry.get("safetensors_file")
    if path is None:
        path = os.path.join(str(weights.save_folder), f"{key}.dat")
        return FileSource(path, 0, tuple(entry["shape"]), getattr(torch, entry["dtype"]))
    if path not in headers:
        headers[path] = _read_header(path)
    header, start = headers[path]
    tensor = header.get(entry.get("weight_name", key))
    if tensor is None or tensor["dtype"] not in SAFETENSORS_DTYPES:
        found = "no such tensor" if tensor is None else f"the dtype {tensor['dtype']}, which cannot be paged"
        raise OSError(f"{path} should hold {entry.get('weight_name', key)}, but has {found}. Load the model again.")
    dtype = SAFETENSORS_DTYPES[tensor["dtype"]]
    return FileSource(path, start + tensor["data_offsets"][0], tuple(tensor["shape"]), dtype)


def _read_header(path: str) -> tuple[dict[str, Any], int]:
    """The table of contents of a safetensors file, and where its data begin."""
    try:
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(length)), 8 + length
    except ValueError as error:
        raise OSError(f"{path} is no whole safetensors file ({error}). Write or download it again.") from error
    except OSError as error:
        raise OSError(f"cannot read experts from {path}: {error.strerror}. Load the model again.") from error
