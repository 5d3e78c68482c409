"""What several processes need to know of the model: parallel plans by expert group, and whether there are several."""

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
    Spells out the entries of a parallel plan for every expert group, since the library's wildcards stand for numbers
    alone.

    Args:
        plan (`dict[str, str]`):
            Parallel style by pattern; patterns name `….experts`, `….shared_experts.*` and `expert_pools.*`.
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts, or of our decoder.

    Returns:
        `dict[str, str]`: the plan, with group names as the model's modules have them.
    """
    routed = config.routed_group_names
    always_on = [group["name"] for group in config.expert_groups if group["always_on"]]
    spelled_out = {}
    for pattern, style in plan.items():
        # The library complains about what a plan names in vain.
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
    """Whether this process works with others (data, tensor or expert parallelism)."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def prepare_plans(model: PreTrainedModel, sizes: Any) -> None:
    """
    Fits the parallel plans to the model that is about to be spread over processes, and checks that it can be.

    Args:
        model (`PreTrainedModel`):
            The model, before its weights are loaded.
        sizes (`transformers.distributed.DistributedConfig`):
            How many processes share what.

    Raises:
        ValueError: If heads, widths or experts cannot be shared out evenly, or if Accelerate is to shard the model,
            too; the message says what does not fit and the fix.
    """
    # With efficient loading, the experts of all processes but the first would stay empty.
    check(
        os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true",
        "`distributed_config` shares out the model while it is loaded, but the processes were launched for "
        "Accelerate's FSDP, which shards it afterwards: launch them without FSDP, as "
        "`configuration/accelerate/expert_parallel.yaml` does, or load the model without `distributed_config`.",
    )
    experts = experts_config_of(model.config)
    names = {_with_wildcards(name) for name, _ in chain(model.named_modules(), model.named_parameters())}
    for plan_name in ("_tp_plan", "_ep_plan", "_fsdp_plan"):
        # The library complains about what a plan names in vain.
        plan = {name: style for name, style in getattr(model, plan_name).items() if name in names}
        if plan_name == "_fsdp_plan" and sizes.ep_size > 1:
            # Dispatched experts are wrapped on their own, and no module can be twice.
            plan = {name: style for name, style in plan.items() if not name.endswith("expert_pools.*")}
        setattr(model, plan_name, plan)
    if sizes.tp_size > 1 and sizes.tp_plan != {}:
        _check_tensor_parallelism(model.config, sizes)
    if sizes.ep_size > 1:
        for group in experts.expert_groups:
            check(
                group["always_on"] or group["num_experts"] % sizes.ep_size == 0,
                f"the {group['num_experts']} experts of the group {group['name']!r} cannot be shared out evenly among "
                f"{sizes.ep_size} processes: choose an `ep_size` that divides the number of experts of every group.",
            )


def _check_tensor_parallelism(config: PreTrainedConfig, sizes: Any) -> None:
    decoder = config.get_text_config()
    heads = {name: getattr(decoder, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    numbers = {name: number for name, number in heads.items() if isinstance(number, int)}
    if sizes.ep_size == 1:
        # Stacks of fused experts are cut by width.
        for group in experts_config_of(config).expert_groups:
            if not group["always_on"]:
                numbers[f"intermediate_size` of the group `{group['name']}"] = group["intermediate_size"]
    for name, number in numbers.items():
        check(
            number % sizes.tp_size == 0,
            f"`{name}` ({number}) cannot be shared out evenly among {sizes.tp_size} processes: choose a `tp_size` that "
            "divides it, or share the model in another way (`fsdp_size`, `ep_size`).",
        )


def mend_parallelism(model: nn.Module, sizes: Any, num_experts: dict[nn.Module, int]) -> None:
    """
    What the library leaves undone in a model that it has shared out.

    Args:
        model (`nn.Module`):
            The model, with its plans applied.
        sizes (`transformers.distributed.DistributedConfig`):
            How many processes share what.
        num_experts (`dict[nn.Module, int]`):
            By stack of experts that may be sent the sentinel id, its number of experts before.
    """
    # Not every build of torch has it, and only several processes need it.
    from torch.distributed.fsdp import register_fsdp_forward_method

    for method in ("generate", "get_image_features"):
        # Both run the vision tower outside the model's forward, which gathers the weights under FSDP2, and only then.
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    forget_plans_of_stacks(model)
    if sizes.ep_size == 1:
        return
    for experts, number in num_experts.items():
        _skip_sentinels(experts, number)
    if sizes.efsdp_size == 1:
        # Up to transformers 5.20, at least, the gradients of such experts are divided by the number of batches twice.
        for module in model.modules():
            force_sum: Any = getattr(module, "set_force_sum_reduction_for_comms", None)
            if force_sum is not None:
                force_sum(False)


def forget_plans_of_stacks(model: Any) -> None:
    """
    Takes stacks of experts out of a model's tensor-parallel plan once it has been applied. PEFT, which cuts adapters as
    the plan cuts what they belong to, takes a stack for a linear layer, and fails.

    Args:
        model (`PreTrainedModel`):
            The model, changed in place if several processes share it.
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
    """A name as the patterns of a plan have it, where `*` stands for a number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _skip_sentinels(experts: nn.Module, num_experts: int) -> None:
    """Keeps sentinel ids from experts whose tokens are exchanged between processes, which has no place for them."""
    exchange = experts.forward

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        token, slot = (top_k_index < num_experts).nonzero(as_tuple=True)
        chosen = top_k_index[token, slot, None], top_k_weights[token, slot, None]
        outputs = exchange(hidden_states[token], *chosen)
        return torch.zeros_like(hidden_states).index_add(0, token, outputs.to(hidden_states.dtype))

    experts.forward = forward  # type: ignore[method-assign]
