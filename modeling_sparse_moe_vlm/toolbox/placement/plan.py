"""Plans of where a mixture-of-experts model lies: an Accelerate device map from a configuration and memory budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..expert_modules import place_of, uses_experts_interface
from ..meta_model import model_on_meta_device
from .load import expert_loads
from .packing import Bin, Item, partition, spread

logger = logging.get_logger(__name__)

Device = int | str
DeviceMap = dict[str, Device]
_SLOW = ("cpu", "disk")


@dataclass
class _Part:
    """What a device map names: an experts module, or what lies beside the experts."""

    name: str
    bytes: int
    is_experts: bool
    layer: str | None  # the decoder layer that it lies in
    is_last: bool = False  # what follows the layers: final norm, head
    place: str = ""
    is_apart: bool = False  # experts that may lie elsewhere than the attention of their layer
    load: dict[str, float] = field(default_factory=dict)
    tied_to: str | None = None


@dataclass(frozen=True)
class DeviceShare:
    """
    What a device map puts on one device.

    Args:
        device (`int` or `str`): The device.
        bytes (`int`): Bytes of parameters and buffers; tied ones count once.
        expert_bytes (`int`): Of these, the routed experts'.
        load (`dict[str, float]`): By modality, the share of its choices of experts that falls on the device.
    """

    device: Device
    bytes: int
    expert_bytes: int
    load: dict[str, float]


def plan_expert_placement(
    config_or_model: PreTrainedConfig | PreTrainedModel,
    max_memory: Mapping[Device, int | float | str],
    routing: Any = None,
    dtype: torch.dtype | str | None = None,
) -> DeviceMap:
    """
    Plans where the parts of a mixture-of-experts model lie. Nothing is allocated: a configuration is enough.

    Layers follow each other over the accelerators, evenly by bytes. Where they do not hold everything, experts go to
    `"cpu"`, then to `"disk"`, and the attention of their layers to the device on which Accelerate runs what is
    offloaded, which keeps room for it. Shards of experts (`config.num_expert_shards`, for models that have it), cross-
    layer pools, and with `routing` groups of experts may lie on another accelerator than their layer: those of one
    layer lie apart, so that the accelerators work at once. With `routing` the load of every modality is spread like the
    bytes, and the coldest experts are offloaded first.

    Args:
        config_or_model (`PreTrainedConfig` or `PreTrainedModel`):
            Configuration of any Transformers model with the experts interface, or such a model, on the meta device or
            not. Of a configuration, the class that `architectures` or the auto classes name is planned for.
        max_memory (`Mapping[int | str, int | float | str]`):
            Bytes that the weights may take, by device, in Accelerate's form: `{0: "80GB", 1: 80e9, "cpu": "200GB",
            "disk": "1TB"}`. Other devices are not used; leave room for caches and activations.
        routing (*optional*):
            Measured routing, in any of these forms: what [`~toolbox.routing.measure_routing`],
            [`~toolbox.routing.routing_statistics`] or [`~toolbox.routing.expert_load`] return, as it is or read
            back from JSON; by modality, a tensor or lists of shape `(layers with experts, experts)`; or one such tensor
            of all tokens.
        dtype (`torch.dtype` or `str`, *optional*):
            Type of the weights; that of the configuration (or model) when `None`.

    Returns:
        `dict[str, int | str]`: an Accelerate device map with every parameter and buffer once, for
        `from_pretrained(device_map=…)` or `accelerate.dispatch_model`.

    Raises:
        ValueError: If the model does not fit, with the number of bytes that are missing; if it has no experts; or if
            budgets or routing are wrong.
    """
    model = model_on_meta_device(config_or_model, dtype)
    parts = _parts(model, routing)
    budgets = _budgets(max_memory)
    needed, offered = sum(part.bytes for part in parts), sum(budgets.values())
    if needed > offered:
        raise ValueError(
            f"`max_memory` is too small: the weights take {_readable(needed)}, the devices {list(budgets)} offer "
            f'{_readable(offered)}, so {_readable(needed - offered)} are missing. Raise it, add a device or "disk", or '
            "choose a smaller `dtype`."
        )
    devices = _assign(parts, budgets)
    if devices is None and (devices := _assign(parts, budgets, keeps_room=False)) is not None:
        logger.warning(
            "`max_memory` leaves %s no room to run the largest offloaded part whole, as Accelerate does: page the "
            "experts (`page_experts`), or raise it.",
            _fast(budgets)[0],
        )
    if devices is None:
        missing = _missing(parts, budgets)
        largest = max(parts, key=lambda part: part.bytes)
        raise ValueError(
            f"`max_memory` is too small by {_readable(missing)} on each of {_fast(budgets)}: the weights take "
            f"{_readable(needed)} of {_readable(offered)}, but parts are not divisible (the largest, {largest.name!r}, "
            f"takes {_readable(largest.bytes)}). Raise it, or cut the experts into more shards (`num_expert_shards`, "
            "where the model has it)."
        )
    return _device_map(parts, devices)


def describe_placement(
    config_or_model: PreTrainedConfig | PreTrainedModel,
    device_map: Mapping[str, Device],
    routing: Any = None,
    dtype: torch.dtype | str | None = None,
) -> list[DeviceShare]:
    """
    Bytes and expected load of each device under a map, be it planned here or otherwise.

    Args:
        config_or_model, routing, dtype:
            As for [`plan_expert_placement`]. Without `routing` all experts of a layer are expected to do the same.
        device_map (`Mapping[str, int | str]`):
            An Accelerate device map.

    Returns:
        `list[DeviceShare]`: in the order in which the map names the devices.

    Raises:
        ValueError: If the map leaves out a part of the model.
    """
    model = model_on_meta_device(config_or_model, dtype)
    experts = _experts(model)
    loads = expert_loads(experts, model.config.get_text_config(), routing)
    sizes = dict.fromkeys(device_map.values(), 0)
    expert_sizes = dict(sizes)
    shares = {device: dict.fromkeys(next(iter(loads.values()), {}), 0.0) for device in sizes}
    for name, size in _tensors(model).items():
        device = _lookup(device_map, name)
        sizes[device] += size
        expert_sizes[device] += size if name.rpartition(".")[0] in experts else 0
    for name, by_modality in loads.items():
        device = _lookup(device_map, name)
        for modality, load in by_modality.items():
            shares[device][modality] += load
    return [DeviceShare(device, sizes[device], expert_sizes[device], shares[device]) for device in sizes]


# ------------------------------------------------------------------------------------------------ the model's parts


def _experts(model: nn.Module) -> dict[str, int]:
    """By name, the modules that Transformers' experts interface runs, and their numbers of experts."""
    modules: Iterable[tuple[str, Any]] = model.named_modules()
    return {name: module.num_experts for name, module in modules if uses_experts_interface(module)}


def _tensors(model: nn.Module) -> dict[str, int]:
    """Bytes of every parameter and buffer by name: 0 where it is tied to one that came before."""
    sizes: dict[str, int] = {}
    seen = set()
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        is_known = id(tensor) in seen or name in tied
        sizes[name] = 0 if is_known else tensor.numel() * tensor.element_size()
        seen.add(id(tensor))
    return sizes


def _parts(model: PreTrainedModel, routing: Any) -> list[_Part]:
    experts = _experts(model)
    if not experts:
        raise ValueError(
            f"{type(model).__name__} has no experts modules of Transformers' experts interface: use "
            '`device_map="balanced"`.'
        )
    config = model.config.get_text_config()
    loads = expert_loads(experts, config, routing)
    layers = _decoder_layers(model, experts)
    sizes: dict[str, int] = {}
    for name, size in _tensors(model).items():
        for prefix in _prefixes(name):
            sizes[prefix] = sizes.get(prefix, 0) + size
    parents = {name.rsplit(".", depth)[0] for name in (*experts, *layers) for depth in range(1, name.count(".") + 1)}
    with_parameters = {prefix for name, _ in model.named_parameters() for prefix in _prefixes(name)}
    names = list(_names(model, "", parents - set(experts), set(sizes)))
    first_layer = min(number for number, name in enumerate(names) if name.startswith(f"{layers[0]}.") or name in layers)
    of_layer = {f"{layer}.": layer for layer in layers}
    parts = []
    for number, name in enumerate(names):
        layer = next((layer for prefix, layer in of_layer.items() if f"{name}.".startswith(prefix)), None)
        part = _Part(name, sizes[name], name in experts, layer)
        # Rotary tables and the like stand behind the layers, too, but are read before them.
        part.is_last = layer is None and number > first_layer and name in with_parameters
        if part.is_experts:
            part.place, part.load = place_of(name, config)[0], loads[name]
        parts.append(part)
    _mark_apart(parts, has_routing=routing is not None)
    for tied, source in getattr(model, "all_tied_weights_keys", {}).items():
        part, other = _part_of(parts, tied), _part_of(parts, source)
        if part is not other:
            part.tied_to = other.name
    return parts


def _mark_apart(parts: Sequence[_Part], has_routing: bool) -> None:
    places = Counter(part.place for part in parts if part.is_experts)
    for part in parts:
        has_siblings = part.is_experts and places[part.place] > 1
        is_shard = ".shards." in part.name
        part.is_apart = part.is_experts and (part.layer is None or is_shard or (has_siblings and has_routing))


def _decoder_layers(model: nn.Module, experts: Mapping[str, int]) -> list[str]:
    """Names of the decoder's layers: the list that the experts lie in, or that stands beside their pools."""
    for name in experts:
        pieces = name.split(".")
        end = next((i for i, piece in enumerate(pieces) if piece.isdigit()), None)
        if end is None:
            continue
        container = ".".join(pieces[:end])
        if not isinstance(model.get_submodule(container), nn.ModuleList):
            container = ".".join([*pieces[: end - 1], "layers"])
        return [f"{container}.{child}" for child, _ in model.get_submodule(container).named_children()]
    raise ValueError(f"{type(model).__name__} has no list of layers with experts.")


def _names(module: nn.Module, name: str, parents: set[str], filled: set[str]) -> Iterator[str]:
    """Names that cover the module: down to the layers and the experts, and no further. Empty modules have none."""
    if name and name not in parents:
        if name in filled:
            yield name
        return
    prefix = f"{name}." if name else ""
    for own in (*module._parameters, *module._buffers):
        if f"{prefix}{own}" in filled:
            yield f"{prefix}{own}"
    for child_name, child in module.named_children():
        yield from _names(child, f"{prefix}{child_name}", parents, filled)


def _prefixes(name: str) -> list[str]:
    """The modules that a name lies in, from the outermost on, and the name itself."""
    pieces = name.split(".")
    return [".".join(pieces[:end]) for end in range(1, len(pieces) + 1)]


def _part_of(parts: Sequence[_Part], tensor: str) -> _Part:
    return next(part for part in parts if f"{tensor}.".startswith(f"{part.name}."))


# ------------------------------------------------------------------------------------------------ budgets


def _budgets(max_memory: Mapping[Device, int | float | str]) -> dict[Device, float]:
    """Bytes by device, accelerators first, then the CPU, then the disk."""
    if not max_memory:
        raise ValueError('`max_memory` names no device: give budgets such as {0: "80GB", "cpu": "200GB"}.')
    wrong = [device for device in max_memory if device not in ("mps", *_SLOW) and not _is_number(device)]
    if wrong:
        raise ValueError(f"`max_memory` names {wrong}: devices are numbers of accelerators, 'mps', 'cpu' and 'disk'.")
    budgets: dict[Device, float] = {}
    for device in sorted(max_memory, key=lambda device: (device in _SLOW, str(device) if device in _SLOW else 0)):
        size = max_memory[device]
        try:
            if isinstance(size, str) and size.upper().endswith(("TB", "TIB")):  # Accelerate stops at giga
                unit = "GiB" if size.upper().endswith("TIB") else "GB"
                size = f"{1000 * float(size[: -len(unit)]) if unit == 'GB' else 1024 * float(size[:-3])}{unit}"
            if not isinstance(size, float):
                size = convert_file_size_to_int(size if isinstance(size, int) else str(size))
            budgets[device] = size
        except ValueError as error:
            raise ValueError(f"`max_memory[{device!r}]` is {max_memory[device]!r}: {error}") from error
    return budgets


def _is_number(device: object) -> bool:
    return isinstance(device, int) and not isinstance(device, bool) and device >= 0


def _fast(budgets: Mapping[Device, float]) -> list[Device]:
    """The accelerators, or the next best device."""
    return [device for device in budgets if device not in _SLOW] or [next(iter(budgets))]


def _missing(parts: Sequence[_Part], budgets: Mapping[Device, float]) -> int:
    """How many bytes more, on each of the fast devices, would do."""
    fast = _fast(budgets)
    low, high = 0, sum(part.bytes for part in parts)
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        larger = {device: size + middle * (device in fast) for device, size in budgets.items()}
        low, high = (low, middle) if _assign(parts, larger, keeps_room=False) else (middle, high)
    return high


def _readable(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} bytes"


# ------------------------------------------------------------------------------------------------ assignment


def _assign(
    parts: Sequence[_Part], budgets: Mapping[Device, float], keeps_room: bool = True
) -> dict[str, Device] | None:
    """The device of every part; `None` if they do not fit, where asked for with room to run what is offloaded."""
    candidates = _offload_order(parts)
    room = sum(budgets[device] for device in _fast(budgets))
    offloaded, rest = 0, sum(part.bytes for part in parts)
    while rest > room and offloaded < len(candidates):
        rest -= candidates[offloaded].bytes
        offloaded += 1
    # A few more, since parts are not divisible and what is offloaded needs room to run: first tried in growing steps,
    # then as few as will do.
    step, failed = 1, offloaded - 1
    while (devices := _assign_with(parts, candidates[:offloaded], budgets, keeps_room)) is None:
        if offloaded == len(candidates):
            return None
        failed, offloaded, step = offloaded, min(offloaded + step, len(candidates)), 2 * step
    while offloaded - failed > 1:
        middle = (failed + offloaded) // 2
        fewer = _assign_with(parts, candidates[:middle], budgets, keeps_room)
        if fewer is None:
            failed = middle
        else:
            offloaded, devices = middle, fewer
    return devices


def _offload_order(parts: Sequence[_Part]) -> list[_Part]:
    """Experts from the least used per byte on, then whole layers, then the rest from its end on."""
    experts = [part for part in parts if part.is_experts and part.bytes]
    # Rounded, so that equal loads come in the order of the layers.
    experts.sort(key=lambda part: float(f"{sum(part.load.values()) / part.bytes:.6g}"))
    layers = [part for part in parts if part.layer is not None and not part.is_experts]
    others = [part for part in parts if part.layer is None and not part.is_experts and part.tied_to is None]
    return [*experts, *layers, *sorted(others, key=lambda part: part.is_last, reverse=True)]


def _assign_with(
    parts: Sequence[_Part], offloaded: Sequence[_Part], budgets: Mapping[Device, float], keeps_room: bool
) -> dict[str, Device] | None:
    """The device of every part, where these are offloaded and no others; `None` if they do not fit."""
    fast = _fast(budgets)
    devices: dict[str, Device] = {}
    room = {device: size for device, size in budgets.items() if device not in fast}
    for part in reversed(offloaded):  # the most used ones first
        device = next((device for device in room if part.bytes <= room[device]), None)
        if device is None:
            return None
        room[device] -= part.bytes
        devices[part.name] = device
    kept = [part for part in parts if part.name not in devices and part.tied_to is None]
    sizes = sum(part.bytes for part in kept)
    modalities = next(part.load for part in parts if part.is_experts)
    totals = {m: sum(part.load[m] for part in kept if part.is_experts) for m in modalities}

    def weigh(of: Sequence[_Part]) -> Item:
        loads = [sum(part.load.get(m, 0.0) for part in of) / totals[m] if totals[m] else 0.0 for m in totals]
        size = sum(part.bytes for part in of)
        return Item([part.name for part in of], size, [size / max(sizes, 1), *loads])

    bins = [Bin(budgets[device]) for device in fast]
    if keeps_room:  # offloaded parts run on the first device
        bins[0].capacity -= max((part.bytes for part in offloaded), default=0)
    touched = {part.layer for part in offloaded if part.layer is not None}
    first = [part for part in kept if part.layer is None and not part.is_last and not part.is_experts]
    first += [part for part in kept if part.layer in touched and not part.is_apart]
    if not bins[0].fits(weigh(first)):
        return None
    bins[0].add(weigh(first))
    layers = list(dict.fromkeys(part.layer for part in kept if part.layer is not None and part.layer not in touched))
    groups = [[part for part in kept if part.layer == layer and not part.is_apart] for layer in layers]
    groups.append([part for part in kept if part.is_last and not part.is_experts])
    if not partition([weigh(group) for group in groups if group], bins):
        return None
    apart: dict[str, list[Item]] = {}
    for part in kept:
        if part.is_apart:
            apart.setdefault(part.place, []).append(weigh([part]))
    if not spread(list(apart.values()), bins):
        return None
    devices |= {name: device for device, full in zip(fast, bins, strict=True) for name in full.names}
    devices |= {part.name: devices[part.tied_to] for part in parts if part.tied_to is not None}
    return devices


def _device_map(parts: Sequence[_Part], devices: Mapping[str, Device]) -> DeviceMap:
    """The map, in the model's order, with layers that lie on one device by their own name."""
    of_layers: dict[str | None, set[Device]] = {}
    for part in parts:
        of_layers.setdefault(part.layer, set()).add(devices[part.name])
    device_map: DeviceMap = {}
    for part in parts:
        is_whole = part.layer is not None and len(of_layers[part.layer]) == 1
        device_map[part.layer if is_whole and part.layer else part.name] = devices[part.name]
    return device_map


def _lookup(device_map: Mapping[str, Device], name: str) -> Device:
    """The device of a module or tensor: that of the longest name in the map that it lies under."""
    for prefix in (*reversed(_prefixes(name)), ""):
        if prefix in device_map:
            return device_map[prefix]
    raise ValueError(f"the device map gives no device for {name!r}: name it, or a module that it lies in.")
