"""Searches for a placement: which parts are offloaded, and the device of every other part."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .budgets import Budgets, Device, fast_devices
from .packing import Bin, Item, partition, spread
from .parts import Part

Devices = dict[str, Device]


def assign(parts: Sequence[Part], budgets: Budgets, keeps_room: bool = True) -> Devices | None:
    """
    Chooses the device of every part, with as few offloaded parts as possible.

    Args:
        parts (`Sequence[Part]`):
            The parts of the model.
        budgets (`dict[int | str, float]`):
            Bytes by device, fast devices first.
        keeps_room (`bool`, *optional*, defaults to `True`):
            Whether to keep memory free on the first device for the largest offloaded part, which Accelerate runs there.

    Returns:
        `dict[str, int | str]`: Device by name of the part, or `None` if the parts do not fit.
    """
    candidates = offload_order(parts)
    room = sum(budgets[device] for device in fast_devices(budgets))
    offloaded, rest = 0, sum(part.bytes for part in parts)
    while rest > room and offloaded < len(candidates):
        rest -= candidates[offloaded].bytes
        offloaded += 1
    # More parts may have to be offloaded, because parts cannot be split and offloaded parts need memory to run.
    # Increase the number in growing steps until the rest fits, then find the smallest number by bisection.
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
    """Returns how many more bytes each of the fast devices would need."""
    fast = fast_devices(budgets)
    low, high = 0, sum(part.bytes for part in parts)
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        larger = {device: size + middle * (device in fast) for device, size in budgets.items()}
        low, high = (low, middle) if assign(parts, larger, keeps_room=False) else (middle, high)
    return high


def offload_order(parts: Sequence[Part]) -> list[Part]:
    """
    Returns the parts in the order in which they are offloaded: experts (the least load per byte first), the rest of
    the layers, and the other parts (those after the layers first).
    """
    experts = [part for part in parts if part.is_experts and part.bytes]
    # Rounded, so that experts with equal loads stay in the order of the layers.
    experts.sort(key=lambda part: float(f"{sum(part.load.values()) / part.bytes:.6g}"))
    layers = [part for part in parts if part.layer is not None and not part.is_experts]
    others = [part for part in parts if part.layer is None and not part.is_experts and part.tied_to is None]
    return [*experts, *layers, *sorted(others, key=lambda part: part.is_last, reverse=True)]


def assign_with(parts: Sequence[Part], offloaded: Sequence[Part], budgets: Budgets, keeps_room: bool) -> Devices | None:
    """Chooses the device of every part if exactly these parts are offloaded; `None` if they do not fit."""
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
    Chooses the slow device of every offloaded part: the most used parts go to the CPU as long as they fit, the others
    to the disk. Returns `None` if they do not fit.
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
            Parts that are not offloaded.
        bins (`list[Bin]`):
            The devices, in order; filled in place.
        touched (`Collection[str]`):
            Layers of which a part is offloaded.

    Returns:
        `bool`: Whether all parts fit.
    """
    scale = _Scale(kept)
    # Parts before the layers, and the rest of the layers with offloaded parts, which run on the first device anyway.
    first = [part for part in kept if part.layer is None and not part.is_last and not part.is_experts]
    first += [part for part in kept if part.layer in touched and not part.is_apart]
    if not bins[0].fits(scale.weigh(first)):
        return False
    bins[0].add(scale.weigh(first))
    # Whole layers, in order, and the parts after them.
    layers = list(dict.fromkeys(part.layer for part in kept if part.layer is not None and part.layer not in touched))
    runs = [[part for part in kept if part.layer == layer and not part.is_apart] for layer in layers]
    runs.append([part for part in kept if part.is_last and not part.is_experts])
    if not partition([scale.weigh(run) for run in runs if run], bins):
        return False
    # Experts that can be on any device: those of one place go to different devices.
    families: dict[str, list[Item]] = {}
    for part in kept:
        if part.is_apart:
            families.setdefault(part.place, []).append(scale.weigh([part]))
    return spread(list(families.values()), bins)


class _Scale:
    """Computes the shares of parts in the bytes, and in the load of each modality, of all parts that are kept."""

    def __init__(self, kept: Sequence[Part]):
        experts = [part for part in kept if part.is_experts]
        self.bytes = max(sum(part.bytes for part in kept), 1)
        modalities = experts[0].load if experts else []
        self.loads = {modality: sum(part.load[modality] for part in experts) for modality in modalities}

    def weigh(self, parts: Sequence[Part]) -> Item:
        """Returns parts as one item, with their shares."""
        loads = [
            sum(part.load.get(modality, 0.0) for part in parts) / total if total else 0.0
            for modality, total in self.loads.items()
        ]
        size = sum(part.bytes for part in parts)
        return Item([part.name for part in parts], size, [size / self.bytes, *loads])
