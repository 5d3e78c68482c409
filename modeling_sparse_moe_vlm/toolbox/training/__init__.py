"""Trains models with Transformers' `Trainer`."""

from ..demo.conversations import conversations
from .generation_metrics import GenerationMetrics
from .isolation import freeze_text
from .model_parts import model_parts
from .models import from_checkpoint, from_scratch
from .parts import describe_parts, train_parts
from .retrieval_metrics import RetrievalMetrics
from .router_losses import RouterLossesMixin
from .trainer import SparseMoeTrainer

__all__ = [
    "GenerationMetrics",
    "RetrievalMetrics",
    "RouterLossesMixin",
    "SparseMoeTrainer",
    "conversations",
    "describe_parts",
    "freeze_text",
    "from_checkpoint",
    "from_scratch",
    "model_parts",
    "train_parts",
]
