"""The models' own router losses in TRL trainers (SFT, DPO, KTO, GRPO, RLOO), which replace the `forward` of a model.

`trl.trainer.utils.add_fused_lm_head` assigns a `forward` that calls the model without its head, computes the load
balancing loss of Mixtral from the router logits of all modalities together, and returns it as `aux_loss`. The trainer
adds `router_aux_loss_coef · aux_loss` to its loss. The `forward` made here returns the sum of all router losses with
their coefficients, divided by `router_aux_loss_coef`, as `aux_loss`. Therefore the trainer adds the same losses as the
model itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .checks import check
from .experts_config import SparseMoeVlmExpertsConfig, experts_config_of
from .losses import losses_of_layers
from .routing import RoutingRecord

logger = logging.get_logger(__name__)

# The coefficients that the configurations of TRL trainers do not have.
OTHER_COEFFICIENTS = ("router_z_loss_coef", "router_local_entropy_coef", "router_global_entropy_coef")


def takes_fused_head(forward: Any) -> bool:
    """Returns whether a `forward` is that of TRL, which is the only one with an argument `fused_lm_head`."""
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    return code is not None and "fused_lm_head" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def with_own_router_losses(model: nn.Module, forward: Callable) -> MethodType:
    """
    Returns the `forward` of TRL with the model's own router losses instead of the loss of Mixtral.

    Args:
        model (`nn.Module`):
            A model of this package with a language head.
        forward (`Callable`):
            The `forward` of TRL, bound to the model or unbound.

    Returns:
        `MethodType`: A `forward` for the model with the same signature. In training, it raises `ValueError` if a router
        loss would have no effect.
    """
    function = getattr(forward, "__func__", forward)

    @functools.wraps(function)
    def forward_with_router_losses(self, *args, fused_lm_head: bool = False, **kwargs):
        if not fused_lm_head:
            return function(self, *args, **kwargs)
        config = experts_config_of(self.config)
        is_wanted = kwargs.pop("output_router_logits", None)
        if self.training and torch.is_grad_enabled():
            _check_coefficients(config, is_requested=bool(is_wanted))
        if is_wanted is None:
            is_wanted = config.output_router_logits
        # A tool that observes the routing passes a record to the whole model and to its base model, and reports each
        # record that is filled. Only that of the base model is, so the pass counts once.
        kwargs.pop("routing_record", None)
        record = RoutingRecord()
        outputs = function(self, *args, fused_lm_head=True, output_router_logits=False, routing_record=record, **kwargs)
        if is_wanted:
            losses = _router_losses(config, record)
            outputs.aux_loss = _divided_total(config, losses, outputs.loss)
            outputs.loss = outputs.loss + config.router_aux_loss_coef * outputs.aux_loss
            # For logs. An attribute and not a field, so it does not become part of what the model returns.
            outputs.router_losses = losses
        return outputs

    return MethodType(forward_with_router_losses, model)


def unused_losses(config: SparseMoeVlmExpertsConfig) -> str:
    """
    Returns a warning for models for sequence classification, which do not add router losses to their loss.

    Args:
        config (`SparseMoeVlmExpertsConfig`):
            Configuration of the experts.

    Returns:
        `str`: The warning, which names the coefficients without effect. Empty if there are none.
    """
    coefficients = [name for name in ("router_aux_loss_coef", *OTHER_COEFFICIENTS) if getattr(config, name)]
    if not (coefficients and config.sparse_layers):
        return ""
    names = ", ".join(f"`{name}`" for name in coefficients)
    return (
        f"{names} {'have' if coefficients[1:] else 'has'} no effect: models for sequence classification do not add "
        "router losses to their loss. `RouterLossesMixin` (`from modeling_sparse_moe_vlm.toolbox.training import "
        "RouterLossesMixin`) adds them to the loss of TRL's `RewardTrainer`. Otherwise, set them to 0 to silence this "
        "warning, and `router_bias_update_rate` to balance the load without a loss."
    )


def _router_losses(config: SparseMoeVlmExpertsConfig, record: RoutingRecord) -> dict[str, torch.Tensor]:
    """Returns the router losses of a forward pass as model outputs. Empty for models without sparse layers."""
    layers, tokens = record.layers(), record.tokens
    if not layers or tokens is None:
        return {}
    return losses_of_layers(config, tokens, layers)


def _divided_total(
    config: SparseMoeVlmExpertsConfig, losses: dict[str, torch.Tensor], loss: torch.Tensor
) -> torch.Tensor:
    """Returns the sum of the router losses, divided by `router_aux_loss_coef`. 0 for models without sparse layers."""
    if not losses:
        return loss.new_zeros(())
    coefficient = config.router_aux_loss_coef
    return (losses["router_loss"] / coefficient if coefficient else losses["aux_loss"]).to(loss.device)


def _check_coefficients(config: SparseMoeVlmExpertsConfig, is_requested: bool) -> None:
    """
    Raises `ValueError` if the trainer would not add a router loss that only the model's configuration can ask for. Logs
    a warning if it would not add the load balancing loss.
    """
    if not config.sparse_layers:
        return
    lost = [name for name in OTHER_COEFFICIENTS if getattr(config, name)]
    check(
        (bool(config.router_aux_loss_coef) and is_requested) or not lost,
        f"{', '.join(f'`{name}`' for name in lost)} would have no effect: TRL trainers only add router losses if "
        "`router_aux_loss_coef` is not 0. Set it to a small number, such as 1e-6, in the model's configuration (and "
        "not to 0 in the trainer's configuration), or set the other coefficients to 0.",
    )
    if config.router_aux_loss_coef and not is_requested:
        logger.warning_once(
            f"The model has `router_aux_loss_coef={config.router_aux_loss_coef}`, but the trainer does not request "
            "router losses, so they are not trained with. If this is not intended, do not set `router_aux_loss_coef` "
            "to 0 in the trainer's configuration, and use SFT, DPO, KTO, GRPO or RLOO."
        )
