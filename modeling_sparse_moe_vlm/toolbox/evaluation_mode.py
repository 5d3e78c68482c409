"""A context that runs a model in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """
    Puts a model in evaluation mode. On exit, restores the mode of every module separately, because frozen modules may
    have another mode than the rest.

    Args:
        model (`nn.Module`):
            The model.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
