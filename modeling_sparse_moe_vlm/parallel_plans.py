"""Parallel plans for models with expert groups, and fixes for models that are distributed over several processes."""

from __future__ import annotations

import os
import re
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .checks import check
from .experts_config import experts_config_of


def plan_by_group(plan: dict[str, str], config: PreTrainedConfig) -> dict[str, str]:
    """
    Replaces the wildcards for expert groups in a parallel plan with the names of the groups, because the wildcards of
    Transformers only match numbers.

    Args:
        plan (`dict[str, str]`):
            Parallel styles by pattern, with patterns such as `….experts`, `….shared_experts.*` and `expert_pools.*`.
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts, or of the decoder of this package.

    Returns:
        `dict[str, str]`: The plan with the group names of the model's modules.
    """
    routed = config.routed_group_names
    always_on = [group["name"] for group in config.expert_groups if group["always_on"]]
    spelled_out = {}
    for pattern, style in plan.items():
        # Transformers warns about patterns that do not match any module.
        if "expert_pools.*" in pattern and not config.pools:
            continue
        if "modality_log_priors" in pattern and not config.learned_modality_priors:
            continue
        place = re.search(r"(?<![^.])(experts|expert_pools\.\*)(?![^.])", pattern)
        if "shared_experts.*" in pattern:
            patterns = [pattern.replace("shared_experts.*", f"shared_experts.{name}") for name in always_on]
        elif len(routed) > 1 and place is not None:
            before, after = pattern[: place.end()], pattern[place.end() :]
            patterns = [f"{before}.{name}{after}" for name in routed]
        else:
            patterns = [pattern]
        spelled_out.update(dict.fromkeys(patterns, style))
    return spelled_out


def is_one_of_several_processes() -> bool:
    """Returns whether several processes work together (data, tensor or expert parallelism)."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def prepare_plans(model: PreTrainedModel, sizes: Any) -> None:
    """
    Adapts the parallel plans to a model that is about to be distributed over processes, and checks that its sizes can
    be divided.

    Args:
        model (`PreTrainedModel`):
            The model, before its weights are loaded.
        sizes (`transformers.distributed.DistributedConfig`):
            Sizes of the parallelism.

    Raises:
        ValueError: If heads, widths or experts cannot be divided evenly, or if Accelerate is also configured to shard
            the model. The message names the size and the fix.
    """
    # With the RAM-efficient loading of FSDP, only the first process would load the experts.
    check(
        os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true",
        "`distributed_config` distributes the model while it is loaded, but the processes were launched with "
        "Accelerate's FSDP, which shards the model afterwards: launch them without FSDP, as in "
        "`configuration/accelerate/expert_parallel.yaml`, or load the model without `distributed_config`.",
    )
    experts = experts_config_of(model.config)
    names = {_with_wildcards(name) for name, _ in chain(model.named_modules(), model.named_parameters())}
    for plan_name in ("_tp_plan", "_ep_plan", "_fsdp_plan"):
        # Transformers warns about patterns that do not match any module.
        plan = {name: style for name, style in getattr(model, plan_name).items() if name in names}
        if plan_name == "_fsdp_plan" and sizes.ep_size > 1:
            # Dispatched experts are wrapped separately, and a module can only be wrapped once.
            plan = {name: style for name, style in plan.items() if not name.endswith("expert_pools.*")}
        setattr(model, plan_name, plan)
    if sizes.tp_size > 1 and sizes.tp_plan != {}:
        _check_tensor_parallelism(model.config, sizes)
    if sizes.ep_size > 1:
        for group in experts.expert_groups:
            check(
                group["always_on"] or group["num_experts"] % sizes.ep_size == 0,
                f"the {group['num_experts']} experts of the group {group['name']!r} cannot be divided evenly among "
                f"{sizes.ep_size} processes: choose an `ep_size` that divides the number of experts of every group.",
            )


def _check_tensor_parallelism(config: PreTrainedConfig, sizes: Any) -> None:
    """Raises `ValueError` unless heads and widths can be divided evenly among the processes."""
    decoder = config.get_text_config()
    heads = {name: getattr(decoder, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    numbers = {name: number for name, number in heads.items() if isinstance(number, int)}
    if sizes.ep_size == 1:
        # Stacked experts are divided along their intermediate size.
        for group in experts_config_of(config).expert_groups:
            if not group["always_on"]:
                numbers[f"intermediate_size` of the group `{group['name']}"] = group["intermediate_size"]
    for name, number in numbers.items():
        check(
            number % sizes.tp_size == 0,
            f"`{name}` ({number}) cannot be divided evenly among {sizes.tp_size} processes: choose a `tp_size` that "
            "divides it, or use another kind of parallelism (`fsdp_size`, `ep_size`).",
        )


def mend_parallelism(model: nn.Module, sizes: Any, num_experts: dict[nn.Module, int]) -> None:
    """
    Fixes a model after Transformers has distributed it over processes.

    Args:
        model (`nn.Module`):
            The model with its plans applied.
        sizes (`transformers.distributed.DistributedConfig`):
            Sizes of the parallelism.
        num_experts (`dict[nn.Module, int]`):
            Number of experts, before the model was distributed, of each module that accepts sentinel ids.
    """
    # Imported here, because not every build of torch has it and only several processes need it.
    from torch.distributed.fsdp import register_fsdp_forward_method

    for method in ("generate", "get_image_features", "get_text_features"):
        # These methods run submodules outside of `forward`. FSDP2 only gathers the weights for registered methods.
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    forget_plans_of_stacks(model)
    if sizes.ep_size == 1:
        return
    for experts, number in num_experts.items():
        _skip_sentinels(experts, number)
    if sizes.efsdp_size == 1:
        # At least up to Transformers 5.20, the gradients of these experts are divided twice by the number of batches.
        for module in model.modules():
            force_sum: Any = getattr(module, "set_force_sum_reduction_for_comms", None)
            if force_sum is not None:
                force_sum(False)


def forget_plans_of_stacks(model: Any) -> None:
    """
    Removes stacked experts from a model's tensor parallel plan after the plan has been applied. PEFT divides adapters
    according to the plan, but treats stacked experts as linear layers and fails.

    Args:
        model (`PreTrainedModel`):
            The model. It is changed in place if it is distributed.
    """
    stacks = {
        _with_wildcards(name)
        for name, value in model.named_parameters()
        if value.dim() == 3 and hasattr(value, "placements")
    }
    if not stacks:
        return
    model._tp_plan = {name: style for name, style in model._tp_plan.items() if name not in stacks}


def _with_wildcards(name: str) -> str:
    """Returns a name with its numbers replaced by the wildcard `*`, as in the patterns of a plan."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _skip_sentinels(experts: nn.Module, num_experts: int) -> None:
    """Removes sentinel ids before the tokens are exchanged between processes, which does not support them."""
    exchange = experts.forward

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        token, slot = (top_k_index < num_experts).nonzero(as_tuple=True)
        chosen = top_k_index[token, slot, None], top_k_weights[token, slot, None]
        outputs = exchange(hidden_states[token], *chosen)
        return torch.zeros_like(hidden_states).index_add(0, token, outputs.to(hidden_states.dtype))

    experts.forward = forward  # type: ignore[method-assign]
