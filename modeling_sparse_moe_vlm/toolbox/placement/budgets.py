"""Memory budgets by device, converted to bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from accelerate.utils import convert_file_size_to_int

Device = int | str
Budgets = dict[Device, float]
SLOW_DEVICES = ("cpu", "disk")


def read_budgets(max_memory: Mapping[Device, int | float | str]) -> Budgets:
    """
    Converts the budgets of a user to bytes.

    Args:
        max_memory (`Mapping[int | str, int | float | str]`):
            Budgets in Accelerate's form. Terabytes (`"1TB"`) and tebibytes (`"1TiB"`) are accepted as well.

    Returns:
        `dict[int | str, float]`: Bytes by device: accelerators in the user's order, then `"cpu"`, then `"disk"`.

    Raises:
        ValueError: If there are no budgets, or if a device or a size is invalid. The message names it.
    """
    if not max_memory:
        raise ValueError('`max_memory` names no device: give budgets such as {0: "80GB", "cpu": "200GB"}.')
    wrong = [device for device in max_memory if device not in ("mps", *SLOW_DEVICES) and not _is_number(device)]
    if wrong:
        raise ValueError(f"`max_memory` names {wrong}: devices are numbers of accelerators, 'mps', 'cpu' and 'disk'.")
    # The sort is stable, so the accelerators keep the user's order.
    devices = sorted(max_memory, key=lambda device: SLOW_DEVICES.index(device) + 1 if device in SLOW_DEVICES else 0)
    budgets: Budgets = {}
    for device in devices:
        try:
            budgets[device] = _bytes(max_memory[device])
        except (ValueError, OverflowError) as error:
            raise ValueError(f"`max_memory[{device!r}]` is {max_memory[device]!r}: {error}") from error
    return budgets


def fast_devices(budgets: Budgets) -> list[Device]:
    """Returns the accelerators or, if there are none, the fastest device."""
    return [device for device in budgets if device not in SLOW_DEVICES] or [next(iter(budgets))]


def readable_size(size: float) -> str:
    """Formats a number of bytes, such as `"1.50 GB"`, `"20.00 kB"` or `"7 bytes"`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} bytes"


def _bytes(size: int | float | str) -> float:
    if isinstance(size, float):
        if math.isnan(size) or size < 0:
            raise ValueError("a number of bytes must be at least 0.")
        return size
    if isinstance(size, str):
        # Accelerate does not support units above GB and GiB.
        for unit, smaller, factor in (("TIB", "GiB", 1024), ("TB", "GB", 1000)):
            if size.upper().endswith(unit):
                size = f"{factor * float(size[: -len(unit)])}{smaller}"
    return convert_file_size_to_int(size if isinstance(size, int) else str(size))


def _is_number(device: object) -> bool:
    return isinstance(device, int) and not isinstance(device, bool) and device >= 0
