"""The routed experts of a model by layer, for models of this package and for others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...experts_config import SparseMoeVlmExpertsConfig
from .counts import RoutingCounts
from .statistics import GroupRouting, RoutingStatistics

# Name of the only group in models that have no expert groups.
EXPERTS = "experts"


@dataclass(frozen=True)
class RoutedGroup:
    """
    The routed experts of one group in one layer.

    Args:
        name (`str`): Name of the group.
        num_experts (`int`): Number of experts.
        modalities (`tuple[str, ...]`): Modalities that the group serves.
    """

    name: str
    num_experts: int
    modalities: tuple[str, ...]


@dataclass(frozen=True)
class RoutedLayer:
    """
    The routed experts of one layer.

    Args:
        number (`int`): Number of the layer in the decoder.
        groups (`tuple[RoutedGroup, ...]`): Groups, in the order in which the router numbers their experts.
    """

    number: int
    groups: tuple[RoutedGroup, ...]

    @property
    def num_experts(self) -> int:
        """Number of experts of all groups."""
        return sum(group.num_experts for group in self.groups)

    def first_of(self, group: str) -> int:
        """Returns the number that the router gives to the first expert of a group."""
        names = [own.name for own in self.groups]
        return sum(own.num_experts for own in self.groups[: names.index(group)])

    def group_of(self, expert: int) -> tuple[str, int]:
        """Returns the name of the group of an expert, and the number of the expert within the group."""
        for group in self.groups:
            if expert < group.num_experts:
                return group.name, expert
            expert -= group.num_experts
        raise IndexError(f"layer {self.number} has {self.num_experts} routed experts.")


@dataclass(frozen=True)
class RoutingLayout:
    """
    The routed experts of a model.

    Args:
        modalities (`tuple[str, ...]`): Modalities; the position is the modality id.
        layers (`tuple[RoutedLayer, ...]`): Layers with routed experts.
    """

    modalities: tuple[str, ...]
    layers: tuple[RoutedLayer, ...]

    @property
    def num_experts(self) -> int:
        """Largest number of experts of a layer."""
        return max(layer.num_experts for layer in self.layers)

    @property
    def group_names(self) -> list[str]:
        """Names of all groups, in the order in which the layers contain them."""
        return list(dict.fromkeys(group.name for layer in self.layers for group in layer.groups))


def layout_of(config: SparseMoeVlmExpertsConfig) -> RoutingLayout:
    """Returns the routed experts of a model of this package or of an upcycled model."""
    layers = tuple(
        RoutedLayer(
            layer,
            tuple(
                RoutedGroup(
                    group.name,
                    group.num_experts,
                    tuple(modality for modality in config.modalities if group.serves(modality)),
                )
                for group in config.layer_expert_groups(layer, always_on=False)
            ),
        )
        for layer in config.sparse_layers
    )
    return RoutingLayout(tuple(config.modalities), layers)


def statistics_by_layer(layout: RoutingLayout, counts: RoutingCounts, group_names: list[str]) -> RoutingStatistics:
    """
    Computes routing statistics with one row per layer, also where layers share their experts.

    Args:
        layout ([`RoutingLayout`]):
            The routed experts of the model.
        counts ([`RoutingCounts`]):
            Counts of any number of batches.
        group_names (`list[str]`):
            Names of the groups in the order of the last dimension of `counts.entropy`.

    Returns:
        [`RoutingStatistics`]: The statistics, in the order of layers, groups and modalities.
    """
    rows = []
    for number, layer in enumerate(layout.layers):
        for group in layer.groups:
            experts = slice(layer.first_of(group.name), layer.first_of(group.name) + group.num_experts)
            for modality in group.modalities:
                modality_id = layout.modalities.index(modality)
                num_tokens = int(counts.tokens[modality_id])
                total = float(counts.entropy[number, modality_id, group_names.index(group.name)])
                rows.append(
                    GroupRouting(
                        place=f"layer_{layer.number}",
                        group=group.name,
                        modality=modality,
                        num_tokens=num_tokens,
                        wanted=tuple(counts.wanted[number, modality_id, experts].tolist()),
                        dropped=tuple(counts.dropped[number, modality_id, experts].tolist()),
                        entropy=total / num_tokens if num_tokens else math.nan,
                    )
                )
    return RoutingStatistics(tuple(rows))


def load_by_modality(layout: RoutingLayout, counts: RoutingCounts) -> dict[str, torch.Tensor]:
    """
    Computes the load of the experts, in the form that [`~toolbox.routing.expert_load`] returns.

    Args:
        layout ([`RoutingLayout`]):
            The routed experts of the model.
        counts ([`RoutingCounts`]):
            Counts of any number of batches.

    Returns:
        `dict[str, torch.Tensor]`: Share of the modality's choices that fell on each expert, by modality, as tensors
        `(layers, num_experts)` of type float32 on the CPU. NaN for experts that do not serve the modality and for
        missing experts.
    """
    loads = {}
    for modality_id, modality in enumerate(layout.modalities):
        wanted = counts.wanted[:, modality_id].cpu().float()
        load = wanted / wanted.sum(dim=-1, keepdim=True).clamp(min=1)
        for number, layer in enumerate(layout.layers):
            load[number, layer.num_experts :] = torch.nan
            for group in layer.groups:
                if modality not in group.modalities:
                    first = layer.first_of(group.name)
                    load[number, first : first + group.num_experts] = torch.nan
        loads[modality] = load
    return loads
