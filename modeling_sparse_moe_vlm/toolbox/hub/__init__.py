"""Publishing models on the Hub."""

from .model_card import write_model_card
from .results import add_results_to_card

__all__ = [
    "add_results_to_card",
    "write_model_card",
]
