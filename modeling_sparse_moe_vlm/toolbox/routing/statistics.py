"""Routing statistics: how each modality is distributed over the routed experts, and whether its routing collapsed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ...experts_config import SparseMoeVlmExpertsConfig, experts_config_of
from .counts import RoutingCounts, measure_routing

# Figures that are reported for every place, group and modality; properties of [`GroupRouting`].
FIGURES = ("max_violation", "entropy", "effective_experts", "dead_experts", "dropped_share", "experts_per_token")
# Routing has collapsed if the effective number of experts is below this point between the smallest possible number (0)
# and all experts (1).
COLLAPSED_BELOW = 0.25
# With fewer choices per expert, some experts may be idle by chance.
CHOICES_PER_EXPERT = 8


@dataclass(frozen=True)
class GroupRouting:
    """
    Routing of one modality within one routed group of one place. A place is a layer, or a pool of layers that share
    experts.

    Args:
        place (`str`): Name of the place, such as `"layer_3"` or `"pool_0"`.
        group (`str`): Name of the expert group.
        modality (`str`): Name of the modality.
        num_tokens (`int`): Number of tokens of the modality. In a pool, a token counts once per layer.
        wanted (`tuple[int, ...]`): Number of tokens that chose each of the E experts of the group.
        dropped (`tuple[int, ...]`): Number of these tokens that exceeded the capacity of the expert.
        entropy (`float`):
            Mean entropy of the router's probabilities within the group, in nats: log E if they are uniform, 0 if they
            select one expert. NaN without tokens.
    """

    place: str
    group: str
    modality: str
    num_tokens: int
    wanted: tuple[int, ...]
    dropped: tuple[int, ...]
    entropy: float

    @property
    def load(self) -> list[float]:
        """Share of each expert in the choices of the group. The sum is 1, or 0 without choices."""
        return [count / max(sum(self.wanted), 1) for count in self.wanted]

    @property
    def max_violation(self) -> float:
        """
        Relative excess of the largest load over the mean load (MaxVio, arXiv 2408.15664): 0 if the load is balanced,
        NaN without choices.
        """
        return len(self.wanted) * max(self.load) - 1 if any(self.wanted) else math.nan

    @property
    def dead_experts(self) -> int:
        """Number of experts that no token chose; 0 without tokens."""
        return self.wanted.count(0) if self.num_tokens else 0

    @property
    def dropped_share(self) -> float:
        """Share of the choices that exceeded the capacity of the experts."""
        return sum(self.dropped) / max(sum(self.wanted), 1)

    @property
    def experts_per_token(self) -> float:
        """Mean number of experts of the group that processed a token. NaN without tokens."""
        return (sum(self.wanted) - sum(self.dropped)) / self.num_tokens if self.num_tokens else math.nan

    @property
    def effective_experts(self) -> float:
        """Effective number of experts: the exponential of the load's entropy, which is E if the load is balanced."""
        return math.exp(-sum(share * math.log(share) for share in self.load if share > 0))

    @property
    def is_collapsed(self) -> bool:
        """
        Whether the tokens use far fewer experts than they could. Always `False` for fewer than 8 choices per expert,
        and if every token goes to all experts.
        """
        num_experts, choices = len(self.wanted), sum(self.wanted)
        if choices < CHOICES_PER_EXPERT * num_experts:
            return False
        fewest = max(choices / self.num_tokens, 1.0)  # a token that chooses two experts uses at least two
        return self.effective_experts - fewest < COLLAPSED_BELOW * (num_experts - fewest)

    def figures(self) -> dict[str, float]:
        """Returns the figures (`max_violation`, `entropy` and so on) by name."""
        return {name: getattr(self, name) for name in FIGURES}


@dataclass(frozen=True)
class RoutingStatistics:
    """
    Routing statistics by place, group, and modality that the group serves. `str()` formats them as a table.

    Args:
        rows (`tuple[GroupRouting, ...]`): One row for each, in the order of layers, groups and modalities.
    """

    rows: tuple[GroupRouting, ...]

    def metrics(self) -> dict[str, float]:
        """
        Returns every figure of every row. Modalities without tokens and figures that are NaN are left out.

        Returns:
            `dict[str, float]`: Figures by `"<place>/<group>/<modality>/<figure>"`.
        """
        return {
            f"{row.place}/{row.group}/{row.modality}/{name}": value
            for row in self.rows
            for name, value in row.figures().items()
            if row.num_tokens and not math.isnan(value)
        }

    def loads(self) -> dict[str, float]:
        """
        Returns the load of every expert in every row. Modalities without tokens are left out.

        Returns:
            `dict[str, float]`: Shares by `"<place>/<group>/<modality>/load/<number of the expert in the group>"`.
        """
        return {
            f"{row.place}/{row.group}/{row.modality}/load/{number}": load
            for row in self.rows
            if row.num_tokens
            for number, load in enumerate(row.load)
        }

    def summary(self) -> dict[str, float]:
        """
        Summarises the figures over all places: the maximum of `max_violation`, the minimum of `effective_experts`, the
        sum of `dead_experts`, and the mean of all others.

        Returns:
            `dict[str, float]`: Figures by `"<group>/<modality>/<figure>"`.
        """
        by_name: dict[str, list[float]] = {}
        for name, value in self.metrics().items():
            by_name.setdefault(name.split("/", 1)[1], []).append(value)
        combine: dict[str, Callable[[list[float]], float]] = {
            "max_violation": max,
            "effective_experts": min,
            "dead_experts": sum,
        }
        return {name: combine.get(name.rsplit("/", 1)[1], fmean)(values) for name, values in by_name.items()}

    def alarms(self) -> dict[tuple[str, str, str], str]:
        """
        Returns a message for every place, group and modality whose routing has collapsed. Each modality is checked
        separately, because the total can look balanced although one modality has collapsed.

        Returns:
            `dict[tuple[str, str, str], str]`: Messages by place, group and modality.
        """
        alarms = {}
        for row in self.rows:
            if not row.is_collapsed:
                continue
            everyone = self._all_modalities(row)
            alarms[row.place, row.group, row.modality] = (
                f"Routing has collapsed: in {row.place.replace('_', ' ')}, group '{row.group}', {row.modality} tokens "
                f"use effectively {row.effective_experts:.1f} of {len(row.wanted)} experts (max violation "
                f"{row.max_violation:.2f}, {row.dead_experts} dead); tokens of all modalities together use "
                f"{everyone.effective_experts:.1f} (max violation {everyone.max_violation:.2f}). Balance it: raise "
                "`router_aux_loss_coef` (with `output_router_logits`), or set `router_bias_update_rate`."
            )
        return alarms

    def _all_modalities(self, of: GroupRouting) -> GroupRouting:
        rows = [row for row in self.rows if (row.place, row.group) == (of.place, of.group)]
        return GroupRouting(
            place=of.place,
            group=of.group,
            modality="all",
            num_tokens=sum(row.num_tokens for row in rows),
            wanted=tuple(map(sum, zip(*(row.wanted for row in rows), strict=True))),
            dropped=tuple(map(sum, zip(*(row.dropped for row in rows), strict=True))),
            entropy=math.nan,
        )

    def __str__(self) -> str:
        """Returns a table with one line per row."""
        lines = [["place", "group", "modality", "tokens", *FIGURES]]
        for row in self.rows:
            numbers = [f"{value:.0f}" if isinstance(value, int) else f"{value:.3f}" for value in row.figures().values()]
            lines.append([row.place, row.group, row.modality, str(row.num_tokens), *numbers])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if number < 3 else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def routing_statistics(config: SparseMoeVlmExpertsConfig, counts: RoutingCounts) -> RoutingStatistics:
    """
    Computes the statistics of routing counts. It copies the counts to the CPU, which waits for the device.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        counts ([`RoutingCounts`]):
            Counts of any number of batches.

    Returns:
        [`RoutingStatistics`]: The statistics.
    """
    tokens, wanted, dropped, entropy = (
        tensor.tolist() for tensor in (counts.tokens, counts.wanted, counts.dropped, counts.entropy)
    )
    rows = []
    for layers in config.layers_by_experts:
        pool = config.layer_pool(layers[0])
        numbers = [config.sparse_layers.index(layer) for layer in layers]
        first = 0
        for group in config.layer_expert_groups(layers[0], always_on=False):
            experts = range(first, first + group.num_experts)
            first += group.num_experts
            column = config.routed_group_names.index(group.name)
            for modality_id, modality in enumerate(config.modalities):
                if not group.serves(modality):
                    continue
                num_tokens = tokens[modality_id] * len(layers)
                total = sum(entropy[number][modality_id][column] for number in numbers)
                rows.append(
                    GroupRouting(
                        place=f"layer_{layers[0]}" if pool is None else f"pool_{pool}",
                        group=group.name,
                        modality=modality,
                        num_tokens=num_tokens,
                        wanted=tuple(sum(wanted[number][modality_id][e] for number in numbers) for e in experts),
                        dropped=tuple(sum(dropped[number][modality_id][e] for number in numbers) for e in experts),
                        entropy=total / num_tokens if num_tokens else math.nan,
                    )
                )
    return RoutingStatistics(tuple(rows))


def expert_load(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """
    Measures how the tokens of each modality are distributed over the routed experts. Padding is not counted.

    Args:
        model (`PreTrainedModel`):
            The model.
        batches (`Iterable[Mapping[str, torch.Tensor]]`):
            Model inputs. Without `attention_mask`, there is no padding. Without `mm_token_type_ids`, the placeholders
            define which tokens are images.

    Returns:
        `dict[str, torch.Tensor]`: Share of the modality's choices that fell on each expert, by modality, as tensors
        `(sparse layers, num_experts)` of type float32 on the CPU. The sum of a row is 1, or 0 without tokens of the
        modality. An entry is NaN if the layer has no such expert, or if the expert does not serve the modality. Empty
        if the model has no sparse layers or there are no batches.
    """
    counts = measure_routing(model, batches)
    return {} if counts is None else load_of_counts(experts_config_of(model.config), counts)


def load_of_counts(config: SparseMoeVlmExpertsConfig, counts: RoutingCounts) -> dict[str, torch.Tensor]:
    """
    Computes the load of the experts from routing counts, in the form that [`expert_load`] returns.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.
        counts ([`RoutingCounts`]):
            Counts of any number of batches.

    Returns:
        `dict[str, torch.Tensor]`: Load by modality, `(sparse layers, num_experts)`.
    """
    wanted = counts.wanted.cpu().float()
    load = wanted / wanted.sum(dim=-1, keepdim=True).clamp(min=1)
    return {
        modality: load[:, modality_id] + _gaps(config, config.sparse_layers, modality)
        for modality_id, modality in enumerate(config.modalities)
    }


def _gaps(config: SparseMoeVlmExpertsConfig, layers: list[int], modality: str) -> torch.Tensor:
    """Returns `(layers, num_experts)`: 0 for experts that serve the modality, NaN for others and missing ones."""
    of_layers = [
        [0.0 if group.serves(modality) else torch.nan for group in groups for _ in range(group.num_experts)]
        for groups in (config.layer_expert_groups(layer, always_on=False) for layer in layers)
    ]
    return pad_sequence([torch.tensor(gaps) for gaps in of_layers], batch_first=True, padding_value=torch.nan)
