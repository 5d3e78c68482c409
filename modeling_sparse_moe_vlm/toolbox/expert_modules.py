"""Finds the experts of a model: their modules, the layers or pools they belong to, and their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..experts_config import experts_config_of

PROJECTIONS = ("gate", "up", "down")
# Attributes of every experts class. `use_experts_implementation` of Transformers sets all but the last one, which the
# class sets itself.
MARKS = ("has_gate", "has_bias", "is_transposed", "_is_expert_parallel", "num_experts")


def uses_experts_interface(module: nn.Module) -> bool:
    """Whether the module runs through Transformers' experts interface."""
    return all(hasattr(module, mark) for mark in MARKS)


def base_model_of(model: Any) -> PreTrainedModel:
    """Returns the base model of a PEFT model, or the model itself if it is not one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def name_without_adapters(name: str) -> str:
    """Returns the name that a module of a model with adapters has in the model without adapters."""
    return re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", name).removeprefix("base_model.model.")


def name_without_shard(name: str) -> str:
    """Returns the name that a module or parameter of a shard has in a model without shards."""
    return re.sub(r"\.shards\.\d+(?=\.|$)", "", name)


def is_experts(module: nn.Module) -> bool:
    """Whether the module contains a stack of experts and runs them through Transformers' experts interface."""
    return "base_layer" not in module._modules and uses_experts_interface(module) and bool(stacks(module))


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """Returns the modules that contain stacks of experts (of a layer, group, pool or shard) by name, in model order."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def unfused_hint(model: nn.Module) -> str:
    """Returns the end of an error message about missing stacks, if the experts of the model are separate networks."""
    if not any(hasattr(module, "has_separate_experts") for module in model.modules()):
        return ""
    return " Its experts are separate linear layers: load the model with `unfused_experts=False`."


def stacks(experts: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the stacked matrices of an experts module, by name."""
    return {name: value for name, value in experts.named_parameters(recurse=False) if value.dim() == 3}


def parameters_by_expert(experts: Any) -> dict[str, nn.Parameter]:
    """Returns the parameters of an experts module with one entry per expert (matrices and biases), by name."""
    parameters = experts.named_parameters(recurse=False)
    return {name: value for name, value in parameters if value.dim() and value.shape[0] == experts.num_experts}


def place_of(name: str, config: PreTrainedConfig) -> tuple[str, str | None]:
    """Returns the place of an experts module (the experts of a layer, or a pool), and the group that it belongs to."""
    groups = getattr(config, "routed_group_names", [])
    place = name_without_shard(name_without_adapters(name))
    parent, _, last = place.rpartition(".")
    if len(groups) > 1 and last in groups:
        return parent, last
    return place, groups[0] if groups else None


def is_pool(place: str) -> bool:
    """Whether a place is a pool, that is, several layers share its experts."""
    return ".expert_pools." in f".{place}"


def first_number(name: str) -> int:
    """Returns the first number in the name of a module, or 0 if there is none."""
    return next((int(piece) for piece in name.split(".") if piece.isdigit()), 0)


def places_of_layers(places: Iterable[str], config: Any) -> list[str]:
    """Returns the place whose experts each sparse layer uses. The layers of a pool share one place."""
    places = list(places)
    pools = {place.rpartition(".")[2]: place for place in places if is_pool(place)}
    if not pools:
        return places
    own = iter(place for place in places if not is_pool(place))
    pool_of = (config.layer_pool(layer) for layer in config.sparse_layers)
    return [next(own) if pool is None else pools[str(pool)] for pool in pool_of]


@dataclass(frozen=True)
class ExpertBank:
    """
    The experts of one group in one place: a layer, or a pool of layers.

    Args:
        name (`str`): Name of the module.
        group (`str`, *optional*): Name of the group, if the configuration has groups.
        layers (`tuple[int, ...]`): Numbers of the layers that use these experts.
        always_on (`bool`): Whether the experts are always on, which makes them one dense network.
        parts (`dict[str, nn.Module]`): Modules that contain the experts, by name: one module, or one per shard.
    """

    name: str
    group: str | None
    layers: tuple[int, ...]
    always_on: bool
    parts: dict[str, nn.Module]

    @property
    def is_unfused(self) -> bool:
        """Whether the routed experts are separate networks (`unfused_experts=True`)."""
        return any(hasattr(part, "has_separate_experts") for part in self.parts.values())

    @property
    def sizes(self) -> list[int]:
        """Number of experts of each part."""
        if self.is_unfused:
            return [len(part) for part in self.parts.values()]  # type: ignore[arg-type]
        return [next(iter(stacks(part).values())).shape[0] for part in self.parts.values()]

    @property
    def weights(self) -> dict[str, set[str]]:
        """
        Projections in each matrix (or stack of matrices) of the experts, by its name within the part, or within the
        expert if the experts are separate networks.
        """
        first = next(iter(self.parts.values()))
        if self.is_unfused:
            first = first[0]  # type: ignore[index]
        is_network = self.always_on or self.is_unfused
        names = [name for name, _ in first.named_children()] if is_network else list(stacks(first))
        return {
            name: {projection for projection in PROJECTIONS if projection in name}
            for name in names
            if name.endswith("_proj")
        }

    def is_in_group(self, group: str) -> bool:
        """Whether the experts belong to a group."""
        return group == self.group if self.group is not None else group in self.name.split(".")


def expert_banks(model: PreTrainedModel) -> list[ExpertBank]:
    """Returns the experts of a model by place and group, in the order of its modules."""
    config = experts_config_of(model.config)
    groups = {group["name"] for group in getattr(config, "expert_groups", [])}
    layers = layers_of_modules(model)
    of_ours = tuple(f"{name}." for name in sparse_blocks(model))
    banks: dict[str, ExpertBank] = {}
    for name, module in modules_of(model):
        parent, _, last = name.rpartition(".")
        always_on = last in groups and parent.endswith("shared_experts")
        if not always_on and not is_experts(module) and not hasattr(module, "has_separate_experts"):
            continue
        bank_name = name.rsplit(".shards.", 1)[0]
        if bank_name not in banks:
            place, group = place_of(name, config)
            if not is_pool(name) and not name.startswith(of_ours):
                group = None  # experts that the model had before it was upcycled
            banks[bank_name] = ExpertBank(
                name=bank_name,
                group=last if always_on else group,
                layers=tuple(config.pools[int(place.rpartition(".")[2])]) if is_pool(name) else (layers[name],),
                always_on=always_on,
                parts={},
            )
        banks[bank_name].parts[name] = module
    return list(banks.values())


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules of a model, each with the name that it has without adapters."""
    for name, module in model.named_modules():
        if not re.search(r"\.(lora_\w+|modules_to_save)(\.|$)", name):
            yield name_without_adapters(name), module


def our_experts_config(config: PreTrainedConfig) -> Any:
    """Returns the experts configuration of a model of this package or an upcycled model; `None` for other models."""
    experts = experts_config_of(config)
    # Checks an attribute, not the class: a checkpoint that contains its own code has its own classes.
    return experts if hasattr(experts, "layers_by_experts") else None


def sparse_blocks(model: nn.Module) -> dict[str, Any]:
    """Returns the sparse blocks of this package in any model, by name."""
    # Checks an attribute, not the class: a checkpoint that contains its own code has its own classes.
    return {name: module for name, module in modules_of(model) if hasattr(module, "groups_key")}


def experts_of_base(model: nn.Module) -> dict[str, Any]:
    """Returns the experts modules that an upcycled model had before, in layers that were sparse already, by name."""
    ours = tuple(f"{name}." for name in sparse_blocks(model))
    modules = experts_modules(model)
    return {name: modules[name] for name in modules if ours and not name.startswith(ours) and not is_pool(name)}


def decoder_name(model: PreTrainedModel) -> str:
    """Returns the name of the decoder in a model, without adapters. It is empty if the model itself is the decoder."""
    decoder = base_model_of(model).get_decoder()
    return next((name for name, module in modules_of(model) if module is decoder), "")


def layers_of_modules(model: PreTrainedModel) -> dict[str, int]:
    """
    Returns the number of the layer that each module belongs to, by name of the module; 0 for modules outside of layers.
    Blocks and attention modules store it as `layer_idx`. For other modules it is the first number in the name, after
    the name of the decoder.
    """
    prefix = f"{decoder_name(model)}."
    layers: dict[str, int] = {}
    known: dict[str, int] = {}  # from the module itself, or from a module around it
    for name, module in modules_of(model):
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            layer = known.get(name.rpartition(".")[0])
        if layer is not None:
            known[name] = layer
        layers[name] = first_number(name.removeprefix(prefix)) if layer is None else layer
    return layers


def ends_of(model: PreTrainedModel) -> list[str]:
    """Returns the names (without adapters) of the token embedding and the head, as far as the class knows them."""
    base = base_model_of(model)
    ends = []
    for find in (base.get_input_embeddings, base.get_output_embeddings):
        with suppress(NotImplementedError):
            ends.append(find())
    return [name for name, module in modules_of(model) if any(module is end for end in ends)]


def names_for_text(model: PreTrainedModel) -> tuple[str, ...]:
    """
    Returns prefixes of the names (without adapters) of the modules that text passes through: the decoder, the
    embeddings and the head. If the model itself is the decoder, the only prefix is empty and matches every name.
    """
    decoder = decoder_name(model)
    if not decoder:
        return ("",)
    names = [decoder, *ends_of(model)]
    starts = []
    for name in names:
        # A head may have several parts: use the outermost module that does not contain the decoder.
        start, *rest = name.split(".")
        for piece in rest:
            if not f"{decoder}.".startswith(f"{start}."):
                break
            start = f"{start}.{piece}"
        starts.append(f"{start}.")
    return tuple(starts)
