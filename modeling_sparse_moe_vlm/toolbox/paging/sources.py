"""Sources of paged experts: host memory, or files from which experts are read one by one."""

from __future__ import annotations

import errno
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset

from ...checkpoint_integrity import read_header

# Names of data types in the safetensors format, https://github.com/huggingface/safetensors#format.
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
# Available since Linux 5.14. Python's `mmap` has no name for it.
MADV_POPULATE_READ = 22


class ExpertSource(Protocol):
    """A stacked parameter of an experts module, `(experts, ...)`, from which single experts can be read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: bool  # whether `read` waits for a storage device and should run in its own thread

    def read(self, expert: int, slot: torch.Tensor) -> None:
        """Copies an expert into `slot`, a tensor of an expert's shape, and converts it to the slot's dtype."""


class MemorySource:
    """Experts in host memory. If it is pinned, copies to a GPU run during computations."""

    blocks = False

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype

    def read(self, expert: int, slot: torch.Tensor) -> None:
        slot.copy_(self.tensor[expert], non_blocking=True)


class FileSource:
    """
    Experts that are stored contiguously in a file.

    Args:
        path (`str`): Path to the file.
        offset (`int`): Position of the first expert in the file, in bytes.
        shape (`tuple[int, ...]`): Shape of the stack, `(experts, ...)`.
        dtype (`torch.dtype`): Data type in the file.

    Raises:
        OSError: If the file is missing or too short for the experts, now or in a later call.
    """

    blocks = True

    def __init__(self, path: str, offset: int, shape: tuple[int, ...], dtype: torch.dtype):
        self.path, self.offset, self.shape, self.dtype = path, offset, shape, dtype
        self.expert_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._mapping: mmap.mmap | None = None
        with _explained(path):
            # The file stays open, because the experts may be needed after the file is deleted.
            self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115
        self._end = offset + shape[0] * self.expert_bytes
        self.check()
        self._end = os.fstat(self._file.fileno()).st_size  # other weights may follow the experts

    def check(self) -> None:
        """Checks that the file is still complete. Accessing a missing part of a mapped file would kill the process."""
        size = os.fstat(self._file.fileno()).st_size
        if size < self._end:
            raise OSError(
                f"{self.path} is truncated: it must contain weights up to byte {self._end}, but it has {size} bytes. "
                "Write or download the file again, then load the model again."
            )

    def read(self, expert: int, slot: torch.Tensor) -> None:
        direct = slot.device.type == "cpu" and slot.dtype == self.dtype
        # A copy from pinned memory to a GPU overlaps with computations. Torch keeps the memory until the copy is done.
        pinned = slot.device.type == "cuda"
        buffer = slot if direct else torch.empty(self.shape[1:], dtype=self.dtype, pin_memory=pinned)
        array: Any = buffer.view(-1).view(torch.uint8).numpy()
        view = memoryview(array)
        position = self.offset + expert * self.expert_bytes
        while view.nbytes:  # the system may return fewer bytes than requested
            self.check()
            with _explained(self.path):
                count = os.preadv(self._file.fileno(), [view], position)
            view, position = view[count:], position + count
        if not direct:
            slot.copy_(buffer, non_blocking=pinned)

    def map(self) -> torch.Tensor:
        """Returns the whole stack, `(experts, ...)`, memory-mapped: experts that are not accessed take no memory."""
        self._mapping = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = math.prod(self.shape)
        return torch.frombuffer(self._mapping, dtype=self.dtype, count=count, offset=self.offset).view(self.shape)

    def announce(self, expert: int) -> None:
        """Tells the system to start reading a mapped expert."""
        self._advise(mmap.MADV_WILLNEED, *self._pages(expert))

    def load(self, expert: int) -> None:
        """Loads the pages of a mapped expert into the process's memory."""
        with _explained(self.path):
            try:
                self._advise(MADV_POPULATE_READ, *self._pages(expert))
            except OSError as error:
                # Older kernels do not support this; pages are then loaded when they are accessed.
                if error.errno != errno.EINVAL:
                    raise

    def drop(self, expert: int) -> None:
        """Releases the pages of a mapped expert, except those that it shares with other experts."""
        first, last = self._pages(expert)
        if last - first > 2 * mmap.PAGESIZE:
            self._advise(mmap.MADV_DONTNEED, first + mmap.PAGESIZE, last - mmap.PAGESIZE)

    def _advise(self, advice: int, first: int, last: int) -> None:
        assert self._mapping is not None
        self._mapping.madvise(advice, first, last - first)

    def _pages(self, expert: int) -> tuple[int, int]:
        begin = self.offset + expert * self.expert_bytes
        end = begin + self.expert_bytes
        return begin // mmap.PAGESIZE * mmap.PAGESIZE, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Adds the path of the file to errors."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not an error of the operating system
            raise OSError(f"{path} is not a complete safetensors file. {error}") from error
        raise OSError(f"cannot read experts from {path}: {error.strerror}. Load the model again.") from error


def find_sources(weights: Mapping[str, Any], names: Iterable[str], pin: bool) -> dict[str, ExpertSource]:
    """
    Finds the sources of offloaded parameters.

    Args:
        weights (`Mapping[str, torch.Tensor]`):
            The `weights_map` of an Accelerate hook: a plain mapping, or one of Accelerate's views of host memory,
            safetensors files and its own `.dat` files.
        names (`Iterable[str]`):
            Names of parameters in `weights`.
        pin (`bool`):
            Whether to pin parameters in host memory.

    Returns:
        `dict[str, ExpertSource]`: Sources by name of the parameter.

    Raises:
        OSError: If a file is missing or truncated, or does not contain the expected tensor.
    """
    headers: dict[str, tuple[dict[str, Any], int]] = {}
    return {name: _find_source(weights, name, pin, headers) for name in names}


def _find_source(weights: Any, name: str, pin: bool, headers: dict[str, tuple[dict[str, Any], int]]) -> ExpertSource:
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
        with _explained(path):
            headers[path] = read_header(path)
    header, start = headers[path]
    tensor = header.get(entry.get("weight_name", key))
    if tensor is None or tensor["dtype"] not in SAFETENSORS_DTYPES:
        found = "no such tensor" if tensor is None else f"the dtype {tensor['dtype']}, which cannot be paged"
        raise OSError(f"{path} should contain {entry.get('weight_name', key)}, but has {found}. Load the model again.")
    dtype = SAFETENSORS_DTYPES[tensor["dtype"]]
    return FileSource(path, start + tensor["data_offsets"][0], tuple(tensor["shape"]), dtype)
