"""Finding out what the norms of a dense decoder compute, by running them."""

from __future__ import annotations

import copy
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .errors import UpcyclingError

# At the small scale, the epsilon affects the output.
_SCALES = (1.0, 1e-3)
# Above rounding in float32.
_TOLERANCE = 1e-5
_NAMES_OF_EPSILON = ("variance_epsilon", "eps", "norm_eps", "epsilon")
# Epsilons to try for norms without such an attribute, such as OLMo's.
_USUAL_EPSILONS = (1e-5, 1e-6, 1e-8)


class Norm(NamedTuple):
    """
    A norm of a dense decoder.

    Args:
        weight (`torch.Tensor` of shape `(D,)`): Its scale.
        eps (`float`): Its epsilon.
        is_centred (`bool`): Whether it subtracts the mean first (LayerNorm).
        adds_one (`bool`): Whether its scale is 1 + its parameter (Gemma).
    """

    weight: torch.Tensor
    eps: float
    is_centred: bool
    adds_one: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_centred:
            x = x - x.mean(dim=-1, keepdim=True)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def read_norm(name: str, module: nn.Module, width: int) -> Norm:
    """
    Compares a norm with the formulas that an RMS norm can compute, in float32.

    Args:
        name (`str`):
            Name of the module in error messages.
        module (`nn.Module`):
            Any module.
        width (`int`):
            Width D of its input.

    Returns:
        [`Norm`]: The norm: an RMS norm that scales by its weight or by 1 + its weight (Gemma), or a LayerNorm without a
        bias. If the module's tensor is the scale, it is not copied.

    Raises:
        UpcyclingError: If the module computes anything else.
    """
    what = f"`{name}` ({type(module).__name__})"
    parameters = dict(module.named_parameters())
    others = sorted(set(parameters) - {"weight"})
    if others:
        raise UpcyclingError(f"{what} has parameters that the RMS norms of our decoder do not have: {others}.")
    given = [getattr(module, field) for field in _NAMES_OF_EPSILON if isinstance(getattr(module, field, None), float)]
    weight = parameters["weight"].detach() if parameters else torch.ones(width)
    if weight.shape != (width,):
        raise UpcyclingError(
            f"{what} has a weight of the shape {tuple(weight.shape)}, where our decoder has a norm of {width} features."
        )
    exact = copy.deepcopy(module).float()
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)) + 0.5
    flags = (False, True)
    for adds_one, eps, is_centred in itertools.product(flags, given or _USUAL_EPSILONS, flags):
        scaled_by = 1.0 + weight.float() if adds_one else weight
        norm = Norm(scaled_by.float(), eps, is_centred, adds_one)
        if all(_gives(exact, norm, (x * scale).to(weight.device)) for scale in _SCALES):
            return norm._replace(weight=scaled_by)
    raise UpcyclingError(f"{what} is neither an RMS norm nor a LayerNorm without a bias.")


@torch.no_grad()
def _gives(module: nn.Module, norm: Norm, x: torch.Tensor) -> bool:
    expected = norm(x)
    return bool((module(x) - expected).abs().max() <= _TOLERANCE * expected.abs().max())
