"""The parts of a model that a device map names: layers, experts modules, and what lies beside them."""

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
    What a device map names: an experts module, or what lies beside the experts.

    Args:
        name (`str`): Name of the module, parameter or buffer.
        bytes (`int`): Bytes of its parameters and buffers; tied ones count where they come first.
        is_experts (`bool`): Whether it is an experts module.
        layer (`str`, *optional*): The decoder layer that it lies in.
        is_last (`bool`): Whether it follows the layers (final norm, head).
        place (`str`): Of experts, the layer's experts or the pool that they are a part of.
        is_apart (`bool`): Whether it is experts that may lie elsewhere than the attention of their layer.
        load (`dict[str, float]`): Of experts, by modality, the share of its choices that falls on them.
        tied_to (`str`, *optional*): The part that it has to lie with.
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
    The parts of a model, in its order.

    Args:
        model (`PreTrainedModel`):
            The model, on the meta device or not.
        loads (`dict[str, dict[str, float]]`):
            By experts module, by modality, the share of the modality's choices that falls on it.
        is_measured (`bool`):
            Whether the loads are measured: groups of a layer then are worth being told apart.
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
            # Rotary tables and the like stand behind the layers, too, but are read before them.
            is_last=layer is None and number > first_layer and name in trained,
            place=places.get(name, ""),
            is_apart=is_experts and (layer is None or ".shards." in name or (has_siblings and is_measured)),
            load=loads.get(name, {}),
            tied_to=tied.get(name),
        )
        parts.append(part)
    return parts


def tensor_sizes(model: nn.Module) -> dict[str, int]:
    """Bytes of every parameter and buffer by name: 0 where it is tied to one that came before."""
    sizes: dict[str, int] = {}
    seen = set()
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        is_known = id(tensor) in seen or name in tied
        sizes[name] = 0 if is_known else tensor.numel() * tensor.element_size()
        seen.add(id(tensor))
    return sizes


def decoder_layers(model: PreTrainedModel, experts: Sequence[str]) -> list[str]:
    """Names of the decoder's layers: the list that the blocks lie in, also those whose experts are pooled."""
    around = prefixes(decoder_name(model))  # in which there may be other lists
    for name in sparse_blocks(model) or experts:
        for container in prefixes(name):
            layers = model.get_submodule(container)
            if isinstance(layers, nn.ModuleList) and container not in around:
                return [f"{container}.{child}" for child, _ in layers.named_children()]
    raise ValueError(f"{type(model).__name__} has no list of layers with experts.")


def device_map_of(parts: Sequence[Part], devices: Mapping[str, Device]) -> DeviceMap:
    """The device map, in the model's order, with layers that lie on one device by their own name."""
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
    The device of a module or tensor: that of the longest name in the map that it lies under.

    Raises:
        ValueError: If there is none.
    """
    for prefix in (*reversed(prefixes(name)), ""):
        if prefix in device_map:
            return device_map[prefix]
    raise ValueError(f"the device map gives no device for {name!r}: name it, or a module that it lies in.")


def prefixes(name: str) -> list[str]:
    """The modules that a name lies in, from the outermost on, and the name itself."""
    pieces = name.split(".")
    return [".".join(pieces[:end]) for end in range(1, len(pieces) + 1)]


def _sizes_of_prefixes(sizes: Mapping[str, int]) -> dict[str, int]:
    """The bytes in every module, parameter and buffer."""
    sums: dict[str, int] = {}
    for name, size in sizes.items():
        for prefix in prefixes(name):
            sums[prefix] = sums.get(prefix, 0) + size
    return sums


def _part_names(
    model: nn.Module, experts: Collection[str], layers: Sequence[str], filled: Collection[str]
) -> list[str]:
    """Names that cover the model: down to the layers and the experts, and no further."""
    parents = {name.rsplit(".", depth)[0] for name in (*experts, *layers) for depth in range(1, name.count(".") + 1)}
    return list(_names_within(model, "", parents - set(experts), filled))


def _names_within(module: nn.Module, name: str, parents: set[str], filled: Collection[str]) -> Iterator[str]:
    """Names that cover the module. Empty modules have none."""
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
    """By part, the other part that it shares a tensor with."""
    ties = {}
    for tied, source in getattr(model, "all_tied_weights_keys", {}).items():
        part, other = (next(name for name in prefixes(tensor) if name in names) for tensor in (tied, source))
        if part != other:
            ties[part] = other
    return ties
