"""The search for a placement: which parts are offloaded, and on which device the others lie."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .budgets import Budgets, Device, fast_devices
from .packing import Bin, Item, partition, spread
from .parts import Part

Devices = dict[str, Device]


def assign(parts: Sequence[Part], budgets: Budgets, keeps_room: bool = True) -> Devices | None:
    """
    The device of every part, with as few offloaded as will do.

    Args:
        parts (`Sequence[Part]`):
            The parts of the model.
        budgets (`dict[int | str, float]`):
            Bytes by device, the fast ones first.
        keeps_room (`bool`, defaults to `True`):
            Whether the first device keeps room for the largest offloaded part, which Accelerate runs there.

    Returns:
        `dict[str, int | str]`: device by name of a part, or `None` if they do not fit.
    """
    candidates = offload_order(parts)
    room = sum(budgets[device] for device in fast_devices(budgets))
    offloaded, rest = 0, sum(part.bytes for part in parts)
    while rest > room and offloaded < len(candidates):
        rest -= candidates[offloaded].bytes
        offloaded += 1
    # A few more, since parts are not divisible and what is offloaded needs room to run: first tried in growing steps,
    # then as few as will do.
    step, failed = 1, offloaded - 1
    while (devices := assign_with(parts, candidates[:offloaded], budgets, keeps_room)) is None:
        if offloaded == len(candidates):
            return None
        failed, offloaded, step = offloaded, min(offloaded + step, len(candidates)), 2 * step
    while offloaded - failed > 1:
        middle = (failed + offloaded) // 2
        fewer = assign_with(parts, candidates[:middle], budgets, keeps_room)
        if fewer is None:
            failed = middle
        else:
            offloaded, devices = middle, fewer
    return devices


def missing_bytes(parts: Sequence[Part], budgets: Budgets) -> int:
    """How many bytes more, on each of the fast devices, would do."""
    fast = fast_devices(budgets)
    low, high = 0, sum(part.bytes for part in parts)
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        larger = {device: size + middle * (device in fast) for device, size in budgets.items()}
        low, high = (low, middle) if assign(parts, larger, keeps_room=False) else (middle, high)
    return high


def offload_order(parts: Sequence[Part]) -> list[Part]:
    """What is offloaded first: experts from the least used per byte on, then layers, then the rest from its end on."""
    experts = [part for part in parts if part.is_experts and part.bytes]
    # Rounded, so that equal loads come in the order of the layers.
    experts.sort(key=lambda part: float(f"{sum(part.load.values()) / part.bytes:.6g}"))
    layers = [part for part in parts if part.layer is not None and not part.is_experts]
    others = [part for part in parts if part.layer is None and not part.is_experts and part.tied_to is None]
    return [*experts, *layers, *sorted(others, key=lambda part: part.is_last, reverse=True)]


def assign_with(parts: Sequence[Part], offloaded: Sequence[Part], budgets: Budgets, keeps_room: bool) -> Devices | None:
    """The device of every part, where these are offloaded and no others; `None` if they do not fit."""
    devices = place_offloaded(offloaded, budgets)
    if devices is None:
        return None
    kept = [part for part in parts if part.name not in devices and part.tied_to is None]
    fast = fast_devices(budgets)
    bins = [Bin(budgets[device]) for device in fast]
    if keeps_room:  # offloaded parts run on the first device
        bins[0].capacity -= max((part.bytes for part in offloaded), default=0)
    touched = {part.layer for part in offloaded if part.layer is not None}
    if not pack(kept, bins, touched):
        return None
    devices |= {name: device for device, full in zip(fast, bins, strict=True) for name in full.names}
    return devices | {part.name: devices[part.tied_to] for part in parts if part.tied_to is not None}


def place_offloaded(offloaded: Sequence[Part], budgets: Budgets) -> Devices | None:
    """
    The slow device of every offloaded part: the most used ones take what room the CPU has, the others go to the disk.
    `None` if they do not fit.
    """
    fast = fast_devices(budgets)
    room = {device: size for device, size in budgets.items() if device not in fast}
    devices: Devices = {}
    for part in reversed(offloaded):  # the most used ones first
        device = next((device for device in room if part.bytes <= room[device]), None)
        if device is None:
            return None
        room[device] -= part.bytes
        devices[part.name] = device
    return devices


def pack(kept: Sequence[Part], bins: list[Bin], touched: Collection[str]) -> bool:
    """
    Adds the parts that are not offloaded to the bins of the fast devices.

    Args:
        kept (`Sequence[Part]`):
            The parts.
        bins (`list[Bin]`):
            The devices, in order; filled in place.
        touched (`Collection[str]`):
            The layers that have something offloaded.

    Returns:
        `bool`: whether there was room.
    """
    scale = _Scale(kept)
    # What comes before the layers, and what is left of layers that run on the first device anyway.
    first = [part for part in kept if part.layer is None and not part.is_last and not part.is_experts]
    first += [part for part in kept if part.layer in touched and not part.is_apart]
    if not bins[0].fits(scale.weigh(first)):
        return False
    bins[0].add(scale.weigh(first))
    # Whole layers, in order, and what follows them.
    layers = list(dict.fromkeys(part.layer for part in kept if part.layer is not None and part.layer not in touched))
    runs = [[part for part in kept if part.layer == layer and not part.is_apart] for layer in layers]
    runs.append([part for part in kept if part.is_last and not part.is_experts])
    if not partition([scale.weigh(run) for run in runs if run], bins):
        return False
    # Experts that may lie anywhere: those of one place lie apart.
    families: dict[str, list[Item]] = {}
    for part in kept:
        if part.is_apart:
            families.setdefault(part.place, []).append(scale.weigh([part]))
    return spread(list(families.values()), bins)


class _Scale:
    """Weighs parts against all those that are kept: their shares of the bytes and of each modality's load."""

    def __init__(self, kept: Sequence[Part]):
        experts = [part for part in kept if part.is_experts]
        self.bytes = max(sum(part.bytes for part in kept), 1)
        modalities = experts[0].load if experts else []
        self.loads = {modality: sum(part.load[modality] for part in experts) for modality in modalities}

    def weigh(self, parts: Sequence[Part]) -> Item:
        loads = [
            sum(part.load.get(modality, 0.0) for part in parts) / total if total else 0.0
            for modality, total in self.loads.items()
        ]
        size = sum(part.bytes for part in parts)
        return Item([part.name for part in parts], size, [size / self.bytes, *loads])
