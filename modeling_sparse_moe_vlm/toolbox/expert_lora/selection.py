"""Which experts get adapters: by layer, group, modality, index, projection or measured load.

config = expert_lora_config(model, modalities=["image"], r=8)
busy = busiest_experts(model, measure_routing(model, batches), share=0.25, modality="image")
config = expert_lora_config(model, experts=busy, attention=True)
model = get_peft_model(model, config)
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
from .processes import prepare_for_adapters

# What the modules that choose experts are called.
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
    r: int = 8,
    **options: Any,
) -> ExpertLoraConfig:
    """
    The PEFT configuration of LoRA on some of a model's experts, all of them by default: for `get_peft_model`, or for
    `model.add_adapter`. The adapters run factored at once. All names in it are full, so nothing else is adapted.

    Always-on groups of the configuration are experts, too: dense networks, which have adapters as such. Groups of one
    modality leave tokens of the others as they are; attention and routers serve all.

    Args:
        model (`PreTrainedModel`):
            Any model whose experts use Transformers' experts interface.
        layers (`Collection[int]`, *optional*):
            Only these layers. Layers that share a pool of experts go together.
        groups (`Collection[str]`, *optional*):
            Only these groups of experts. Where the configuration has none: parts of module names, as `"vision_moe"`.
        modalities (`Collection[str]`, *optional*):
            Only groups that serve no other modality than these.
        experts (`Collection[int]` or `Mapping[str, Collection[int]]`, *optional*):
            Only these routed experts, by index within their group: of every experts module alike, or by the name of one
            (or the end of it), as [`busiest_experts`] returns them. Empty for none: attention or routers alone.
        projections (`Collection[str]`, *optional*):
            Only some of `"gate"`, `"up"` and `"down"`.
        expert_ranks (`Sequence[int]` or `Mapping[str, Sequence[int]]`, *optional*):
            Rank of each routed expert, at most `r`, 0 for none; for every experts module alike, or by name.
        attention (`bool`, defaults to `False`):
            Whether the linear layers of the decoder's attention get adapters.
        routers (`bool`, defaults to `False`):
            Whether the routers of these groups are trained, in full, and saved with the adapter; else they are frozen.
        r (`int`, defaults to 8):
            The rank.
        **options:
            Further arguments of [`~toolbox.expert_lora.ExpertLoraConfig`], as `lora_alpha`, `lora_dropout`, `use_dora`.

    Returns:
        [`~toolbox.expert_lora.ExpertLoraConfig`]

    Raises:
        ValueError: If something that is asked for is not there; the message says what there is.
    """
    model = base_model_of(model)
    config = experts_config_of(model.config)
    check(
        experts is None or expert_ranks is None,
        "`experts` and `expert_ranks` both choose experts: pass one; rank 0 is for an expert without adapter.",
    )
    banks = expert_banks(model)
    check(bool(banks), f"{type(model).__name__} has no experts that run through Transformers' experts interface.")
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
    lora = ExpertLoraConfig(
        r=r,
        # Empty rather than `None`, for which PEFT would take what it knows of the type of model.
        target_modules=target_modules,
        target_parameters=target_parameters or None,
        modules_to_save=_routers(model, banks) if routers else None,
        expert_ranks=ranks,
        gate_up=halves.pop() if is_fused and len(halves) == 1 else None,
        **options,
    )
    prepare_for_adapters(model, lora)
    run_factored(lora, [part for bank in banks if not bank.always_on for part in bank.parts.values()])
    tell_token_rows(model)
    return lora


def busiest_experts(
    model: PreTrainedModel, routing: Any, *, share: float = 0.25, modality: str | None = None
) -> dict[str, list[int]]:
    """
    The routed experts that most tokens chose, for `expert_lora_config(model, experts=…)`.

    Args:
        model (`PreTrainedModel`):
            The model.
        routing ([`~toolbox.routing.RoutingStatistics`], [`~toolbox.routing.RoutingCounts`], …):
            Measured routing, in any form that [`~toolbox.placement.plan_expert_placement`] takes: also counts of shape
            `(layers, experts)`, or such by modality.
        share (`float`, defaults to 0.25):
            Which share of the experts of each group in each place to take, rounded up.
        modality (`str`, *optional*):
            The modality whose tokens count; all by default.

    Returns:
        `dict[str, list[int]]`: by name of an experts module, the indices, busiest first. Experts that no such token
        chose are not among them.

    Raises:
        ValueError: If the routing does not fit the model or has no such tokens, or `share` is not in (0, 1].
    """
    check(0 < share <= 1, f"`share` must be greater than 0 and at most 1, got {share!r}.")
    model = base_model_of(model)
    # What is measured in a model with expert groups says nothing of experts that it had before.
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
    """The banks of these layers, each of which must have experts unless `some` is enough."""
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
        f"no group of experts serves only {list(modalities)} ({there}): adapters on others would change other "
        "modalities, too. Choose by `groups` if that is meant.",
    )
    return found


def _group_names(banks: list[ExpertBank]) -> list[str]:
    """The groups of the configuration, or what tells names of modules apart."""
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
    """Names of the dense networks' and of the stacks' weights, and the ranks of the latter's experts."""
    given = experts if expert_ranks is None else expert_ranks
    _check_names(banks, given)
    modules: list[str] = []
    parameters: list[str] = []
    ranks: dict[str, list[int]] = {}
    for bank in banks:
        of_experts = None if given is None else _ranks(bank, experts, expert_ranks, r)
        for part, of_part in _by_part(bank, of_experts):
            names = [f"{part}.{weight}" for weight, of in bank.weights.items() if of & projections]
            if bank.always_on:
                # Chosen by index, routed experts alone are meant.
                modules += names if given is None else []
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
            f"layers {list(bank.layers)} share the experts of {bank.name}: have all in `layers`, or none.",
        )


def _check_names(banks: list[ExpertBank], given: Any) -> None:
    if isinstance(given, Mapping):
        names = [bank.name for bank in banks if not bank.always_on]
        unknown = [key for key in given if not any(_ends_with(name, key) for name in names)]
        check(not unknown, f"{unknown} name no routed experts that are chosen: those are {names}.")


def _ends_with(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _ranks(bank: ExpertBank, experts: Any, expert_ranks: Any, r: int) -> list[int]:
    """The rank of each routed expert, from what is given of the two; none for always-on experts."""
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
    """The linear layers within the attention of the decoder."""
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
    """The routers that send tokens to these experts: modules beside them, or in the layers of their pool."""
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
    check(bool(routers), f"no router was found: no module beside the experts is called {' or '.join(ROUTER_NAMES)}.")
    return list(dict.fromkeys(routers))
