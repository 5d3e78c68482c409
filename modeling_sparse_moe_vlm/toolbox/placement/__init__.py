"""Plans of where the parts of a model lie: device maps from memory budgets."""

from .plan import DeviceShare, describe_placement, plan_expert_placement

__all__ = [
    "DeviceShare",
    "describe_placement",
    "plan_expert_placement",
]
