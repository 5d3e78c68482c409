"""Publishing models on the Hub."""

from .model_card import write_model_card
from .push import PushedCheckpoint, PushPlan, plan_push, push_checkpoint
from .push_errors import PushError, PushInterruptedError
from .push_files import PushedFile
from .results import add_results_to_card

__all__ = [
    "PushError",
    "PushInterruptedError",
    "PushPlan",
    "PushedCheckpoint",
    "PushedFile",
    "add_results_to_card",
    "plan_push",
    "push_checkpoint",
    "write_model_card",
]
