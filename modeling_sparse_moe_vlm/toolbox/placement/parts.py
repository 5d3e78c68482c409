"""The parts of a model that a device map names: layers, experts modules, and everything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...experts_config import experts_config_of
from ..expert_modules import decoder_name, place_of, sparse_blocks
from .budgets import Device
from .load import Loads

DeviceMap = dict[str, Device]


@dataclass(frozen=True)
class Part:
    """
    An entry of a device map: an experts module, or another module, parameter or buffer.

    Args:
        name (`str`): Name of the module, parameter or buffer.
        bytes (`int`): Bytes of its parameters and buffers. Tied tensors count only where they occur first.
        is_experts (`bool`): Whether it is an experts module.
        layer (`str`, *optional*): Name of the decoder layer that contains it.
        is_last (`bool`): Whether it comes after the layers (final norm, head).
        place (`str`): Name of the place (the experts of a layer, or a pool) to which an experts module belongs.
        is_apart (`bool`): Whether it is an experts module that can be on another device than its layer's attention.
        load (`dict[str, float]`): For experts, the share of each modality's choices that falls on them, by modality.
        tied_to (`str`, *optional*): Name of the part that must be on the same device because they share a tensor.
    """

    name: str
    bytes: int
    is_experts: bool = False
    layer: str | None = None
    is_last: bool = False
    place: str = ""
    is_apart: bool = False
    load: dict[str, float] = field(default_factory=dict)
    tied_to: str | None = None


def parts_of(model: PreTrainedModel, loads: Loads, is_measured: bool) -> list[Part]:
    """
    Splits a model into parts, in the model's order.

    Args:
        model (`PreTrainedModel`):
            The model, on the meta device or not.
        loads (`dict[str, dict[str, float]]`):
            Share of each modality's choices that falls on each experts module, by module and modality.
        is_measured (`bool`):
            Whether the loads are measured. If they are, the expert groups of a layer can be on different devices.

    Returns:
        `list[Part]`: The parts. Together they contain every parameter and buffer once.
    """
    config: Any = experts_config_of(model.config)
    layers = decoder_layers(model, list(loads))
    sizes = _sizes_of_prefixes(tensor_sizes(model))
    names = _part_names(model, loads, layers, sizes)
    trained = {prefix for name, _ in model.named_parameters() for prefix in prefixes(name)}
    first_layer = min(number for number, name in enumerate(names) if _layer_of(name, layers) is not None)
    places = {name: place_of(name, config)[0] for name in loads}
    members = Counter(places.values())
    tied = _ties(model, names)
    parts = []
    for number, name in enumerate(names):
        layer, is_experts = _layer_of(name, layers), name in loads
        has_siblings = is_experts and members[places[name]] > 1
        part = Part(
            name=name,
            bytes=sizes[name],
            is_experts=is_experts,
            layer=layer,
            # Rotary tables and similar buffers also come after the layers, but are used before them.
            is_last=layer is None and number > first_layer and name in trained,
            place=places.get(name, ""),
            is_apart=is_experts and (layer is None or ".shards." in name or (has_siblings and is_measured)),
            load=loads.get(name, {}),
            tied_to=tied.get(name),
        )
        parts.append(part)
    return parts


def tensor_sizes(model: nn.Module) -> dict[str, int]:
    """Returns the bytes of every parameter and buffer, by name; 0 if it is tied to an earlier one."""
    sizes: dict[str, int] = {}
    seen = set()
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        is_known = id(tensor) in seen or name in tied
        sizes[name] = 0 if is_known else tensor.numel() * tensor.element_size()
        seen.add(id(tensor))
    return sizes


def decoder_layers(model: PreTrainedModel, experts: Sequence[str]) -> list[str]:
    """Returns the names of the decoder's layers: the elements of the module list that contains the sparse blocks."""
    around = prefixes(decoder_name(model))  # modules that may contain other lists
    for name in sparse_blocks(model) or experts:
        for container in prefixes(name):
            layers = model.get_submodule(container)
            if isinstance(layers, nn.ModuleList) and container not in around:
                return [f"{container}.{child}" for child, _ in layers.named_children()]
    raise ValueError(f"{type(model).__name__} has no list of layers with experts.")


def device_map_of(parts: Sequence[Part], devices: Mapping[str, Device]) -> DeviceMap:
    """Returns the device map, in the model's order. A layer that is on a single device is one entry."""
    of_layers: dict[str | None, set[Device]] = {}
    for part in parts:
        of_layers.setdefault(part.layer, set()).add(devices[part.name])
    device_map: DeviceMap = {}
    for part in parts:
        is_whole = part.layer is not None and len(of_layers[part.layer]) == 1
        device_map[part.layer if is_whole and part.layer else part.name] = devices[part.name]
    return device_map


def device_of(device_map: Mapping[str, Device], name: str) -> Device:
    """
    Returns the device of a module or tensor: the device of the longest name in the map that contains it.

    Args:
        device_map (`Mapping[str, int | str]`): The device map.
        name (`str`): Name of the module or tensor.

    Returns:
        `int` or `str`: The device.

    Raises:
        ValueError: If no name in the map contains it.
    """
    for prefix in (*reversed(prefixes(name)), ""):
        if prefix in device_map:
            return device_map[prefix]
    raise ValueError(f"the device map gives no device for {name!r}: add an entry for it or for a module around it.")


def prefixes(name: str) -> list[str]:
    """Returns the names of the modules that contain a name, starting with the outermost, and the name itself."""
    pieces = name.split(".")
    return [".".join(pieces[:end]) for end in range(1, len(pieces) + 1)]


def _sizes_of_prefixes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns the bytes of every module, parameter and buffer, by name."""
    sums: dict[str, int] = {}
    for name, size in sizes.items():
        for prefix in prefixes(name):
            sums[prefix] = sums.get(prefix, 0) + size
    return sums


def _part_names(
    model: nn.Module, experts: Collection[str], layers: Sequence[str], filled: Collection[str]
) -> list[str]:
    """Returns the names of parts that cover the model, in which layers and experts modules are not split further."""
    parents = {name.rsplit(".", depth)[0] for name in (*experts, *layers) for depth in range(1, name.count(".") + 1)}
    return list(_names_within(model, "", parents - set(experts), filled))


def _names_within(module: nn.Module, name: str, parents: set[str], filled: Collection[str]) -> Iterator[str]:
    """Yields the names of parts that cover a module. Modules without tensors are left out."""
    if name and name not in parents:
        if name in filled:
            yield name
        return
    prefix = f"{name}." if name else ""
    for own in (*module._parameters, *module._buffers):
        if f"{prefix}{own}" in filled:
            yield f"{prefix}{own}"
    for child_name, child in module.named_children():
        yield from _names_within(child, f"{prefix}{child_name}", parents, filled)


def _layer_of(name: str, layers: Sequence[str]) -> str | None:
    return next((prefix for prefix in prefixes(name) if prefix in layers), None)


def _ties(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Returns, for each part that shares a tensor with another part, the name of that part."""
    ties = {}
    for tied, source in getattr(model, "all_tied_weights_keys", {}).items():
        part, other = (next(name for name in prefixes(tensor) if name in names) for tensor in (tied, source))
        if part != other:
            ties[part] = other
    return ties
