"""
Selection of the experts that get adapters: by layer, group, modality, index, projection or measured load.

```python
config = expert_lora_config(model, modalities=["image"], r=8)
busy = busiest_experts(model, measure_routing(model, batches), share=0.25, modality="image")
config = expert_lora_config(model, experts=busy, attention=True)
model = get_peft_model(model, config)
```
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...checks import check
from ...experts_config import experts_config_of
from ..expert_modules import (
    PROJECTIONS,
    ExpertBank,
    base_model_of,
    decoder_name,
    expert_banks,
    is_pool,
    layers_of_modules,
    modules_of,
    our_experts_config,
    sparse_blocks,
)
from ..placement.load import expert_counts
from .adapted_layer import run_factored
from .batch_rows import tell_token_rows
from .config import ExpertLoraConfig
from .full_modules import connector_modules
from .processes import prepare_for_adapters

# Names of the modules that choose experts.
ROUTER_NAMES = ("gate", "router")


def expert_lora_config(
    model: PreTrainedModel,
    *,
    layers: Collection[int] | None = None,
    groups: Collection[str] | None = None,
    modalities: Collection[str] | None = None,
    experts: Collection[int] | Mapping[str, Collection[int]] | None = None,
    projections: Collection[str] | None = None,
    expert_ranks: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    attention: bool = False,
    routers: bool = False,
    connector: bool = False,
    r: int = 8,
    **options: Any,
) -> ExpertLoraConfig:
    """
    Makes the PEFT configuration for LoRA on the experts of a model. By default, all experts get adapters. The arguments
    `layers`, `groups`, `modalities`, `experts` and `projections` restrict the selection, and can be combined.

    Pass the configuration to `get_peft_model` or `model.add_adapter`. The adapters run factored without a call of
    [`~toolbox.expert_lora.factor_expert_lora`]. The configuration contains full module names, so no other module gets
    an adapter.

    Always-on groups are experts, too. They are dense networks, whose linear layers get adapters. Adapters on a group
    apply only to tokens of the modalities that it serves. For example, adapters on groups that serve only images do not
    change the outputs for inputs without images. Attention and routers serve all modalities.

    Args:
        model (`PreTrainedModel`):
            Any model whose experts use the experts interface of Transformers.
        layers (`Collection[int]`, *optional*):
            Indices of the layers to adapt. Either all or none of the layers that share a pool of experts must be
            included.
        groups (`Collection[str]`, *optional*):
            Names of the groups of experts to adapt. If the configuration of the model has no groups, parts of module
            names, such as `"vision_moe"`.
        modalities (`Collection[str]`, *optional*):
            Adapts only groups that serve no modalities other than these.
        experts (`Collection[int]` or `Mapping[str, Collection[int]]`, *optional*):
            Indices of the routed experts to adapt, within their group. Either the same indices for all experts modules,
            or indices by name of a module (or by the end of its name), as [`busiest_experts`] returns them. Pass an
            empty list to adapt no experts, only attention. Always-on groups are not adapted if `experts` is given.
        projections (`Collection[str]`, *optional*):
            Projections to adapt, some of `"gate"`, `"up"` and `"down"`.
        expert_ranks (`Sequence[int]` or `Mapping[str, Sequence[int]]`, *optional*):
            Rank of each routed expert, from 0 (no adapter) to `r`. Either the same ranks for all experts modules, or
            ranks by name of a module. Cannot be combined with `experts`. Always-on groups are not adapted if
            `expert_ranks` is given.
        attention (`bool`, *optional*, defaults to `False`):
            Whether to adapt the linear layers of the attention of the decoder, in the selected layers.
        routers (`bool`, *optional*, defaults to `False`):
            Whether to train the routers of the selected experts in full and save them with the adapter. Otherwise, the
            routers are frozen.
        connector (`bool`, *optional*, defaults to `False`):
            Whether to train the connector (the modules between the encoders and the decoder) in full and save it with
            the adapter.
        r (`int`, *optional*, defaults to 8):
            Rank of the adapters.
        options:
            Additional arguments of [`~toolbox.expert_lora.ExpertLoraConfig`], such as `lora_alpha`, `lora_dropout` or
            `use_dora`.

    Returns:
        [`~toolbox.expert_lora.ExpertLoraConfig`]: The configuration.

    Raises:
        ValueError: If the model has no experts, if the model does not have something that is selected (the message says
            what it has), if nothing would get an adapter, or if several processes share the model and its linear
            layers, routers or connector cannot be adapted.
    """
    model = base_model_of(model)
    config = experts_config_of(model.config)
    check(
        experts is None or expert_ranks is None,
        "`experts` and `expert_ranks` both choose experts: pass only one (rank 0 means no adapter).",
    )
    banks = expert_banks(model)
    check(
        bool(banks),
        f"{type(model).__name__} has no experts that run through Transformers' experts interface. Use "
        "`decoder_lora_config` for adapters on its attention and feed-forward blocks.",
    )
    without = experts is not None and not experts
    banks = _in_groups(_in_layers(banks, layers, config, some=without), groups, modalities, config)
    chosen = set() if without else _projections(banks, projections)
    if not without:
        _check_pools(banks, layers)
    target_modules, target_parameters, ranks = _targets([] if without else banks, chosen, experts, expert_ranks, r)
    if attention:
        target_modules += _attention(model, layers)
    none_to_choose = " (always-on groups have none to choose from)" if all(bank.always_on for bank in banks) else ""
    check(
        bool(target_modules or target_parameters),
        f"nothing gets an adapter: choose some `experts`{none_to_choose}, or pass `attention=True`.",
    )
    halves = chosen & {"gate", "up"}
    is_fused = any({"gate", "up"} <= of for bank in banks if not bank.always_on for of in bank.weights.values())
    in_full = [*(_routers(model, banks) if routers else []), *(connector_modules(model) if connector else [])]
    lora = ExpertLoraConfig(
        r=r,
        # If this were `None` instead of an empty list, PEFT would use its defaults for the type of the model.
        target_modules=target_modules,
        target_parameters=target_parameters or None,
        modules_to_save=in_full or None,
        expert_ranks=ranks,
        gate_up=halves.pop() if is_fused and len(halves) == 1 else None,
        **options,
    )
    prepare_for_adapters(model, lora)
    stacked = [bank for bank in banks if not bank.always_on and not bank.is_unfused]
    run_factored(lora, [part for bank in stacked for part in bank.parts.values()])
    tell_token_rows(model)
    return lora


def busiest_experts(
    model: PreTrainedModel, routing: Any, *, share: float = 0.25, modality: str | None = None
) -> dict[str, list[int]]:
    """
    Returns the routed experts that were chosen by most tokens, for the argument `experts` of [`expert_lora_config`].

    Args:
        model (`PreTrainedModel`):
            The model.
        routing (`RoutingStatistics`, `RoutingCounts`, `Mapping` or `torch.Tensor`):
            Measured routing, in any form that [`~toolbox.placement.plan_expert_placement`] takes. These include counts
            of shape `(layers, experts)`, and dicts of such counts by modality.
        share (`float`, *optional*, defaults to 0.25):
            Share of the experts of each experts module to return, greater than 0 and at most 1. The number of experts
            is rounded up.
        modality (`str`, *optional*):
            Modality of the tokens to count. By default, tokens of all modalities count.

    Returns:
        `dict[str, list[int]]`: Indices of the experts by name of an experts module, busiest first. Experts that were
        not chosen by any counted token are left out.

    Raises:
        ValueError: If `routing` does not fit the model, if it has no tokens of this modality, if no counted token chose
            an expert, or if `share` is out of range.
    """
    check(0 < share <= 1, f"`share` must be greater than 0 and at most 1, got {share!r}.")
    model = base_model_of(model)
    # In a model with expert groups, only experts of these groups are measured, not those that the model had before.
    has_no_groups = our_experts_config(model.config) is None
    banks = [bank for bank in expert_banks(model) if not bank.always_on and (has_no_groups or bank.group is not None)]
    sizes = {bank.name: sum(bank.sizes) for bank in banks}
    counts = expert_counts(sizes, experts_config_of(model.config), routing)
    known = dict.fromkeys(name for of_modalities in counts.values() for name in of_modalities)
    check(
        modality is None or modality in known,
        f"`routing` has no tokens of modality {modality!r}, but of {list(known)}.",
    )
    busiest = {}
    for name, of_modalities in counts.items():
        of_experts = [0.0] * sizes[name]
        for its, numbers in of_modalities.items():
            if modality in (None, its):
                of_experts = [a + b for a, b in zip(of_experts, numbers, strict=True)]
        order = sorted(range(sizes[name]), key=lambda expert: -of_experts[expert])[: math.ceil(share * sizes[name])]
        if used := [expert for expert in order if of_experts[expert] > 0]:
            busiest[name] = used
    check(bool(busiest), f"no token{'' if modality is None else f' of modality {modality!r}'} chose any expert.")
    return busiest


def _in_layers(
    banks: list[ExpertBank], layers: Collection[int] | None, config: PreTrainedConfig, some: bool
) -> list[ExpertBank]:
    """
    Returns the banks of these layers. Each layer must have experts, unless `some` is true, in which case layers without
    experts are allowed.
    """
    if layers is None:
        return banks
    check(len(layers) > 0, "`layers` is empty: leave it out for all of them.")
    beyond = [layer for layer in layers if not 0 <= layer < config.num_hidden_layers]
    check(not beyond, f"`layers` names {beyond}, but the model has layers 0 to {config.num_hidden_layers - 1}.")
    sparse = sorted({layer for bank in banks for layer in bank.layers})
    dense = [layer for layer in layers if layer not in sparse]
    check(some or not dense, f"`layers` names {dense}, which have no experts; layers with experts are {sparse}.")
    return [bank for bank in banks if set(bank.layers) & set(layers)]


def _in_groups(
    banks: list[ExpertBank],
    groups: Collection[str] | None,
    modalities: Collection[str] | None,
    config: PreTrainedConfig,
) -> list[ExpertBank]:
    if groups is not None:
        check(len(groups) > 0, "`groups` is empty: for no adapters on experts, pass `experts=[]`.")
        missing = [group for group in groups if not any(bank.is_in_group(group) for bank in banks)]
        check(not missing, f"`groups` names {missing}, but the groups of these layers are {_group_names(banks)}.")
        banks = [bank for bank in banks if any(bank.is_in_group(group) for group in groups)]
    if modalities is None:
        return banks
    known = getattr(config, "modalities", [])
    check(
        bool(known) and hasattr(config, "expert_groups"),
        f"the configuration of {config.model_type!r} does not say which modalities its experts serve: choose by "
        f"`groups` instead, of {_group_names(banks)}.",
    )
    unknown = [modality for modality in modalities if modality not in known]
    check(not unknown, f"`modalities` names {unknown}, but the model's are {known}.")
    served = {group["name"]: list(group["modalities"]) for group in config.expert_groups}
    # Experts of no group, which a model had before it was given some, serve every token.
    found = [bank for bank in banks if set(served.get(bank.group or "", known)) <= set(modalities)]
    there = "; ".join(f"{name}: {', '.join(served.get(name, known))}" for name in _group_names(banks))
    check(
        bool(found),
        f"no group of experts serves only {list(modalities)} ({there}): adapters on other groups would also change "
        "other modalities. To allow that, choose by `groups` instead.",
    )
    return found


def _group_names(banks: list[ExpertBank]) -> list[str]:
    """Returns the groups of the configuration, or else the parts of the module names that differ between the banks."""
    of_banks = [
        [bank.group] if bank.group is not None else [part for part in bank.name.split(".") if not part.isdigit()]
        for bank in banks
    ]
    common = set.intersection(*map(set, of_banks)) if banks and banks[0].group is None else set()
    names = dict.fromkeys(name for names in of_banks for name in names)
    return [name for name in names if name not in common] or list(names)


def _projections(banks: list[ExpertBank], projections: Collection[str] | None) -> set[str]:
    there = {projection for bank in banks for of in bank.weights.values() for projection in of}
    chosen = there if projections is None else set(projections)
    check(
        bool(chosen) and chosen <= there,
        f"`projections` must be some of {[name for name in PROJECTIONS if name in there]}, which these experts have, "
        f"got {projections!r}.",
    )
    return chosen


def _targets(
    banks: list[ExpertBank], projections: set[str], experts: Any, expert_ranks: Any, r: int
) -> tuple[list[str], list[str], dict[str, list[int]]]:
    """Returns the names of the linear layers of dense networks, the names of stacks, and the ranks of their experts."""
    given = experts if expert_ranks is None else expert_ranks
    _check_names(banks, given)
    modules: list[str] = []
    parameters: list[str] = []
    ranks: dict[str, list[int]] = {}
    for bank in banks:
        of_experts = None if given is None else _ranks(bank, experts, expert_ranks, r)
        for part, of_part in _by_part(bank, of_experts):
            weights = [weight for weight, of in bank.weights.items() if of & projections]
            names = [f"{part}.{weight}" for weight in weights]
            if bank.always_on:
                # A choice by index only applies to routed experts.
                modules += names if given is None else []
            elif bank.is_unfused:
                check(
                    expert_ranks is None,
                    "`expert_ranks` is for stacked experts, but this model has `unfused_experts`: choose experts with "
                    "`experts`.",
                )
                numbers = [i for i in range(sum(bank.sizes)) if of_part is None or of_part[i]]
                modules += [f"{part}.{i}.{weight}" for i in numbers for weight in weights]
            elif of_part is None:
                parameters += names
            elif any(of_part):
                parameters += names
                ranks |= dict.fromkeys(names, of_part)
    return modules, parameters, ranks


def _check_pools(banks: list[ExpertBank], layers: Collection[int] | None) -> None:
    for bank in banks:
        check(
            layers is None or set(bank.layers) <= set(layers),
            f"layers {list(bank.layers)} share the experts of {bank.name}: include all of them in `layers`, or none.",
        )


def _check_names(banks: list[ExpertBank], given: Any) -> None:
    if isinstance(given, Mapping):
        names = [bank.name for bank in banks if not bank.always_on]
        unknown = [key for key in given if not any(_ends_with(name, key) for name in names)]
        check(not unknown, f"{unknown} are not routed experts of the selection, which are {names}.")


def _ends_with(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _ranks(bank: ExpertBank, experts: Any, expert_ranks: Any, r: int) -> list[int]:
    """Returns the rank of each routed expert, from `experts` or `expert_ranks`; an empty list for always-on experts."""
    num_experts = 0 if bank.always_on else sum(bank.sizes)
    given = experts if expert_ranks is None else expert_ranks
    if isinstance(given, Mapping):
        given = next((value for key, value in given.items() if _ends_with(bank.name, key)), None)
    if given is None or bank.always_on:
        return [0] * num_experts
    if expert_ranks is not None:
        check(
            len(given) == num_experts and all(0 <= rank <= r for rank in given),
            f"`expert_ranks` of {bank.name} must be {num_experts} numbers from 0 to r = {r}, got {list(given)}.",
        )
        return list(given)
    beyond = [expert for expert in given if not 0 <= expert < num_experts]
    check(not beyond, f"`experts` names {beyond}, but {bank.name} has experts 0 to {num_experts - 1}.")
    return [r if expert in given else 0 for expert in range(num_experts)]


def _by_part(bank: ExpertBank, of_experts: list[int] | None) -> Iterator[tuple[str, list[int] | None]]:
    first = 0
    for name, size in zip(bank.parts, [0] if bank.always_on else bank.sizes, strict=True):
        yield name, None if of_experts is None else of_experts[first : first + size]
        first += size


def _attention(model: PreTrainedModel, layers: Collection[int] | None) -> list[str]:
    """Returns the names of the linear layers in the attention of the decoder."""
    decoder = decoder_name(model)
    prefix = f"{decoder}." if decoder else ""
    layer_of = layers_of_modules(model)
    return [
        name
        for name, module in modules_of(model)
        if isinstance(module, nn.Linear)
        and name.startswith(prefix)
        and (layers is None or layer_of[name] in layers)
        and any("attn" in part or "attention" in part for part in name.removeprefix(prefix).split("."))
    ]


def _routers(model: PreTrainedModel, banks: list[ExpertBank]) -> list[str]:
    """Returns the names of the routers of these experts: modules next to them, or in the layers of their pool."""
    routers = []
    blocks = sparse_blocks(model)
    for name, module in modules_of(model):
        block, _, last = name.rpartition(".")
        if last not in ROUTER_NAMES or not any(parameter.dim() == 2 for parameter in module.parameters()):
            continue
        pooled = [bank for bank in banks if is_pool(bank.name) and block in blocks]
        in_pool = any(blocks[block].layer_idx in bank.layers for bank in pooled)
        if in_pool or any(bank.name.startswith(f"{block}.") for bank in banks):
            routers.append(name)
    check(
        bool(routers),
        f"no router was found: no module next to the experts is called {' or '.join(ROUTER_NAMES)}. Pass "
        "`routers=False`.",
    )
    return list(dict.fromkeys(routers))
