"""A budget of slots on the execution device, filled with experts on demand, over those used least recently."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch

from .assignment import SlotAssignment
from .sources import ExpertSource, FileSource

# Reading releases the interpreter's lock; more threads hardly read faster from memory.
READERS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="expert-reader")


class ExpertSlots:
    """
    Slots for the experts of one module. They serve one call at a time.

    Args:
        sources (`Mapping[str, ExpertSource]`):
            Where each parameter of the experts lies.
        dtypes (`Mapping[str, torch.dtype]`):
            The type that each parameter has in the slots.
        num_slots (`int`):
            How many experts fit.
        device (`torch.device`):
            Where the slots are.
        count (`Callable[[int, int, int], None]`):
            Is told how many experts are there when they are asked for, how many are not, and how many bytes these take
            where they lie.
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
        # A GPU copies beside its computations. For the CPU, a second pass costs more than it hides.
        self.overlaps = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _allocate(self, num_slots: int, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        return {
            name: torch.zeros(num_slots, *source.shape[1:], dtype=dtypes[name], device=self.device)
            for name, source in self.sources.items()
        }

    def __len__(self) -> int:
        return len(self.assignment)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `(experts + 1,)`, the slot of every expert (for those in none, and for sentinels, the number of slots), and
        `(slots,)`, the expert in every slot (0 for an empty one, whose content is not used).
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
        """Forgets the experts in the slots."""
        self._drop(self.assignment.clear())
        self._tables = None

    def plan(self, experts: Sequence[int], fixed: bool) -> Iterator[dict[int, int]]:
        """In what passes, and in which slots, experts are to be used: see [`SlotAssignment.plan`]."""
        return self.assignment.plan(experts, fixed=fixed, overlaps=self.overlaps)

    def start(self, placement: Mapping[int, int]) -> None:
        """Begins to read the experts that are not yet in the slots that `placement` names. `wait` ends it."""
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
        if self._stream is not None:
            # Computations that were launched before may still need what is overwritten.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
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
        """Whatever there is to do when experts have lost their slots."""

    def wait(self) -> None:
        """Waits for what was started. Computations that are launched from now on see the experts."""
        reading, self._reading = self._reading, {}
        with self._or_forget(reading):
            self._finish(reading)

    def _finish(self, placement: Mapping[int, int]) -> None:
        reads, self._reads = self._reads, []
        for read in reads:
            read.result()
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    @contextmanager
    def _or_forget(self, placement: Mapping[int, int]) -> Iterator[None]:
        """A slot that was not filled must not count as a hit later."""
        try:
            yield
        except BaseException:
            self.assignment.forget(placement)
            self._tables = None
            raise

    @torch.no_grad()
    def rows(self, name: str, placement: Mapping[int, int], first: int, last: int) -> torch.Tensor:
        """
        Rows of a stack as they were at an earlier call, in memory of their own: the slots may hold others by now, and
        may be given to others at any time.

        Args:
            name (`str`): The stack.
            placement (`Mapping[int, int]`): The slots that experts had. What was in other slots is not asked for.
            first (`int`): The first row.
            last (`int`): The last one.

        Returns:
            `torch.Tensor` of shape `(last - first + 1, ...)`.
        """
        stack, source = self.stacks[name], self.sources[name]
        rows = stack.new_zeros(last - first + 1, *stack.shape[1:])
        wanted = {expert: slot - first for expert, slot in placement.items() if first <= slot <= last}
        missing = [expert for expert in wanted if self.assignment.slot_of(expert) is None]
        self.count(len(wanted) - len(missing), len(missing), len(missing) * _bytes_of([source]))
        for expert, row in wanted.items():
            slot = self.assignment.slot_of(expert)
            if slot is None:
                source.read(expert, rows[row])
            else:
                rows[row].copy_(stack[slot])
        return rows


class MappedSlots(ExpertSlots):
    """
    Slots for experts that run on the CPU and lie in files. Nothing is copied: the whole stacks are mapped, and a slot
    is the right of an expert to have its pages in the process's memory. Ids of experts stay as they are.
    """

    sources: Mapping[str, FileSource]  # type: ignore[assignment]

    @staticmethod
    def serve(sources: Mapping[str, ExpertSource], dtypes: Mapping[str, torch.dtype], device: torch.device) -> bool:
        """Whether experts can be mapped: from files, as they are, on Linux."""
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
        """Those of the mapped stack, of which nothing is ever overwritten; a row is an expert."""
        self.start({expert: slot for expert, slot in placement.items() if first <= expert <= last})
        self.wait()
        return self.stacks[name][first : last + 1]

    def _drop(self, experts: Sequence[int]) -> None:
        for expert in experts:
            for source in self.sources.values():
                source.drop(expert)


def _bytes_of(sources: Iterable[ExpertSource]) -> int:
    """Bytes of one expert, where it lies."""
    return sum(math.prod(source.shape[1:]) * source.dtype.itemsize for source in sources)
