"""Packs weighted items into devices evenly: in order, or with related items on different devices."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Item:
    """
    Parts that go to one device together.

    Args:
        names (`list[str]`): Names of the parts.
        bytes (`int`): Number of bytes.
        shares (`list[float]`): Share of all bytes, followed by the share of each modality's load.
    """

    names: list[str]
    bytes: int
    shares: list[float]


@dataclass
class Bin:
    """
    A device that is filled with items.

    Args:
        capacity (`float`): Number of bytes that fit.
        names (`list[str]`): Names of the parts on the device.
        bytes (`int`): Number of their bytes.
        shares (`list[float]`): Sums of the shares of the items, as in [`Item`]. Empty without items.
    """

    capacity: float
    names: list[str] = field(default_factory=list)
    bytes: int = 0
    shares: list[float] = field(default_factory=list)

    def fits(self, item: Item, limit: float = float("inf")) -> bool:
        """Whether the item fits, and none of its shares would raise a share of the device above `limit`."""
        return self.bytes + item.bytes <= self.capacity and all(
            share <= limit for share, own in zip(self.with_item(item), item.shares, strict=True) if own
        )

    def with_item(self, item: Item) -> list[float]:
        """Returns the shares that the device would have with the item."""
        return _add(self.shares or [0.0] * len(item.shares), item.shares)

    def add(self, item: Item) -> None:
        """Adds an item."""
        self.shares = self.with_item(item)
        self.bytes += item.bytes
        self.names += item.names


def partition(items: Sequence[Item], bins: list[Bin]) -> bool:
    """
    Adds the items to the bins in order. Each bin gets consecutive items, such that the largest share of any bin is as
    small as possible.

    Args:
        items (`Sequence[Item]`): The items.
        bins (`list[Bin]`): The devices, in order; filled in place.

    Returns:
        `bool`: Whether all items fit. If they do not, the bins are unchanged.
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
    Adds families of items (the shards and groups of one layer) to the bins. The largest items are placed first. Each
    goes to a bin in which both its family and all items together have small shares.

    Args:
        families (`Sequence[Sequence[Item]]`): The items of each family.
        bins (`list[Bin]`): The devices; filled in place.

    Returns:
        `bool`: Whether all items fit.
    """
    for family in families:
        totals = [sum(shares) or 1.0 for shares in zip(*(item.shares for item in family), strict=True)]
        of_family = [[0.0] * len(totals) for _ in bins]
        # The shares of a bin if this family and everything before it were spread evenly.
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
    """
    Returns how uneven a bin would be: the largest and the mean share of the family in the bin, plus the largest and the
    mean excess of all items over an even spread. Shares are those of the bytes and of each modality's load.
    """
    own = [share / total for share, total in zip(of_family, totals, strict=True)]
    excess = [(share - mean) / total for share, mean, total in zip(altogether, even, totals, strict=True)]
    return max(own) + sum(own) / len(own) + max(excess) + sum(excess) / len(excess)


def _add(first: list[float], second: list[float]) -> list[float]:
    return [a + b for a, b in zip(first, second, strict=True)]
