"""
DoRA on experts (Liu et al., arXiv 2402.09353): every output of W + scaling·B·A is rescaled by m / ‖W + scaling·B·A‖.
The norm is treated as a constant in the backward pass (section 4.3 of the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .processes import is_spread


class Magnitude(nn.Module):
    """The magnitudes m of an adapter, of shape `(E, out)`, in the attribute `weight`, where PEFT expects them."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


def initial_magnitude(stack: torch.Tensor, dtype: torch.dtype) -> Magnitude:
    """Returns the initial magnitudes of an adapter, the norms of the outputs of a stack of shape `(E, out, in)`."""
    norm = torch.linalg.vector_norm(stack.detach().float(), dim=-1)
    norm = norm.full_tensor() if is_spread(norm) else norm  # type: ignore[operator]
    return Magnitude(norm.to(dtype))


def adapted_norm(stack: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    Computes ‖W + scaling·B·A‖ of each output from the products W·Aᵀ and A·Aᵀ, without computing the sum.

    Args:
        stack (`torch.Tensor` of shape `(E, out, in)`):
            W.
        a (`torch.Tensor` of shape `(E, r, in)`):
            A.
        b (`torch.Tensor` of shape `(E, r, out)`):
            Bᵀ.
        scaling (`float`):
            Factor of the product B·A.

    Returns:
        `torch.Tensor` of shape `(E, out)`, in float32 and without gradients.
    """
    weight, a, b = stack.detach().float(), a.detach().float(), b.detach().float().transpose(1, 2)
    cross = ((weight @ a.transpose(1, 2)) * b).sum(-1)
    own = ((b @ (a @ a.transpose(1, 2))) * b).sum(-1)
    return (weight.square().sum(-1) + 2 * scaling * cross + scaling**2 * own).clamp(min=0).sqrt()


def check_dora(layer: Any, adapter_names: Sequence[str]) -> None:
    """
    Checks that the active adapters of a layer can run if one of them uses DoRA.

    Args:
        layer ([`~toolbox.expert_lora.adapted_layer.FactoredExpertsLayer`]):
            The layer.
        adapter_names (`Sequence[str]`):
            Names of the active adapters.

    Raises:
        ValueError: If an adapter uses DoRA and another adapter is active, or the matrices are split over processes.
    """
    if not any(layer.use_dora.get(name) for name in adapter_names):
        return
    if layer.share is not None and layer.share.cuts_matrices:
        raise ValueError(
            f"`tp_size` splits the matrices of {layer.stack_name!r} over processes, but DoRA needs the norms of whole "
            "matrices: pass `ep_size` as well, or train without `use_dora`."
        )
    if len(adapter_names) > 1:
        raise ValueError(
            f"the adapters {list(adapter_names)} are active together, but DoRA also rescales the updates of the other "
            "adapters: activate an adapter with `use_dora` only by itself."
        )
