"""What steers distributed attention: the priors of its parts, and guidance. Where they come from, what they may be."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig
from transformers.utils.import_utils import is_tracing

from .checks import check, check_number, check_spelling

# Arguments of the models that an unknown argument may be a misspelling of.
STEERING_ARGUMENTS = ("output_modality_weights", "modality_priors", "modality_guidance")
# The papers use 0.5 to 5. Far above, Z + g·(Z − O_text) leaves what the later layers can take.
MAX_GUIDANCE = 100.0


def check_guidance(modality_guidance: Any) -> None:
    """Raises `ValueError` unless it is a number from 0 to `MAX_GUIDANCE`."""
    check_number("modality_guidance", modality_guidance, at_most=MAX_GUIDANCE)


def check_steering_arguments(unknown: Iterable[str]) -> None:
    """
    Raises `ValueError` if an unknown argument of a model reads like a misspelt one that steers attention or reads it
    out: the library passes unknown arguments on from layer to layer, and no layer would use it.
    """
    if not torch.compiler.is_compiling():  # the compiler cannot follow, and runs what ran without it before
        _check_names(frozenset(unknown))


@functools.cache
def _check_names(unknown: frozenset[str]) -> None:
    check_spelling(sorted(unknown - set(STEERING_ARGUMENTS)), STEERING_ARGUMENTS, kind="argument")


def initial_log_priors(config: PreTrainedConfig) -> list[float]:
    """log π that training starts from, by modality: `beta_init` for text, `alpha_init` for every other."""
    log_alpha, log_beta = math.log(config.alpha_init), math.log(config.beta_init)
    return [log_beta if modality == "text" else log_alpha for modality in config.modalities]


def given_log_priors(modalities: Sequence[str], modality_priors: Mapping[str, float] | None) -> list[float]:
    """
    log π that a call gives, by modality; 0 for those that it does not name.

    Raises:
        ValueError: If `modality_priors` is not a mapping, a modality is unknown, or a prior is not a number above 0.
    """
    given = {} if modality_priors is None else modality_priors
    check(
        isinstance(given, Mapping),
        f"`modality_priors` must be a dict of factors by modality, such as {{'image': 2.0}}, got {given!r}.",
    )
    unknown = sorted(set(given) - set(modalities), key=str)
    check(not unknown, f"`modality_priors` has unknown modalities {unknown}: the model has {list(modalities)}.")
    for modality, prior in given.items():
        check_number(f"modality_priors[{modality!r}]", prior)
        check(prior > 0, f"`modality_priors[{modality!r}]` must be more than 0, got {prior!r}.")
    return [math.log(given.get(modality, 1.0)) for modality in modalities]


def fixed_log_priors(config: PreTrainedConfig, modality_priors: Mapping[str, float] | None) -> list[float] | None:
    """
    log π by modality, of the configuration (unless the priors are learned) and of the call together. `None` if all are
    equal, since only their ratios count.
    """
    log_priors = given_log_priors(config.modalities, modality_priors)
    if not config.learned_modality_priors:
        log_priors = [given + own for given, own in zip(log_priors, initial_log_priors(config), strict=True)]
    return None if all(log_prior == log_priors[0] for log_prior in log_priors) else log_priors


def are_equal(learned_log_priors: Sequence[torch.Tensor]) -> bool:
    """
    Whether plain attention would do: the learned log π, `(H, M)` by layer, are known to be equal within every head, and
    do not learn now.
    """
    if not learned_log_priors:
        return True
    learns = torch.is_grad_enabled()
    for log_priors in learned_log_priors:
        is_unknown = is_tracing(log_priors) or isinstance(log_priors, DTensor) or log_priors.is_meta  # offloaded
        if is_unknown or (learns and log_priors.requires_grad):
            return False
    device = learned_log_priors[0].device
    together = torch.cat([log_priors.detach().to(device) for log_priors in learned_log_priors])
    return bool((together == together[:, :1]).all())
