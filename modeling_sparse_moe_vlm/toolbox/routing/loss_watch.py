"""Hooks that report the router losses of every forward pass, in whichever trainer the model computes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.utils import logging

from ...experts_config import experts_config_of
from ...fused_head import OTHER_COEFFICIENTS, unused_losses
from ...parallel_plans import is_one_of_several_processes

logger = logging.get_logger(__name__)

NAMES = ("aux_loss", "z_loss", "router_loss")
LossListener = Callable[[nn.Module, Mapping[str, Any], dict[str, torch.Tensor]], None]


def watch_losses(model: nn.Module, listener: LossListener) -> list[RemovableHandle]:
    """
    Calls a listener after every forward pass that returns router losses. It works for the models of this package and
    for all models of Transformers that return an `aux_loss`.

    Args:
        model (`nn.Module`):
            The model. It can be wrapped or have adapters.
        listener (`Callable`):
            Function that is called with the model, the keyword arguments of the pass, and the losses by name: detached
            scalars `aux_loss`, `z_loss`, `router_loss` (the sum of all router losses with their coefficients) and
            `aux_loss_<modality>`, which is NaN without tokens of the modality. Losses that the model does not compute
            are missing.

    Returns:
        `list[RemovableHandle]`: Handles of the hooks; remove them to stop watching.
    """

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        losses = losses_of(module, output)
        if losses:
            listener(module, kwargs, losses)

    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [module.register_forward_hook(after, with_kwargs=True) for module in models]


def losses_of(model: nn.Module, output: Any) -> dict[str, torch.Tensor]:
    """
    Returns the router losses among the outputs of a model, detached and by name. See [`watch_losses`].

    Args:
        model (`nn.Module`):
            The model.
        output (`Any`):
            Its output.

    Returns:
        `dict[str, torch.Tensor]`: The losses. Empty if the model did not compute any.
    """
    # Set where a trainer replaces the `forward` of the model, and `aux_loss` is what this trainer expects.
    found = getattr(output, "router_losses", None)
    if found is None:
        found = output if isinstance(output, Mapping) else {}
    losses = {name: found[name] for name in NAMES if found.get(name) is not None}
    by_modality = found.get("aux_loss_by_modality")
    if by_modality is not None:
        modalities = experts_config_of(model.config).modalities
        losses |= {f"aux_loss_{name}": value for name, value in zip(modalities, by_modality, strict=True)}
    return {name: value.detach() for name, value in losses.items() if torch.is_tensor(value)}


def warn_of_scaled_losses(args: Any, model: nn.Module) -> None:
    """
    Logs a warning if a TRL trainer has a `router_aux_loss_coef` that changes the weight of all router losses. TRL
    multiplies all of them by this coefficient, which is only right if it is that of the model.

    Args:
        args (`TrainingArguments`):
            Configuration of the trainer.
        model (`nn.Module`):
            The model. It can be wrapped or have adapters.
    """
    ours = next((module for module in model.modules() if hasattr(module, "routing_planner")), None)
    coefficient = getattr(args, "router_aux_loss_coef", None)
    if ours is None or not coefficient:
        return
    config = experts_config_of(ours.config)
    if config.router_aux_loss_coef in (0.0, coefficient):
        return
    scaled = [name for name in OTHER_COEFFICIENTS if getattr(config, name)]
    if scaled:
        logger.warning(
            f"`router_aux_loss_coef` is {coefficient} in the trainer's configuration, but "
            f"{config.router_aux_loss_coef} in the model's configuration. The trainer therefore multiplies "
            f"{', '.join(f'`{name}`' for name in scaled)} by {coefficient / config.router_aux_loss_coef:g} as well. "
            "Set `router_aux_loss_coef` only in the model's configuration."
        )


def warn_of_classifiers(model: nn.Module) -> None:
    """
    Logs a warning if a model for sequence classification, such as a reward model, has coefficients of router losses.
    Only models with a language head add them to their loss. There is no warning if the trainer adds them
    ([`~toolbox.training.RouterLossesMixin`]).

    Args:
        model (`nn.Module`):
            The model. It can be wrapped or have adapters.
    """
    classifiers = [module for module in model.modules() if isinstance(module, GenericForSequenceClassification)]
    if not any(getattr(module, "may_warn_of_losses", True) for module in classifiers):
        return
    ours = next((module for module in model.modules() if hasattr(module, "routing_planner")), None)
    if ours is None:
        return
    warning = unused_losses(experts_config_of(ours.config))
    if warning:
        logger.warning(warning)
    for module in classifiers:
        module.may_warn_of_losses = False  # it would log the same warning


def mean_losses(passes: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """
    Computes the mean of each loss over forward passes and over all processes, which must call this function together.

    Args:
        passes (`Sequence[Mapping[str, torch.Tensor]]`):
            Losses of each pass of this process, by name. Values that are NaN do not count.

    Returns:
        `dict[str, float]`: Means by name, without losses that no pass has.
    """
    if not passes:
        return {}
    device = next(iter(passes[0].values())).device
    names = list(passes[0])
    values = torch.stack([torch.stack([losses[name].to(device).float() for name in names]) for losses in passes])
    is_number = ~values.isnan()
    sums = torch.stack([values.masked_fill(~is_number, 0.0).sum(dim=0), is_number.sum(dim=0).float()])
    if is_one_of_several_processes():
        torch.distributed.all_reduce(sums)
    means = (sums[0] / sums[1]).tolist()
    return {name: mean for name, mean in zip(names, means, strict=True) if not math.isnan(mean)}
