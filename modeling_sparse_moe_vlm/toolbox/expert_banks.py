"""The experts of a model, by place and group, and what is called how in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .factored_layer import is_experts, stacks
from .model_structure import name_without_adapters
from .placement_load import place_of

PROJECTIONS = ("gate", "up", "down")


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
    config = model.config.get_text_config()
    groups = {group["name"] for group in getattr(config, "expert_groups", [])}
    banks: dict[str, ExpertBank] = {}
    for name, module in modules_of(model):
        parent, _, last = name.rpartition(".")
        always_on = last in groups and parent.endswith("shared_experts")
        if not always_on and not is_experts(module):
            continue
        bank_name = name.rsplit(".shards.", 1)[0]
        if bank_name not in banks:
            number = layer_of(name)
            is_pool = ".expert_pools." in f".{name}"
            banks[bank_name] = ExpertBank(
                name=bank_name,
                group=last if always_on else place_of(name, config)[1],
                layers=tuple(config.pools[number]) if is_pool else (number,),
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


def layer_of(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)
