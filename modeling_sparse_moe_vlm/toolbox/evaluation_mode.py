"""The mode of a model during an evaluation, and whether several processes evaluate it together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.tensor import DTensor


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


def is_spread(model: nn.Module) -> bool:
    """
    Whether every process has only a part of a model, so all processes must run the same modules together.

    Args:
        model (`nn.Module`):
            The model.

    Returns:
        `bool`: `True` with FSDP2, expert parallelism or tensor parallelism.
    """
    is_distributed = getattr(getattr(model, "config", None), "distributed_config", None) is not None
    return is_distributed or any(isinstance(parameter, DTensor) for parameter in model.parameters())
