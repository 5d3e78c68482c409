"""Where the experts of a module lie while they are paged: in host memory, or in files, read in place one by one."""

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
# Of Linux, since 5.14; Python's `mmap` has no name for it.
MADV_POPULATE_READ = 22


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


class FileSource:
    """
    Experts that lie one behind the other in a file.

    Args:
        path (`str`): The file.
        offset (`int`): Where the first expert begins, in bytes.
        shape (`tuple[int, ...]`): Shape of the stack, `(experts, ...)`.
        dtype (`torch.dtype`): Type in the file.

    Raises:
        OSError: If the file is gone, or ends before the experts do, now or at a later call.
    """

    blocks = True

    def __init__(self, path: str, offset: int, shape: tuple[int, ...], dtype: torch.dtype):
        self.path, self.offset, self.shape, self.dtype = path, offset, shape, dtype
        self.expert_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._mapping: mmap.mmap | None = None
        with _explained(path):
            # Stays open: the experts may outlive the file's name.
            self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115
        self._end = offset + shape[0] * self.expert_bytes
        self.check()
        self._end = os.fstat(self._file.fileno()).st_size  # other weights may follow

    def check(self) -> None:
        """Whether all of the file is (still) there: to touch what is not, where it is mapped, ends the process."""
        size = os.fstat(self._file.fileno()).st_size
        if size < self._end:
            raise OSError(
                f"{self.path} is truncated: weights lie in it up to byte {self._end}, but it has {size} bytes. Write "
                "or download the file again, then load the model again."
            )

    def read(self, expert: int, slot: torch.Tensor) -> None:
        direct = slot.device.type == "cpu" and slot.dtype == self.dtype
        buffer = slot if direct else torch.empty(self.shape[1:], dtype=self.dtype)
        array: Any = buffer.view(-1).view(torch.uint8).numpy()
        view = memoryview(array)
        position = self.offset + expert * self.expert_bytes
        while view.nbytes:  # the system may hand over less than asked for
            self.check()
            with _explained(self.path):
                count = os.preadv(self._file.fileno(), [view], position)
            view, position = view[count:], position + count
        if not direct:
            slot.copy_(buffer)

    def map(self) -> torch.Tensor:
        """The whole stack, `(experts, ...)`, mapped into memory: what is not touched takes none."""
        self._mapping = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = math.prod(self.shape)
        return torch.frombuffer(self._mapping, dtype=self.dtype, count=count, offset=self.offset).view(self.shape)

    def announce(self, expert: int) -> None:
        """Lets the system begin to read a mapped expert."""
        self._advise(mmap.MADV_WILLNEED, *self._pages(expert))

    def load(self, expert: int) -> None:
        """Brings the pages of a mapped expert into the process's memory."""
        with _explained(self.path):
            try:
                self._advise(MADV_POPULATE_READ, *self._pages(expert))
            except OSError as error:
                # An older kernel does not know this: pages come when they are touched.
                if error.errno != errno.EINVAL:
                    raise

    def drop(self, expert: int) -> None:
        """Takes the pages of a mapped expert out of the process's memory, but for those that it shares with others."""
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
    """Says which file it was."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's
            raise OSError(f"{path} is no whole safetensors file. {error}") from error
        raise OSError(f"cannot read experts from {path}: {error.strerror}. Load the model again.") from error


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
        raise OSError(f"{path} should hold {entry.get('weight_name', key)}, but has {found}. Load the model again.")
    dtype = SAFETENSORS_DTYPES[tensor["dtype"]]
    return FileSource(path, start + tensor["data_offsets"][0], tuple(tensor["shape"]), dtype)
