"""Computes the load of each experts module from measured routing, in any of its forms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from transformers import PreTrainedConfig

from ..expert_modules import first_number, place_of, places_of_layers

# Share of a modality's choices, by experts module and modality. The shares of a modality sum to 1 over modules.
Loads = dict[str, dict[str, float]]
# Choices of each expert, by experts module and modality, in the unit of the measurement.
Counts = dict[str, dict[str, list[float]]]
# Counts or shares by modality, sparse layer and expert of the layer.
_Table = dict[str, list[list[float]]]

EVEN = "all"  # the only "modality" if no routing was measured


def expert_loads(sizes: Mapping[str, int], config: PreTrainedConfig, routing: Any = None) -> Loads:
    """
    Computes the share of every modality's choices that falls on each experts module.

    Args:
        sizes (`Mapping[str, int]`):
            Number of experts by name of the experts module, in the model's order.
        config (`PreTrainedConfig`):
            Configuration of the decoder.
        routing (`Any`, *optional*):
            Measured routing, see [`~toolbox.placement.plan_expert_placement`]. By default, all experts of a layer have
            the same load.

    Returns:
        `dict[str, dict[str, float]]`: Shares by module and modality. Modalities without choices are left out.

    Raises:
        ValueError: In the same cases as [`expert_counts`], and if the routing contains no choices.
    """
    counts = expert_counts(sizes, config, routing)
    if sizes and not any(sum(of_experts) for of in counts.values() for of_experts in of.values()):
        raise ValueError(
            "`routing` is empty: no token chose any expert. Measure it on some batches, or leave it out to plan by "
            "bytes only."
        )
    return _normalise({name: {m: sum(of_experts) for m, of_experts in of.items()} for name, of in counts.items()})


def with_unmeasured_layers(loads: Loads, names: Sequence[str], num_measured_layers: int) -> Loads:
    """
    Adds the experts of layers in which no routing was measured. Every layer gets the same load.

    Args:
        loads (`dict[str, dict[str, float]]`):
            Loads of the layers in which routing was measured, from [`expert_loads`].
        names (`Sequence[str]`):
            Names of the experts modules of the other layers, one per layer.
        num_measured_layers (`int`):
            Number of layers in which routing was measured.

    Returns:
        `dict[str, dict[str, float]]`: Loads by module and modality. The loads of a modality sum to 1 over modules.
    """
    num_layers = num_measured_layers + len(names)
    modalities = next(iter(loads.values()), {})
    scaled = {
        name: {modality: load * num_measured_layers / num_layers for modality, load in of.items()}
        for name, of in loads.items()
    }
    return scaled | {name: dict.fromkeys(modalities, 1 / num_layers) for name in names}


def expert_counts(sizes: Mapping[str, int], config: PreTrainedConfig, routing: Any = None) -> Counts:
    """
    Computes the choices of each expert of each module, in the unit of the routing.

    Args:
        sizes (`Mapping[str, int]`):
            Number of experts by name of the experts module, in the model's order.
        config (`PreTrainedConfig`):
            Configuration of the decoder.
        routing (`Any`, *optional*):
            Measured routing, as for [`expert_loads`].

    Returns:
        `dict[str, dict[str, list[float]]]`: Choices of each expert, by module and modality.

    Raises:
        ValueError: If the routing does not fit the model, or if it has a negative or infinite count, an unknown
            modality, or no entry for a layer. The message names the modality, the layer and the count.
    """
    if routing is None:
        return _even_counts(sizes, config)
    if (rows := _rows(routing)) is not None:
        counts = _counts_of_rows(rows, sizes, config)
    else:
        counts = _counts_of_table(_table(routing, config), sizes, config)
    return counts


def _even_counts(sizes: Mapping[str, int], config: PreTrainedConfig) -> Counts:
    """Distributes one choice per sparse layer evenly over its experts."""
    members = _members(sizes, config)
    layers = places_of_layers(members, config)
    num_experts = {place: sum(sizes[name] for name in names) for place, names in members.items()}
    counts: Counts = {name: {} for name in sizes}
    for place in layers:
        _add(counts, members[place], sizes, EVEN, [1 / num_experts[place]] * num_experts[place])
    return counts


def _counts_of_table(table: _Table, sizes: Mapping[str, int], config: PreTrainedConfig) -> Counts:
    members = _members(sizes, config)
    layers = places_of_layers(members, config)
    counts: Counts = {name: {} for name in sizes}
    for modality, of_layers in table.items():
        _check_modality(modality, config)
        if len(of_layers) != len(layers):
            raise ValueError(
                f"`routing` has {len(of_layers)} layers for {modality!r}, but the model has {len(layers)} with experts."
            )
        for place, of_experts in zip(layers, of_layers, strict=True):
            numbers = _checked(of_experts, modality, place)
            num_experts = sum(sizes[name] for name in members[place])
            if len(numbers) < num_experts or any(numbers[num_experts:]):
                raise ValueError(f"`routing` has {len(numbers)} experts for {place!r}, which has {num_experts}.")
            _add(counts, members[place], sizes, modality, numbers)
    return counts


def _members(sizes: Iterable[str], config: PreTrainedConfig) -> dict[str, list[str]]:
    """Returns the names of the experts modules of each place."""
    members: dict[str, list[str]] = {}
    for name in sizes:
        members.setdefault(place_of(name, config)[0], []).append(name)
    return members


def _check_modality(modality: str, config: PreTrainedConfig) -> None:
    known = [EVEN, *getattr(config, "modalities", [modality])]
    if modality not in known:
        raise ValueError(f"`routing` has the modality {modality!r}, which is not one of the model's: {known[1:]}.")


def _checked(counts: Sequence[Any], modality: str, place: str) -> list[float]:
    """Checks the counts of a layer's experts, and returns them with 0 instead of NaN."""
    for expert, count in enumerate(counts):
        is_number = isinstance(count, int | float) and not isinstance(count, bool)
        if not is_number or count < 0 or math.isinf(count):
            raise ValueError(
                f"`routing` has {count!r} for {modality!r} and expert {expert} of {place!r}: counts and shares are "
                "finite numbers of at least 0 (or NaN if the layer has no such expert for the modality)."
            )
    return [0.0 if math.isnan(count) else float(count) for count in counts]


def _add(counts: Counts, names: list[str], sizes: Mapping[str, int], modality: str, numbers: Sequence[float]) -> None:
    """Adds the numbers of consecutive experts to the counts of the modules that contain these experts."""
    first = 0
    for name in names:
        own = numbers[first : first + sizes[name]]
        first += sizes[name]
        so_far = counts[name].setdefault(modality, [0.0] * sizes[name])
        counts[name][modality] = [a + float(b) for a, b in zip(so_far, own, strict=True)]


def _normalise(loads: Loads) -> Loads:
    totals: dict[str, float] = {}
    for by_modality in loads.values():
        for modality, load in by_modality.items():
            totals[modality] = totals.get(modality, 0.0) + load
    used = [modality for modality, total in totals.items() if total > 0]
    return {name: {m: loads[name].get(m, 0.0) / totals[m] for m in used} for name in loads}


def _rows(routing: Any) -> list[Mapping[str, Any]] | None:
    """Returns the rows of the routing if it is a [`RoutingStatistics`] or its JSON form; `None` otherwise."""
    rows = routing.get("rows") if isinstance(routing, Mapping) else getattr(routing, "rows", None)
    if rows is None:
        return None
    return [asdict(row) if is_dataclass(row) and not isinstance(row, type) else row for row in rows]


def _counts_of_rows(rows: Iterable[Mapping[str, Any]], sizes: Mapping[str, int], config: PreTrainedConfig) -> Counts:
    counts: Counts = {name: {} for name in sizes}
    modules: dict[tuple[str, str | None], list[str]] = {}
    names_of_places = _names_of_places(sizes, config)
    for name in sizes:
        place, group = place_of(name, config)
        modules.setdefault((names_of_places[place], group), []).append(name)
    lacking = dict(modules)
    for row in rows:
        names = modules.get((row["place"], row["group"]))
        if names is None:
            raise ValueError(
                f"`routing` has {row['place']!r} with group {row['group']!r}, which the model does not have."
            )
        _check_modality(row["modality"], config)
        numbers = _checked(row["wanted"], row["modality"], row["place"])
        if sum(sizes[name] for name in names) != len(numbers):
            raise ValueError(f"`routing` has {len(numbers)} experts for {row['place']!r}, unlike the model.")
        if row["modality"] in counts[names[0]]:
            raise ValueError(
                f"`routing` has {row['place']!r} with group {row['group']!r} twice for {row['modality']!r}."
            )
        _add(counts, names, sizes, row["modality"], numbers)
        lacking.pop((row["place"], row["group"]), None)
    for place, group in lacking:
        raise ValueError(f"`routing` has no row for {place!r} with group {group!r}, which the model has.")
    return counts


def _names_of_places(sizes: Mapping[str, int], config: Any) -> dict[str, str]:
    """Returns the name of each place in routing statistics, such as `"layer_3"` or `"pool_0"`."""
    places = list(_members(sizes, config))
    if not hasattr(config, "sparse_layers"):
        return {place: f"layer_{first_number(place)}" for place in places}
    # By the order of the layers, not by name: names of modules outside the decoder may contain numbers as well.
    numbered = zip(config.sparse_layers, places_of_layers(places, config))
    pools = ((layer, place, config.layer_pool(layer)) for layer, place in numbered)
    return {place: f"layer_{layer}" if pool is None else f"pool_{pool}" for layer, place, pool in pools}


def _table(routing: Any, config: PreTrainedConfig) -> _Table:
    """Returns counts by modality, layer and expert, from a mapping, a [`RoutingCounts`], or one table of all tokens."""
    if hasattr(routing, "wanted"):
        return {name: routing.wanted[:, m].tolist() for m, name in enumerate(config.modalities)}
    by_modality = routing if isinstance(routing, Mapping) else {EVEN: routing}
    table: _Table = {}
    for modality, of_layers in by_modality.items():
        of_layers = of_layers.tolist() if hasattr(of_layers, "tolist") else of_layers
        table[modality] = of_layers
        is_table = isinstance(of_layers, list | tuple)
        if not is_table or not all(isinstance(of_experts, list | tuple) for of_experts in of_layers):
            raise ValueError(
                "`routing` must have counts by layer and expert: a tensor of shape (layers, experts), one for each "
                f"modality, or what `measure_routing`, `routing_statistics` or `expert_load` return; got {routing!r}."
            )
    return table
