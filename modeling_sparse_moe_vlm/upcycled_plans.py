"""Parallel plans of upcycled models: the entries for the experts that replace dense blocks."""

from __future__ import annotations

import re
from typing import Any

from .parallel_plans import plan_by_group

# Here, `mlp` stands for the sparse block, regardless of its name in the base model.
_TENSOR_PARALLEL = {
    "mlp.experts.gate_up_proj": "packed_colwise",
    "mlp.experts.down_proj": "rowwise",
    "mlp.experts": "moe_tp_experts",
    "mlp.shared_experts.*.gate_proj": "colwise",
    "mlp.shared_experts.*.up_proj": "colwise",
    "mlp.shared_experts.*.down_proj": "rowwise",
}
_EXPERT_PARALLEL = {
    "mlp.experts.gate_up_proj": "grouped_gemm",
    "mlp.experts.down_proj": "grouped_gemm",
    "mlp.experts": "ep_dispatch_experts",
}


def experts_plans(decoder: Any) -> dict[str, dict[str, str]]:
    """
    Returns the entries of the parallel plans for the experts of a decoder.

    Args:
        decoder (`PreTrainedModel`):
            The innermost submodel of an upcycled model that contains all sparse blocks.

    Returns:
        `dict[str, dict[str, str]]`: The plans by the name of their attribute. Each plan maps patterns of module names
        to parallel styles.
    """
    config = decoder.experts_config
    places = {re.sub(r"\.\d+(?=\.)", ".*", path) for path in sparse_blocks(decoder)}
    plans: dict[str, dict[str, str]] = {"_tp_plan": {}, "_ep_plan": {}}
    for name, plan in (("_tp_plan", _TENSOR_PARALLEL), ("_ep_plan", _EXPERT_PARALLEL)):
        of_pools = {
            pattern.replace("mlp.experts", "expert_pools.*"): style
            for pattern, style in plan.items()
            if pattern.startswith("mlp.experts")
        }
        spelled_out = plan_by_group(plan | of_pools, config)
        for pattern, style in spelled_out.items():
            if pattern.startswith("mlp."):
                plans[name].update({place + pattern.removeprefix("mlp"): style for place in places})
            else:
                plans[name][pattern] = style
    return plans


def sparse_blocks(decoder: Any) -> list[str]:
    """Returns the paths of the sparse blocks of a decoder, in the order of the layers."""
    return [name for name, module in decoder.named_modules() if hasattr(module, "groups_key") and name]
