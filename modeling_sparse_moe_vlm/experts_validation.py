"""Checks of the experts' configuration. Every error message names the field and the fix."""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from .checks import (
    MAX_LAYERS,
    MAX_MODALITIES,
    MAX_WEIGHTS,
    MAX_WIDTH,
    check,
    check_boolean,
    check_choice,
    check_distinct,
    check_dtype,
    check_integer,
    check_layers,
    check_number,
    check_sequence,
    shown,
)
from .expert_groups import BUILTIN_MODALITIES, ExpertGroup, resolve_groups

logger = logging.get_logger(__name__)

ROUTERS = ("softmax", "sigmoid", "top_p")
# Fields whose values are integers of at least 1, numbers of at least 0, and True or False.
_COUNTS = ("decoder_sparse_step", "num_experts_per_tok")
_WIDTHS = ("hidden_size", "moe_intermediate_size")
_NUMBERS = ("initializer_range", "router_aux_loss_coef", "router_z_loss_coef")
_FLAGS = ("norm_topk_prob", "output_router_logits", "unfused_experts")


def _builtin(position: int) -> str | None:
    """Returns the modality of Transformers with this id, or `None` for other ids."""
    return BUILTIN_MODALITIES[position] if position < len(BUILTIN_MODALITIES) else None


def check_expert_fields(config: PreTrainedConfig) -> None:
    """Raises `ValueError` if a single field of the experts' configuration is invalid."""
    for field in _COUNTS:
        check_integer(field, getattr(config, field))
    for field in _WIDTHS:
        check_integer(field, getattr(config, field), at_most=MAX_WIDTH)
    check_dtype("dtype", config.dtype)
    check_integer("num_hidden_layers", config.num_hidden_layers, at_most=MAX_LAYERS)
    for field in _NUMBERS:
        check_number(field, getattr(config, field))
    for field in _FLAGS:
        check_boolean(field, getattr(config, field))
    check_choice("hidden_act", config.hidden_act, ACT2FN)
    check_choice("router", config.router, ROUTERS)
    check_number("router_top_p", config.router_top_p, at_most=1)
    check(config.router_top_p > 0, "`router_top_p` must be more than 0, or no expert would be chosen.")
    check_layers("mlp_only_layers", config.mlp_only_layers, config.num_hidden_layers)
    check_sequence("modalities", config.modalities, str, at_most=MAX_MODALITIES)
    check_distinct("modalities", config.modalities)
    wrong = [name for i, name in enumerate(config.modalities) if name in BUILTIN_MODALITIES and name != _builtin(i)]
    check(
        bool(config.modalities) and config.modalities[0] == "text" and not wrong,
        f"`modalities` must start with 'text', and {BUILTIN_MODALITIES} must have their own places, which are their "
        f"ids in `mm_token_type_ids`; got {list(config.modalities)}.",
    )
    _check_balancing(config)


def _check_balancing(config: PreTrainedConfig) -> None:
    """Raises `ValueError` if a field of the router losses, router biases or expert capacity is invalid."""
    for field in ("router_local_entropy_coef", "router_global_entropy_coef", "router_global_entropy_threshold"):
        value = getattr(config, field)
        if isinstance(value, dict):
            unknown = sorted(set(value) - set(config.modalities))
            check(not unknown, f"`{field}` names {unknown}, but the `modalities` are {config.modalities}.")
            for modality, number in value.items():
                check_number(f"{field}[{modality!r}]", number)
        elif value is not None or field != "router_global_entropy_threshold":
            check_number(field, value)
    if config.router_bias_update_rate is not None:
        check_number("router_bias_update_rate", config.router_bias_update_rate)
    if config.expert_capacity_factor is not None:
        check_number("expert_capacity_factor", config.expert_capacity_factor)
        check(config.expert_capacity_factor > 0, "`expert_capacity_factor` must be more than 0, or None for no limit.")


def resolve_expert_groups(config: PreTrainedConfig) -> None:
    """Fills in the expert groups, and raises `ValueError` if layers, groups and routing contradict each other."""
    config.expert_groups = resolve_groups(
        config.expert_groups,
        modalities=config.modalities,
        num_experts=config.num_experts,
        intermediate_size=config.moe_intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
    )
    by_modality = config.num_experts_per_tok_by_modality or {}
    check(
        isinstance(by_modality, dict) and set(by_modality) <= set(config.modalities),
        f"`num_experts_per_tok_by_modality` must be a dict whose keys are among the `modalities` "
        f"{config.modalities}, got {by_modality!r}.",
    )
    for modality, num_experts in by_modality.items():
        check_integer(f"num_experts_per_tok_by_modality[{modality!r}]", num_experts)

    sparse_layers = config.sparse_layers
    for group in config.expert_groups:
        weights = 3 * group["num_experts"] * group["intermediate_size"] * config.hidden_size
        check(
            weights <= MAX_WEIGHTS,
            f"`expert_groups[{group['name']!r}]` would have {weights:,} weights per layer, which is not plausible: "
            "lower `num_experts`, `intermediate_size` or `hidden_size`.",
        )
        check(
            group["layers"] is None or not set(sparse_layers).isdisjoint(group["layers"]),
            f"`expert_groups[{group['name']!r}].layers` is {group['layers']}, of which none is sparse: add one of the "
            f"sparse layers {sparse_layers}, or remove the group.",
        )
    num_routed = {0}
    routed = [ExpertGroup.from_dict(group) for group in config.expert_groups if not group["always_on"]]
    layers_of = [None if group.layers is None else set(group.layers) for group in routed]
    arrangements: set[tuple[str, ...]] = set()  # layers with the same groups are only checked once
    for layer in sparse_layers:
        groups = [group for group, layers in zip(routed, layers_of, strict=True) if layers is None or layer in layers]
        names = tuple(group.name for group in groups)
        if names in arrangements:
            continue
        arrangements.add(names)
        check(
            bool(groups),
            f"`expert_groups` leaves sparse layer {layer} without a routed group: add one whose `layers` "
            f"contains {layer}, or list the layer in `mlp_only_layers`.",
        )
        for modality in config.modalities:
            serving = sum(group.num_experts for group in groups if group.serves(modality))
            chosen = config.experts_per_token(modality)
            check(
                chosen <= serving,
                f"`num_experts_per_tok` is {chosen} for modality {modality!r}, but layer {layer} has {serving} "
                "routed experts that serve it: lower it (`num_experts_per_tok` or "
                "`num_experts_per_tok_by_modality`), or add experts that serve the modality.",
            )
            if chosen == 1 < serving and config.norm_topk_prob:
                logger.warning_once(
                    f"`num_experts_per_tok` is 1 for modality {modality!r} and `norm_topk_prob` is True: the weight of "
                    "the expert is always 1, so the router learns nothing from the language loss. Set "
                    "`norm_topk_prob=False`."
                )
        num_routed.add(sum(group.num_experts for group in groups))
    check(
        config.num_experts in (None, max(num_routed)) or not sparse_layers,
        f"`num_experts` is {config.num_experts}, but `expert_groups` have {max(num_routed)} routed experts in a "
        "layer: leave `num_experts` out, or change the groups.",
    )
    config.num_experts = max(num_routed)
    if config.expert_pool is not None:
        _check_pools(config)


def _check_pools(config: PreTrainedConfig) -> None:
    """Raises `ValueError` if `expert_pool` is invalid."""
    check(
        isinstance(config.expert_pool, list | tuple) and len(config.expert_pool) == config.num_hidden_layers,
        f"`expert_pool` must be a list with a pool or None for each of the {config.num_hidden_layers} layers, got "
        f"{shown(config.expert_pool)}.",
    )
    config.expert_pool = list(config.expert_pool)
    for layer, pool in enumerate(config.expert_pool):
        if pool is None:
            continue
        check_integer(f"expert_pool[{layer}]", pool, at_least=0)
        check(
            config.is_sparse_layer(layer),
            f"`expert_pool[{layer}]` is {pool}, but layer {layer} is dense: set it to None, or make the layer sparse.",
        )
    for pool, layers in config.pools.items():
        groups = {config.layer_expert_groups(layer, always_on=False) for layer in layers}
        check(
            len(groups) == 1,
            f"`expert_pool` makes layers {layers} share pool {pool}, but `expert_groups` give them different routed "
            "groups: give all of these layers the same groups, or use different pools.",
        )
