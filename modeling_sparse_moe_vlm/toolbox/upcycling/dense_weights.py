"""Checks of a dense model's weights: all of them are in this process, and all of them are finite numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from .errors import UpcyclingError


def check_weights_at_hand(model: nn.Module) -> None:
    """
    Checks that a model can be upcycled in this process.

    Args:
        model (`torch.nn.Module`):
            A loaded dense model, or a part of one.

    Raises:
        UpcyclingError: If weights are on the meta device, offloaded or sharded over processes, if hooks of Accelerate
            move the model's inputs, or if a weight is not finite; the message names the weight.
    """
    name = type(model).__name__
    has_hooks = any(hasattr(module, "_hf_hook") for module in model.modules())
    for weight, parameter in model.named_parameters():
        if parameter.is_meta:
            reason = "offloaded" if has_hooks else "on the meta device, so they have no values"
            raise UpcyclingError(
                f"Weights of {name} are {reason} (such as `{weight}`): load the model without a `device_map` that "
                "offloads, or upcycle its checkpoint with `upcycle_checkpoint`, which reads one block at a time."
            )
        if hasattr(parameter, "full_tensor"):
            raise UpcyclingError(
                f"Weights of {name} are sharded over processes (such as `{weight}`): upcycle the model in one process."
            )
    if has_hooks:
        raise UpcyclingError(
            f"{name} is spread over several devices by hooks of Accelerate, which would bypass its experts: load it "
            "without `device_map`, or upcycle its checkpoint with `upcycle_checkpoint`."
        )
    check_finite(model.named_parameters())


def check_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises `UpcyclingError` if a weight has a value that is not a finite number; the message names the weight."""
    for name, weight in weights:
        if not weight.is_floating_point() or weight.numel() == 0:
            continue
        # Without a tensor of the weight's size: both are NaN where one value is.
        if not all(math.isfinite(bound.item()) for bound in weight.detach().aminmax()):
            number = int((~weight.detach().isfinite()).sum())
            raise UpcyclingError(
                f"`{name}` has {number} values of {weight.numel()} that are NaN or infinite: the dense model is "
                "damaged, or its training diverged. Use another checkpoint."
            )


def check_seed(seed: object) -> None:
    """Raises `UpcyclingError` unless a seed is an integer."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UpcyclingError(f"`seed` must be an integer, got {seed!r}.")
