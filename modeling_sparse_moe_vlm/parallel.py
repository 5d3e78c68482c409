"""What several processes need to know of the model: parallel plans by expert group, and whether there are several."""

from __future__ import annotations

import torch

from .configuration_sparse_moe_vlm import SparseMoeVlmTextConfig


def plan_by_group(plan: dict[str, str], config: SparseMoeVlmTextConfig) -> dict[str, str]:
    """
    Spells out the entries of a parallel plan for every expert group, since the library's wildcards stand for numbers
    alone.

    Args:
        plan (`dict[str, str]`):
            Parallel style by pattern; patterns name `mlp.experts` and `mlp.shared_experts.*`.
        config (`SparseMoeVlmTextConfig`):
            Configuration of the decoder.

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
        if "mlp.shared_experts.*" in pattern:
            patterns = [pattern.replace("shared_experts.*", f"shared_experts.{name}") for name in always_on]
        elif len(routed) > 1 and ("mlp.experts" in pattern or "expert_pools.*" in pattern):
            place = "mlp.experts" if "mlp.experts" in pattern else "expert_pools.*"
            patterns = [pattern.replace(place, f"{place}.{name}") for name in routed]
        else:
            patterns = [pattern]
        spelled_out.update(dict.fromkeys(patterns, style))
    return spelled_out


def is_one_of_several_processes() -> bool:
    """Whether this process works with others (data, tensor or expert parallelism)."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
