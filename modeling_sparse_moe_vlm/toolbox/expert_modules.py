"""Where a model's experts are: their modules, what holds them, and what is called how."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..experts_config import experts_config_of

PROJECTIONS = ("gate", "up", "down")
# What `use_experts_implementation` of Transformers gives a class; the last one is the class's own.
MARKS = ("has_gate", "has_bias", "is_transposed", "_is_expert_parallel", "num_experts")


def uses_experts_interface(module: nn.Module) -> bool:
    """Whether Transformers' experts interface runs the module."""
    return all(hasattr(module, mark) for mark in MARKS)


def base_model_of(model: Any) -> PreTrainedModel:
    """The model within PEFT's, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def name_without_adapters(name: str) -> str:
    """The name that a module of a model with adapters has without them."""
    return re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", name).removeprefix("base_model.model.")


def name_without_shard(name: str) -> str:
    """The name that a module or parameter of a shard has in a model without shards."""
    return re.sub(r"\.shards\.\d+(?=\.|$)", "", name)


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds a stack of experts and runs them through Transformers' experts interface."""
    return "base_layer" not in module._modules and uses_experts_interface(module) and bool(stacks(module))


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """By name, the modules that hold stacks of experts (of a layer, group, pool or shard), in the model's order."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def stacks(experts: nn.Module) -> dict[str, nn.Parameter]:
    """The stacks of matrices of an experts module, by name."""
    return {name: value for name, value in experts.named_parameters(recurse=False) if value.dim() == 3}


def parameters_by_expert(experts: Any) -> dict[str, nn.Parameter]:
    """By name, the parameters of an experts module that hold something for every expert: matrices and biases."""
    parameters = experts.named_parameters(recurse=False)
    return {name: value for name, value in parameters if value.dim() and value.shape[0] == experts.num_experts}


def place_of(name: str, config: PreTrainedConfig) -> tuple[str, str | None]:
    """The place (a layer's experts, or a pool) that an experts module is a part of, and the group it belongs to."""
    groups = getattr(config, "routed_group_names", [])
    place = name_without_shard(name_without_adapters(name))
    parent, _, last = place.rpartition(".")
    if len(groups) > 1 and last in groups:
        return parent, last
    return place, groups[0] if groups else None


def is_pool(place: str) -> bool:
    """Whether a place is a pool, whose experts several layers use."""
    return ".expert_pools." in f".{place}"


def first_number(name: str) -> int:
    """The first number in the name of a module; 0 where there is none."""
    return next((int(piece) for piece in name.split(".") if piece.isdigit()), 0)


def places_of_layers(places: Iterable[str], config: Any) -> list[str]:
    """The place whose experts each sparse layer uses: layers of a pool have it in common."""
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
    The experts of one group in one place, which is a layer or a pool of layers.

    Args:
        name (`str`): Name of the module.
        group (`str`, *optional*): Name of the group, where the configuration has groups.
        layers (`tuple[int, ...]`): The layers that use them.
        always_on (`bool`): Whether they are always on, and thus one dense network.
        parts (`dict[str, nn.Module]`): By name, the modules that hold them: one, or the shards.
    """

    name: str
    group: str | None
    layers: tuple[int, ...]
    always_on: bool
    parts: dict[str, nn.Module]

    @property
    def sizes(self) -> list[int]:
        """Numbers of experts of the parts."""
        return [next(iter(stacks(part).values())).shape[0] for part in self.parts.values()]

    @property
    def weights(self) -> dict[str, set[str]]:
        """By the name of a matrix of the experts (or stack of them) within its part, the projections in it."""
        first = next(iter(self.parts.values()))
        names = [name for name, _ in first.named_children()] if self.always_on else list(stacks(first))
        return {
            name: {projection for projection in PROJECTIONS if projection in name}
            for name in names
            if name.endswith("_proj")
        }

    def is_in_group(self, group: str) -> bool:
        return group == self.group if self.group is not None else group in self.name.split(".")


def expert_banks(model: PreTrainedModel) -> list[ExpertBank]:
    """The experts of a model by place and group, in the order of its modules."""
    config = experts_config_of(model.config)
    groups = {group["name"] for group in getattr(config, "expert_groups", [])}
    layers = layers_of_modules(model)
    of_ours = tuple(f"{name}." for name in sparse_blocks(model))
    banks: dict[str, ExpertBank] = {}
    for name, module in modules_of(model):
        parent, _, last = name.rpartition(".")
        always_on = last in groups and parent.endswith("shared_experts")
        if not always_on and not is_experts(module):
            continue
        bank_name = name.rsplit(".shards.", 1)[0]
        if bank_name not in banks:
            place, group = place_of(name, config)
            if not is_pool(name) and not name.startswith(of_ours):
                group = None  # experts that the model had before it was given groups
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
    """The modules by the name that they have without adapters."""
    for name, module in model.named_modules():
        if not re.search(r"\.(lora_\w+|modules_to_save)(\.|$)", name):
            yield name_without_adapters(name), module


def our_experts_config(config: PreTrainedConfig) -> Any:
    """The experts' configuration of a model of this package or an upcycled one; `None` for other models."""
    experts = experts_config_of(config)
    # By attribute: a checkpoint that brings its code along has classes of its own.
    return experts if hasattr(experts, "layers_by_experts") else None


def sparse_blocks(model: nn.Module) -> dict[str, Any]:
    """By name, the sparse blocks of this package in any model."""
    # By attribute, since the classes of a checkpoint that came with its code are others.
    return {name: module for name, module in modules_of(model) if hasattr(module, "groups_key")}


def decoder_name(model: PreTrainedModel) -> str:
    """The name of the decoder in a model, with or without adapters; empty where the model is the decoder."""
    decoder = base_model_of(model).get_decoder()
    return next((name for name, module in modules_of(model) if module is decoder), "")


def layers_of_modules(model: PreTrainedModel) -> dict[str, int]:
    """
    By name, the number of the layer that a module lies in; 0 for what lies in none. Blocks and attention know theirs;
    for other modules it is the first number in the name, after the name of the decoder.
    """
    prefix = f"{decoder_name(model)}."
    layers: dict[str, int] = {}
    known: dict[str, int] = {}  # from the module itself, or from one around it
    for name, module in modules_of(model):
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            layer = known.get(name.rpartition(".")[0])
        if layer is not None:
            known[name] = layer
        layers[name] = first_number(name.removeprefix(prefix)) if layer is None else layer
    return layers


def names_for_text(model: PreTrainedModel) -> tuple[str, ...]:
    """
    The beginnings of the names, without adapters, of what text goes through: the decoder, and beside it the embeddings
    and the head. Everything, where the model is the decoder.
    """
    base, decoder = base_model_of(model), decoder_name(model)
    if not decoder:
        return ("",)
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    names = [decoder, *(name for name, module in modules_of(model) if any(module is end for end in ends))]
    starts = []
    for name in names:
        # A head may have several parts: what counts is the outermost module that the decoder does not lie in.
        start, *rest = name.split(".")
        for piece in rest:
            if not f"{decoder}.".startswith(f"{start}."):
                break
            start = f"{start}.{piece}"
        starts.append(f"{start}.")
    return tuple(starts)
