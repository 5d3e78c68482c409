"""A report about how a model routes the tokens of a dataset, as one HTML page."""

from .contents import RoutingReport
from .measure import routing_report

__all__ = ["RoutingReport", "routing_report"]
