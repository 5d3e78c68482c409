"""Which expert has which slot, and whose slot the next one gets: that of the expert used least recently."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby


class SlotAssignment:
    """
    Args:
        num_slots (`int`): How many experts have a slot at once.
        num_experts (`int`): How many there are.
    """

    def __init__(self, num_slots: int, num_experts: int):
        self.num_experts = num_experts
        self.experts: list[int | None] = [None] * num_slots  # by slot
        self._slots: OrderedDict[int, int] = OrderedDict()  # by expert, the least recently used first

    def __len__(self) -> int:
        return len(self.experts)

    def slot_of(self, expert: int) -> int | None:
        return self._slots.get(expert)

    def place(self, expert: int, slot: int) -> list[int]:
        """Gives an expert a slot. Returns the experts that lost theirs for it: who had it, and itself elsewhere."""
        lost = [other for other in (self.experts[slot], expert) if other is not None and other in self._slots]
        self.forget(lost)
        self.experts[slot], self._slots[expert] = expert, slot
        return lost

    def forget(self, experts: Iterable[int]) -> None:
        """Takes experts out of their slots."""
        for expert in experts:
            slot = self._slots.pop(expert, None)
            if slot is not None:
                self.experts[slot] = None

    def clear(self) -> list[int]:
        """Empties all slots. Returns the experts that lost theirs."""
        lost = list(self._slots)
        self.forget(lost)
        return lost

    def plan(self, experts: Sequence[int], *, fixed: bool, overlaps: bool) -> Iterator[dict[int, int]]:
        """
        In what passes, and in which slots, experts are to be used.

        Args:
            experts (`Sequence[int]`):
                The experts, in ascending order.
            fixed (`bool`):
                Whether the plan must depend on nothing but `experts`, since the same is computed again later. Otherwise
                it starts with what is in slots, and overwrites what was used least recently.
            overlaps (`bool`):
                Whether reading runs beside computations, so that it is worth a pass of its own.

        Yields:
            `dict[int, int]`: slots by expert. Each is to be placed before the next is asked for.
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
        if len(experts) <= len(self) and not (overlaps and current and misses):
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
