"""Counts and reports how routers distribute tokens over experts, and balances them in training."""

from .counts import RoutingCounts, count_batch, count_routing, measure_routing
from .monitor import RoutingMonitor
from .router_bias import update_router_bias
from .statistics import GroupRouting, RoutingStatistics, expert_load, routing_statistics

__all__ = [
    "GroupRouting",
    "RoutingCounts",
    "RoutingMonitor",
    "RoutingStatistics",
    "count_batch",
    "count_routing",
    "expert_load",
    "measure_routing",
    "routing_statistics",
    "update_router_bias",
]
