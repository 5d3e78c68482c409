"""Steering of distributed attention: the priors of the attention parts, the guidance scale, and their checks."""

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

# Arguments of the models. Unknown arguments with a similar name are reported as misspelt.
STEERING_ARGUMENTS = ("output_modality_weights", "modality_priors", "modality_guidance")
# The papers use values from 0.5 to 5. With much larger values, Z + g·(Z − O_text) is out of range for later layers.
MAX_GUIDANCE = 100.0


def check_guidance(modality_guidance: Any) -> None:
    """Raises `ValueError` unless `modality_guidance` is a number from 0 to `MAX_GUIDANCE`."""
    check_number("modality_guidance", modality_guidance, at_most=MAX_GUIDANCE)


def check_steering_arguments(unknown: Iterable[str]) -> None:
    """
    Raises `ValueError` if an unknown argument of a model is probably a misspelt steering argument. Transformers passes
    unknown arguments to all layers, so a misspelt argument would be ignored without a message.
    """
    if not torch.compiler.is_compiling():  # the compiler cannot trace this check
        _check_names(frozenset(unknown))


@functools.cache
def _check_names(unknown: frozenset[str]) -> None:
    check_spelling(sorted(unknown - set(STEERING_ARGUMENTS)), STEERING_ARGUMENTS, kind="argument")


def initial_log_priors(config: PreTrainedConfig) -> list[float]:
    """Returns the initial log priors log π by modality: `beta_init` for text, `alpha_init` for other modalities."""
    log_alpha, log_beta = math.log(config.alpha_init), math.log(config.beta_init)
    return [log_beta if modality == "text" else log_alpha for modality in config.modalities]


def given_log_priors(modalities: Sequence[str], modality_priors: Mapping[str, float] | None) -> list[float]:
    """
    Returns the log priors log π that a call passes, by modality. They are 0 for modalities that it does not name.

    Args:
        modalities (`Sequence[str]`):
            Modalities of the model.
        modality_priors (`Mapping[str, float]`, *optional*):
            Factors of the priors by modality.

    Returns:
        `list[float]`: One log prior per modality.

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
    Returns the log priors log π that are not learned: the sum of those in the configuration (unless the model learns
    its priors) and those of the call.

    Args:
        config (`PreTrainedConfig`):
            Configuration of the decoder.
        modality_priors (`Mapping[str, float]`, *optional*):
            Factors of the priors by modality.

    Returns:
        `list[float]`, *optional*: One log prior per modality. `None` if all are equal, because only their differences
        matter.

    Raises:
        ValueError: See [`given_log_priors`].
    """
    log_priors = given_log_priors(config.modalities, modality_priors)
    if not config.learned_modality_priors:
        log_priors = [given + own for given, own in zip(log_priors, initial_log_priors(config), strict=True)]
    return None if all(log_prior == log_priors[0] for log_prior in log_priors) else log_priors


def are_equal(learned_log_priors: Sequence[torch.Tensor]) -> bool:
    """
    Returns whether plain attention gives the same result: the learned log priors are known to be equal within each
    head, and they are not being trained in this call.

    Args:
        learned_log_priors (`Sequence[torch.Tensor]`):
            Learned log priors of shape `(num_heads, num_modalities)`, one tensor per layer.

    Returns:
        `bool`: `False` if the values are unknown (while tracing, for sharded or offloaded parameters).
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
