"""A budget of slots on the execution device, filled with experts on demand, over those used least recently."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch

from .sources import ExpertSource, FileSource

# Reading releases the interpreter's lock; more threads hardly read faster from memory.
READERS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="expert-reader")


@dataclass(frozen=True)
class _SlotView:
    """A view of the stack of slots, without the memory; `turn` is what a context around may want to do first."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    turn: Any

    @property
    def last(self) -> int:
        """The offset of the last element."""
        return self.offset + sum((length - 1) * step for length, step in zip(self.size, self.stride))


class ExpertSlots:
    """
    Slots for the experts of one module.

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
        self.experts: list[int | None] = [None] * num_slots
        self.count = count
        self._slots: OrderedDict[int, int] = OrderedDict()  # by expert, the least recently used first
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None
        self._reads: list[Future] = []
        self._reading: Mapping[int, int] = {}
        # A GPU copies beside its computations. For the CPU, a second pass costs more than it hides.
        self.overlaps = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.expert_bytes = sum(math.prod(source.shape[1:]) * source.dtype.itemsize for source in sources.values())
        self._names = {stack.untyped_storage().data_ptr(): name for name, stack in self.stacks.items()}

    def _allocate(self, num_slots: int, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        return {
            name: torch.zeros(num_slots, *source.shape[1:], dtype=dtypes[name], device=self.device)
            for name, source in self.sources.items()
        }

    def __len__(self) -> int:
        return len(self.experts)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `(experts + 1,)`, the slot of every expert (for those in none, and for sentinels, the number of slots), and
        `(slots,)`, the expert in every slot (0 for an empty one, whose content is not used).
        """
        if self._tables is None:
            slots = [len(self)] * (self.num_experts + 1)
            for expert, slot in self._slots.items():
                slots[expert] = slot
            experts = [expert or 0 for expert in self.experts]
            self._tables = torch.tensor(slots, device=self.device), torch.tensor(experts, device=self.device)
        return self._tables

    def clear(self) -> None:
        """Forgets the experts in the slots."""
        for expert, slot in self._slots.items():
            self.experts[slot] = None
            self._drop(expert)
        self._slots.clear()
        self._tables = None

    def plan(self, experts: Sequence[int], fixed: bool) -> Iterator[dict[int, int]]:
        """
        In what passes, and in which slots, experts are to be used.

        Args:
            experts (`Sequence[int]`):
                The experts, in ascending order.
            fixed (`bool`):
                Whether the plan must depend on nothing but `experts`, since the same is computed again later. Otherwise
                it starts with what is in slots, and overwrites what was used least recently.

        Yields:
            `dict[int, int]`: slots by expert. Each is to be started before the next is asked for.
        """
        # With half of the slots at a time, the other half is filled meanwhile.
        half = max(1, len(self) // 2)
        if fixed:
            width = half if len(self) < self.num_experts else len(self)
            passes = groupby(experts, lambda expert: expert // width) if experts else [(0, [])]
            for number, members in passes:
                first = number * width % (len(self) // width * width)
                yield {expert: first + expert % width for expert in members}
            return
        current = {expert: self._slots[expert] for expert in experts if expert in self._slots}
        for expert in current:
            self._slots.move_to_end(expert)
        misses = [expert for expert in experts if expert not in current]
        if len(experts) <= len(self) and not (self.overlaps and current and misses):
            yield current | self._victims(misses, current)
            return
        if current:
            yield current
        while misses:
            room = len(self) - len(current)
            number = room if len(misses) <= room else min(room, half) or half
            current = self._victims(misses[:number], current if room else {})
            misses = misses[number:]
            yield current

    def _victims(self, experts: Sequence[int], spared: Mapping[int, int]) -> dict[int, int]:
        """Slots for experts: empty ones first, then those used least recently, without `spared` ones."""
        empty = [slot for slot, expert in enumerate(self.experts) if expert is None]
        slots = [slot for slot in [*empty, *self._slots.values()] if slot not in spared.values()]
        return dict(zip(experts, slots))

    def start(self, placement: Mapping[int, int]) -> None:
        """Begins to read the experts that are not yet in the slots that `placement` names. `wait` ends it."""
        missing = {expert: slot for expert, slot in placement.items() if self.experts[slot] != expert}
        self.count(len(placement) - len(missing), len(missing), len(missing) * self.expert_bytes)
        if not missing:
            return
        self._tables = None
        for expert, slot in missing.items():
            for emptied in (self.experts[slot], expert):
                if emptied is not None and emptied in self._slots:
                    self.experts[self._slots.pop(emptied)] = None
                    self._drop(emptied)
            self.experts[slot], self._slots[expert] = expert, slot
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

    def _drop(self, expert: int) -> None:
        """Whatever there is to do when an expert has lost its slot."""

    def _row(self, expert: int, slot: int) -> int:
        """Where an expert is in the stacks."""
        return slot

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
            for expert, slot in placement.items():
                self._slots.pop(expert, None)
                self.experts[slot] = None
            self._tables = None
            raise

    @contextmanager
    def saved_for_backward(self, placement: Mapping[int, int]) -> Iterator[None]:
        """
        What autograd saves of the slots inside this context is remembered as experts rather than as memory, since a
        later call may overwrite the slots, and is put back, read again where it must be, when backward asks for it.

        Args:
            placement (`Mapping[int, int]`): The slots, by expert, that are computed with.
        """
        # A context around this one, such as gradient checkpointing, keeps what is not of the slots.
        outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        pack_outer, unpack_outer = outer or (torch.Tensor.detach, lambda saved: saved)

        def pack(tensor: torch.Tensor):
            name = self._names.get(tensor.untyped_storage().data_ptr()) if tensor.device == self.device else None
            if name is None:
                return pack_outer(tensor)
            # The context around it may compute again what it did not keep, and read other experts for that: it has
            # its turn first.
            turn = pack_outer(tensor.new_empty(0))
            return _SlotView(name, tensor.size(), tensor.stride(), int(tensor.storage_offset()), turn)

        def unpack(saved):
            if not isinstance(saved, _SlotView):
                return unpack_outer(saved)
            unpack_outer(saved.turn)
            stack = self.stacks[saved.name]
            first, last = saved.offset // stack.stride(0), saved.last // stack.stride(0)
            rows = {expert: self._row(expert, slot) for expert, slot in placement.items()}
            self.start({expert: slot for expert, slot in placement.items() if first <= rows[expert] <= last})
            self.wait()
            return stack.as_strided(saved.size, saved.stride, saved.offset)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


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

    def _row(self, expert: int, slot: int) -> int:
        return expert

    def _drop(self, expert: int) -> None:
        for source in self.sources.values():
            source.drop(expert)
