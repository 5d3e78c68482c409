"""
DoRA of experts (arXiv 2402.09353): every output of W + scaling·B·A is rescaled by m / ‖W + scaling·B·A‖. The norm is a
constant in backward (section 4.3 of the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .processes import is_spread


class Magnitude(nn.Module):
    """The magnitudes m `(E, out)` of an adapter, where PEFT looks for them."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


def initial_magnitude(stack: torch.Tensor, dtype: torch.dtype) -> Magnitude:
    """The norms of the outputs of a stack `(E, out, in)`, with which an adapter begins."""
    norm = torch.linalg.vector_norm(stack.detach().float(), dim=-1)
    norm = norm.full_tensor() if is_spread(norm) else norm  # type: ignore[operator]
    return Magnitude(norm.to(dtype))


def adapted_norm(stack: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    ‖W + scaling·B·A‖ of each output, from the products W·Aᵀ and A·Aᵀ.

    Args:
        stack (`torch.Tensor` of shape `(E, out, in)`): W.
        a (`torch.Tensor` of shape `(E, r, in)`): A.
        b (`torch.Tensor` of shape `(E, r, out)`): Bᵀ.
        scaling (`float`): Factor of the product.

    Returns:
        `torch.Tensor` of shape `(E, out)`, in float32.
    """
    weight, a, b = stack.detach().float(), a.detach().float(), b.detach().float().transpose(1, 2)
    cross = ((weight @ a.transpose(1, 2)) * b).sum(-1)
    own = ((b @ (a @ a.transpose(1, 2))) * b).sum(-1)
    return (weight.square().sum(-1) + 2 * scaling * cross + scaling**2 * own).clamp(min=0).sqrt()


def check_dora(layer: Any, adapter_names: Sequence[str]) -> None:
    """
    Refuses adapters of a layer that DoRA cannot run with.

    Raises:
        ValueError: If another adapter is active as well, or the matrices are cut.
    """
    if not any(layer.use_dora.get(name) for name in adapter_names):
        return
    if layer.share is not None and layer.share.cuts_matrices:
        raise ValueError(
            f"`tp_size` cuts the matrices of {layer.stack_name!r}, and DoRA needs the norms of whole ones: pass "
            "`ep_size` as well, or train without `use_dora`."
        )
    if len(adapter_names) > 1:
        raise ValueError(
            f"{list(adapter_names)} are active at once, but DoRA rescales the weights that the others add to: "
            "activate an adapter with `use_dora` alone."
        )
