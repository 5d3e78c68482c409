"""Trains models with Transformers' `Trainer`."""

from ..demo.conversations import conversations
from .isolation import freeze_text
from .models import from_checkpoint, from_scratch
from .trainer import SparseMoeTrainer

__all__ = [
    "SparseMoeTrainer",
    "conversations",
    "freeze_text",
    "from_checkpoint",
    "from_scratch",
]
