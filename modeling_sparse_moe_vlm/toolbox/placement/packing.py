"""Packing of weighted items into devices: in order and evenly, or apart from each other and evenly."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Item:
    """What goes onto one device as a whole: bytes, and its shares of the bytes and of each modality's load."""

    names: list[str]
    bytes: int
    shares: list[float]


@dataclass
class Bin:
    """A device with room for some bytes."""

    capacity: float
    names: list[str] = field(default_factory=list)
    bytes: int = 0
    shares: list[float] = field(default_factory=list)

    def fits(self, item: Item, limit: float = float("inf")) -> bool:
        """Whether there is room for the item, and no share would grow beyond `limit`."""
        return self.bytes + item.bytes <= self.capacity and all(
            share <= limit for share, own in zip(self.with_item(item), item.shares, strict=True) if own
        )

    def with_item(self, item: Item) -> list[float]:
        """The shares that it would have with the item."""
        return _add(self.shares or [0.0] * len(item.shares), item.shares)

    def add(self, item: Item) -> None:
        self.shares = self.with_item(item)
        self.bytes += item.bytes
        self.names += item.names


def partition(items: Sequence[Item], bins: list[Bin]) -> bool:
    """
    Adds the items to the bins, in order: each bin gets a run of them, such that the largest share of any bin is as
    small as it can be.

    Returns:
        `bool`: whether there was room; if not, the bins are as they were.
    """
    best = _fill(items, bins, float("inf"))
    if best is None:
        return False
    low, high = 0.0, max(max(full.shares, default=0.0) for full in best)
    while high - low > 1e-5:
        middle = (low + high) / 2
        filled = _fill(items, bins, middle)
        if filled is None:
            low = middle
        else:
            best, high = filled, middle
    bins[:] = best
    return True


def _fill(items: Sequence[Item], bins: Sequence[Bin], limit: float) -> list[Bin] | None:
    filled = copy.deepcopy(list(bins))
    current = 0
    for item in items:
        while current < len(filled) and not filled[current].fits(item, limit):
            current += 1
        if current == len(filled):
            return None
        filled[current].add(item)
    return filled


def spread(families: Sequence[Sequence[Item]], bins: list[Bin]) -> bool:
    """
    Adds families of items (the shards and groups of one layer) to the bins: heavy items first, each where its family
    has little yet, and where there is little altogether.

    Returns:
        `bool`: whether there was room.
    """
    for family in families:
        totals = [sum(shares) or 1.0 for shares in zip(*(item.shares for item in family), strict=True)]
        of_family = [[0.0] * len(totals) for _ in bins]
        # What a bin has when all are even, once the family is there.
        shares = zip(*(full.shares or [0.0] * len(totals) for full in bins), strict=True)
        even = [(sum(of_all) + total) / len(bins) for of_all, total in zip(shares, totals, strict=True)]
        for item in sorted(family, key=lambda item: -max(item.shares)):
            open_bins = [number for number, full in enumerate(bins) if full.fits(item)]
            if not open_bins:
                return False
            costs = {
                number: _cost(bins[number].with_item(item), _add(of_family[number], item.shares), totals, even)
                for number in open_bins
            }
            chosen = min(costs, key=costs.__getitem__)
            bins[chosen].add(item)
            of_family[chosen] = _add(of_family[chosen], item.shares)
    return True


def _cost(altogether: list[float], of_family: list[float], totals: list[float], even: list[float]) -> float:
    """How uneven a bin would be: in bytes or the busiest modality and on average, within the family and altogether."""
    own = [share / total for share, total in zip(of_family, totals, strict=True)]
    excess = [(share - mean) / total for share, mean, total in zip(altogether, even, totals, strict=True)]
    return max(own) + sum(own) / len(own) + max(excess) + sum(excess) / len(excess)


def _add(first: list[float], second: list[float]) -> list[float]:
    return [a + b for a, b in zip(first, second, strict=True)]
