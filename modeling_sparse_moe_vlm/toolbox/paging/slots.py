"""Slots on the execution device, which are filled with experts on demand."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_all
from contextlib import contextmanager
from functools import partial

import torch

from .assignment import SlotAssignment
from .sources import ExpertSource, FileSource

# Reading releases the global interpreter lock. More threads hardly read faster from memory.
READERS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="expert-reader")


class ExpertSlots:
    """
    Slots for the experts of one module. A slot is a buffer that contains the weights of one expert. The slots serve one
    call at a time.

    Args:
        sources (`Mapping[str, ExpertSource]`):
            Source of each parameter of the experts, by name.
        dtypes (`Mapping[str, torch.dtype]`):
            Data type of each parameter in the slots, by name.
        num_slots (`int`):
            Number of slots.
        device (`torch.device`):
            Device of the slots.
        count (`Callable[[int, int, int], None]`):
            Called whenever experts are requested, with the number of hits, the number of misses, and the number of
            bytes that the misses have in their source.
    """

    def __init__(
        self,
        sources: Mapping[str, ExpertSource],
        dtypes: Mapping[str, torch.dtype],
        num_slots: int,
        device: torch.device,
        count: Callable[[int, int, int], None],
    ):
        self.sources = sources
        self.num_experts = next(iter(sources.values())).shape[0]
        self.device = device
        self.stacks = self._allocate(num_slots, dtypes)
        self.assignment = SlotAssignment(num_slots, self.num_experts)
        self.count = count
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None
        self._reads: list[Future] = []
        self._reading: Mapping[int, int] = {}
        # A GPU copies during computations. On the CPU, a second pass costs more time than the overlap saves.
        self.overlaps = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # which fills the slots with zeros
            for stack in self.stacks.values():
                stack.record_stream(self._stream)

    def _allocate(self, num_slots: int, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        return {
            name: torch.zeros(num_slots, *source.shape[1:], dtype=dtypes[name], device=self.device)
            for name, source in self.sources.items()
        }

    def __len__(self) -> int:
        return len(self.assignment)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns two tensors: the slot of every expert, `(experts + 1,)`, and the expert in every slot, `(slots,)`. An
        expert without a slot, and the sentinel at the end, have the number of slots as their entry. An empty slot has
        the entry 0; its content is not used.
        """
        if self._tables is None:
            slots = [len(self)] * (self.num_experts + 1)
            for slot, expert in enumerate(self.assignment.experts):
                if expert is not None:
                    slots[expert] = slot
            experts = [expert or 0 for expert in self.assignment.experts]
            self._tables = torch.tensor(slots, device=self.device), torch.tensor(experts, device=self.device)
        return self._tables

    def clear(self) -> None:
        """Empties the slots."""
        self._drop(self.assignment.clear())
        self._tables = None

    def plan(self, experts: Sequence[int], fixed: bool) -> Iterator[dict[int, int]]:
        """Plans the passes in which experts run, and their slots: see [`SlotAssignment.plan`]."""
        return self.assignment.plan(experts, fixed=fixed, overlaps=self.overlaps)

    def start(self, placement: Mapping[int, int]) -> None:
        """Starts to read the experts that are not yet in their slots in `placement`. `wait` waits for the reads."""
        missing = {e: slot for e, slot in placement.items() if self.assignment.experts[slot] != e}
        self.count(len(placement) - len(missing), len(missing), len(missing) * _bytes_of(self.sources.values()))
        if not missing:
            return
        self._tables = None
        for expert, slot in missing.items():
            self._drop(self.assignment.place(expert, slot))
        self._reading = missing
        with self._or_forget(missing):
            self._read(missing)

    def _read(self, placement: Mapping[int, int]) -> None:
        for expert, slot in placement.items():
            for name, source in self.sources.items():
                read = partial(self._read_one, source, expert, self.stacks[name][slot])
                if source.blocks:
                    self._reads.append(READERS.submit(read))
                else:
                    read()

    @torch.no_grad()
    def _read_one(self, source: ExpertSource, expert: int, target: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            source.read(expert, target)

    def _drop(self, experts: Sequence[int]) -> None:
        """Called with experts that have lost their slots; does nothing here."""

    def wait(self) -> None:
        """Waits for the reads that `start` has started. Computations launched from now on see the experts."""
        reading, self._reading = self._reading, {}
        with self._or_forget(reading):
            self._finish(reading)

    def _finish(self, placement: Mapping[int, int]) -> None:
        # For all of them: after an error, another read would write into a slot that has been reassigned.
        wait_for_all(self._reads)
        reads, self._reads = self._reads, []
        for read in reads:
            read.result()
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """
        Context of a computation with the slots. Reads that start later may overwrite the slots, so they wait until the
        device has finished the computation, whatever stream launches it.
        """
        try:
            yield
        finally:
            if self._stream is not None:
                stream = torch.cuda.current_stream(self.device)
                self._stream.wait_stream(stream)
                for tensor in (*self.stacks.values(), *(self._tables or ())):
                    tensor.record_stream(stream)

    @contextmanager
    def _or_forget(self, placement: Mapping[int, int]) -> Iterator[None]:
        """Removes the experts from their slots after an error: a slot that was not filled must not count as a hit."""
        try:
            yield
        except BaseException:
            wait_for_all(self._reads)
            self._reads = []
            self.assignment.forget(placement)
            self._tables = None
            raise

    @torch.no_grad()
    def rows(self, name: str, placement: Mapping[int, int], first: int, last: int) -> torch.Tensor:
        """
        Returns rows of a stack as they were in an earlier call. The rows are a copy, because the slots may contain
        other experts by now, and may be reassigned at any time.

        Args:
            name (`str`): Name of the stack.
            placement (`Mapping[int, int]`): Slots in the earlier call, by expert. Rows of other slots are zero.
            first (`int`): The first row.
            last (`int`): The last row, included.

        Returns:
            `torch.Tensor` of shape `(last - first + 1, ...)`: The rows.
        """
        stack, source = self.stacks[name], self.sources[name]
        rows = stack.new_zeros(last - first + 1, *stack.shape[1:])
        wanted = {expert: slot - first for expert, slot in placement.items() if first <= slot <= last}
        missing = [expert for expert in wanted if self.assignment.slot_of(expert) is None]
        self.count(len(wanted) - len(missing), len(missing), len(missing) * _bytes_of([source]))
        with self.computing():
            for expert, row in wanted.items():
                slot = self.assignment.slot_of(expert)
                if slot is None:
                    source.read(expert, rows[row])
                else:
                    rows[row].copy_(stack[slot])
        return rows


class MappedSlots(ExpertSlots):
    """
    Slots for experts that run on the CPU and are stored in files. The stacks are memory-mapped, so there are no buffers
    and no copies. The number of slots limits the number of experts whose pages are in memory: if an expert loses its
    slot, its pages are released. Row numbers in the stacks are the numbers of the experts.
    """

    sources: Mapping[str, FileSource]  # type: ignore[assignment]

    @staticmethod
    def serve(sources: Mapping[str, ExpertSource], dtypes: Mapping[str, torch.dtype], device: torch.device) -> bool:
        """Whether experts can be mapped: on Linux, on the CPU, and from files with the data type of the slots."""
        return (
            sys.platform == "linux"
            and device.type == "cpu"
            and all(isinstance(source, FileSource) for source in sources.values())
            and all(source.dtype == dtypes[name] for name, source in sources.items())
        )

    def _allocate(self, num_slots: int, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        return {name: source.map() for name, source in self.sources.items()}

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._tables is None:
            self._tables = torch.arange(self.num_experts + 1), torch.arange(self.num_experts)
        return self._tables

    def start(self, placement: Mapping[int, int]) -> None:
        for source in self.sources.values():
            source.check()
        super().start(placement)

    def _read(self, placement: Mapping[int, int]) -> None:
        for expert in placement:
            for source in self.sources.values():
                source.announce(expert)

    def _finish(self, placement: Mapping[int, int]) -> None:
        for expert in placement:
            for source in self.sources.values():
                source.load(expert)

    def rows(self, name: str, placement: Mapping[int, int], first: int, last: int) -> torch.Tensor:
        """Returns rows of the mapped stack without a copy: rows are experts, and are never overwritten."""
        self.start({expert: slot for expert, slot in placement.items() if first <= expert <= last})
        self.wait()
        return self.stacks[name][first : last + 1]

    def _drop(self, experts: Sequence[int]) -> None:
        for expert in experts:
            for source in self.sources.values():
                source.drop(expert)


def _bytes_of(sources: Iterable[ExpertSource]) -> int:
    """Returns the number of bytes of one expert in its sources."""
    return sum(math.prod(source.shape[1:]) * source.dtype.itemsize for source in sources)
