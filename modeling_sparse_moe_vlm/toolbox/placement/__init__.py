"""Plans device maps for mixture-of-experts models from memory budgets."""

from .plan import DeviceShare, describe_placement, plan_expert_placement

__all__ = [
    "DeviceShare",
    "describe_placement",
    "plan_expert_placement",
]
