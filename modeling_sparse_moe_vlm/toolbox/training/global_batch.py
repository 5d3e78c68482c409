"""Router losses over the batch of all processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from ... import losses
from ...parallel_plans import is_one_of_several_processes


@contextmanager
def global_batch(model: nn.Module) -> Iterator[None]:
    """
    A context in which a model of ours that trains in several processes computes its router losses from the tokens of
    all of them. All processes must run the same forward passes. In evaluation, it has no effect.

    Args:
        model (`nn.Module`):
            The model, possibly with wrappers.
    """
    with ExitStack() as stack:
        if model.training and is_one_of_several_processes():
            for module in _loss_modules(model):
                stack.enter_context(module.router_losses_over_processes())
        yield


def _loss_modules(model: nn.Module) -> list:
    """Returns the modules `losses` of this package and of the code that came with the model's checkpoint."""
    packages = {type(module).__module__.rpartition(".")[0] for module in model.modules()}
    names = {f"{package}.losses" for package in packages} | {losses.__name__}
    loaded = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    return [module for module in loaded if hasattr(module, "router_losses_over_processes")]
