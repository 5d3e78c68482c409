"""Assigns experts to slots, and replaces the least recently used expert first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby


class SlotAssignment:
    """
    The assignment of the experts of a module to its slots.

    Args:
        num_slots (`int`): Number of slots. Each contains at most one expert.
        num_experts (`int`): Number of experts.
    """

    def __init__(self, num_slots: int, num_experts: int):
        self.num_experts = num_experts
        self.experts: list[int | None] = [None] * num_slots  # by slot
        self._slots: OrderedDict[int, int] = OrderedDict()  # by expert, the least recently used first

    def __len__(self) -> int:
        return len(self.experts)

    def slot_of(self, expert: int) -> int | None:
        """Returns the slot of an expert, or `None` if it is not in a slot."""
        return self._slots.get(expert)

    def place(self, expert: int, slot: int) -> list[int]:
        """
        Assigns a slot to an expert. Returns the experts that lose their slot: the previous expert in this slot, and
        the expert itself if it was in another slot.
        """
        lost = [other for other in (self.experts[slot], expert) if other is not None and other in self._slots]
        self.forget(lost)
        self.experts[slot], self._slots[expert] = expert, slot
        return lost

    def forget(self, experts: Iterable[int]) -> None:
        """Removes experts from their slots."""
        for expert in experts:
            slot = self._slots.pop(expert, None)
            if slot is not None:
                self.experts[slot] = None

    def clear(self) -> list[int]:
        """Empties all slots. Returns the experts that were in them."""
        lost = list(self._slots)
        self.forget(lost)
        return lost

    def plan(self, experts: Sequence[int], *, fixed: bool, overlaps: bool) -> Iterator[dict[int, int]]:
        """
        Plans the passes in which experts run, and their slots in each pass.

        Args:
            experts (`Sequence[int]`):
                The experts, in ascending order.
            fixed (`bool`):
                Whether the plan must depend only on `experts`, because the same passes are computed again later.
                Otherwise, the plan starts with the experts that are already in slots, and replaces the least recently
                used experts.
            overlaps (`bool`):
                Whether experts can be read during computations, which makes a separate pass for them worthwhile.

        Yields:
            `dict[int, int]`: Slots of the experts of a pass, by expert. The caller must assign them with `place` before
            it requests the next pass.
        """
        # While one half of the slots is used, the other half is filled.
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
        """Chooses slots for experts: empty slots first, then the least recently used, but none of those in `spared`."""
        empty = [slot for slot, expert in enumerate(self.experts) if expert is None]
        slots = [slot for slot in [*empty, *self._slots.values()] if slot not in spared.values()]
        return dict(zip(experts, slots))
