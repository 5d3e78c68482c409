"""Plans of where a mixture-of-experts model lies: an Accelerate device map from a configuration and memory budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ...experts_config import experts_config_of
from ..expert_modules import experts_modules
from ..meta_model import model_on_meta_device
from .budgets import Device, fast_devices, read_budgets, readable_size
from .load import Loads, expert_loads
from .parts import DeviceMap, device_map_of, device_of, parts_of, tensor_sizes
from .search import assign, missing_bytes

logger = logging.get_logger(__name__)


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
            of all tokens. Counts and shares are finite and at least 0. NaN stands for an expert that the layer does not
            have, or that does not serve the modality, as in what `expert_load` returns.
        dtype (`torch.dtype` or `str`, *optional*):
            Type of the weights; that of the configuration (or model) when `None`.

    Returns:
        `dict[str, int | str]`: an Accelerate device map with every parameter and buffer once, for
        `from_pretrained(device_map=…)` or `accelerate.dispatch_model`.

    Raises:
        ValueError: If the model does not fit, with the number of bytes that are missing; if it has no experts; or if
            budgets or routing are wrong; the message names the device, or the modality, the layer and the count.
    """
    model = model_on_meta_device(config_or_model, dtype)
    if not experts_modules(model):
        raise ValueError(
            f"{type(model).__name__} has no experts modules of Transformers' experts interface: use "
            '`device_map="balanced"`.'
        )
    parts = parts_of(model, _loads(model, routing), is_measured=routing is not None)
    budgets = read_budgets(max_memory)
    needed, offered = sum(part.bytes for part in parts), sum(budgets.values())
    if needed > offered:
        raise ValueError(
            f"`max_memory` is too small: the weights take {readable_size(needed)}, the devices {list(budgets)} offer "
            f"{readable_size(offered)}, so {readable_size(needed - offered)} are missing. Raise it, add a device or "
            '"disk", or choose a smaller `dtype`.'
        )
    devices = assign(parts, budgets)
    if devices is None and (devices := assign(parts, budgets, keeps_room=False)) is not None:
        logger.warning(
            "`max_memory` leaves %s no room to run the largest offloaded part whole, as Accelerate does: page the "
            "experts (`page_experts`), or raise it.",
            fast_devices(budgets)[0],
        )
    if devices is None:
        largest = max(parts, key=lambda part: part.bytes)
        raise ValueError(
            f"`max_memory` is too small by {readable_size(missing_bytes(parts, budgets))} on each of "
            f"{fast_devices(budgets)}: the weights take {readable_size(needed)} of {readable_size(offered)}, but parts "
            f"are not divisible (the largest, {largest.name!r}, takes {readable_size(largest.bytes)}). Raise it, or "
            "cut the experts into more shards (`num_expert_shards`, where the model has it)."
        )
    return device_map_of(parts, devices)


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
    loads = _loads(model, routing)
    sizes = dict.fromkeys(device_map.values(), 0)
    expert_sizes = dict(sizes)
    shares = {device: dict.fromkeys(next(iter(loads.values()), {}), 0.0) for device in sizes}
    for name, size in tensor_sizes(model).items():
        device = device_of(device_map, name)
        sizes[device] += size
        expert_sizes[device] += size if name.rpartition(".")[0] in loads else 0
    for name, by_modality in loads.items():
        device = device_of(device_map, name)
        for modality, load in by_modality.items():
            shares[device][modality] += load
    return [DeviceShare(device, sizes[device], expert_sizes[device], shares[device]) for device in sizes]


def _loads(model: PreTrainedModel, routing: Any) -> Loads:
    sizes = {name: experts.num_experts for name, experts in experts_modules(model).items()}
    return expert_loads(sizes, experts_config_of(model.config), routing)
