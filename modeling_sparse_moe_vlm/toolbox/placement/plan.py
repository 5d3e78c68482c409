"""Plans an Accelerate device map for a mixture-of-experts model from a configuration and memory budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ...experts_config import experts_config_of
from ..expert_modules import experts_modules, experts_of_base, unfused_hint
from ..meta_model import model_on_meta_device
from .budgets import Device, fast_devices, read_budgets, readable_size
from .load import Loads, expert_loads, with_unmeasured_layers
from .parts import DeviceMap, device_map_of, device_of, parts_of, tensor_sizes
from .search import assign, missing_bytes

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class DeviceShare:
    """
    The share of a model that a device map puts on one device.

    Args:
        device (`int` or `str`): The device: number of an accelerator, `"mps"`, `"cpu"` or `"disk"`.
        bytes (`int`): Bytes of parameters and buffers. Tied ones count once.
        expert_bytes (`int`): Bytes of the routed experts, which are part of `bytes`.
        load (`dict[str, float]`): Share of the choices of experts that falls on the device, by modality, from 0 to 1.
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
    Plans the device of every part of a mixture-of-experts model. A configuration is enough: no memory is allocated for
    weights.

    Consecutive layers go to the same accelerator, and the bytes are spread evenly over the accelerators. If the
    accelerators are too small for the model, experts are offloaded to `"cpu"`, then to `"disk"`. Accelerate runs
    offloaded experts on the first accelerator; the plan puts the attention of their layers on it, and keeps memory free
    for the experts. Shards of experts (`config.num_expert_shards`, in models that have it), cross-layer pools, and with
    `routing` expert groups, can be on another accelerator than their layer. Those of one layer go to different
    accelerators, which then work at the same time. With `routing`, the load of every modality is also spread evenly,
    and the least used experts are offloaded first.

    Args:
        config_or_model (`PreTrainedConfig` or `PreTrainedModel`):
            Configuration of any Transformers model that uses the experts interface, or such a model, which can be on
            the meta device. For a configuration, the model class is the one named in `architectures` or chosen by the
            auto classes.
        max_memory (`Mapping[int | str, int | float | str]`):
            Bytes that the weights may take on each device, in Accelerate's form: `{0: "80GB", 1: 80e9, "cpu": "200GB",
            "disk": "1TB"}`. Other devices are not used. Leave room for key/value caches and activations.
        routing (`Any`, *optional*):
            Measured routing. One of: the return value of [`~toolbox.routing.measure_routing`],
            [`~toolbox.routing.routing_statistics`] or [`~toolbox.routing.expert_load`], also after a round trip through
            JSON; a mapping from modalities to tensors or lists of shape `(layers with experts, experts)`; or one such
            tensor for all tokens. Counts and shares must be finite and at least 0. NaN marks an expert that the layer
            does not have or that does not serve the modality, as in the return value of `expert_load`.
        dtype (`torch.dtype` or `str`, *optional*):
            Data type of the weights. By default, the data type of the configuration or model.

    Returns:
        `dict[str, int | str]`: An Accelerate device map that contains every parameter and buffer once. Pass it to
        `from_pretrained(device_map=...)` or `accelerate.dispatch_model`.

    Raises:
        ValueError: If the model does not fit (the message says how many bytes are missing), if it has no experts, or if
            the budgets or the routing are invalid (the message names the device, or the modality, layer and count).
    """
    model = model_on_meta_device(config_or_model, dtype)
    if not experts_modules(model):
        raise ValueError(
            f"{type(model).__name__} has no experts modules of Transformers' experts interface: use "
            f'`device_map="balanced"`.{unfused_hint(model)}'
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
            "`max_memory` leaves device %s no room to run the largest offloaded part, which Accelerate loads whole: "
            "page the experts (`page_experts`), or raise `max_memory`.",
            fast_devices(budgets)[0],
        )
    if devices is None:
        largest = max(parts, key=lambda part: part.bytes)
        raise ValueError(
            f"`max_memory` is too small by {readable_size(missing_bytes(parts, budgets))} on each of "
            f"{fast_devices(budgets)}: the weights take {readable_size(needed)} of {readable_size(offered)}, but parts "
            f"cannot be split (the largest, {largest.name!r}, takes {readable_size(largest.bytes)}). Raise it, or "
            "split the experts into more shards (`num_expert_shards`, if the model supports it)."
        )
    return device_map_of(parts, devices)


def describe_placement(
    config_or_model: PreTrainedConfig | PreTrainedModel,
    device_map: Mapping[str, Device],
    routing: Any = None,
    dtype: torch.dtype | str | None = None,
) -> list[DeviceShare]:
    """
    Computes the bytes and the expected load of each device under any device map.

    Args:
        config_or_model (`PreTrainedConfig` or `PreTrainedModel`):
            Configuration of the model, or the model, as for [`plan_expert_placement`].
        device_map (`Mapping[str, int | str]`):
            An Accelerate device map, from [`plan_expert_placement`] or any other source.
        routing (`Any`, *optional*):
            Measured routing, as for [`plan_expert_placement`]. By default, all experts of a layer have the same load.
        dtype (`torch.dtype` or `str`, *optional*):
            Data type of the weights. By default, the data type of the configuration or model.

    Returns:
        `list[DeviceShare]`: One entry per device, in the order in which the map names the devices.

    Raises:
        ValueError: If the map leaves out a part of the model, or if the routing is invalid.
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
    config = experts_config_of(model.config)
    of_base = experts_of_base(model)
    if routing is None or not of_base:
        return expert_loads(sizes, config, routing)
    # Routing is measured only in the layers with expert groups.
    loads = expert_loads({name: size for name, size in sizes.items() if name not in of_base}, config, routing)
    return with_unmeasured_layers(loads, list(of_base), len(config.sparse_layers))
