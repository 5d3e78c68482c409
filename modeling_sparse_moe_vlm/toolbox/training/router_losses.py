"""Router losses in trainers that compute their loss from the logits of a model, such as TRL's `RewardTrainer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification

from ...checks import check
from ...experts_config import SparseMoeVlmExpertsConfig
from ...losses import losses_of_layers, weighted_router_loss
from ...routing import LayerRouting
from ...token_modalities import TokenModalities
from ..routing.loss_watch import losses_of
from ..routing.monitor import RoutingMonitor
from ..routing.watch import decoders, watch_routing
from .global_batch import global_batch


class RouterLossesMixin:
    """
    Adds the router losses of a model for sequence classification, such as a reward model, to the loss of a trainer.
    Such models do not do this themselves. Make a class of the mixin and the trainer, in this order.

    The coefficients are those of the model's configuration (`router_aux_loss_coef`, …); `output_router_logits` has no
    effect. The router losses are added in training only, so the losses of evaluations are those of the trainer. With
    gradient accumulation, they are averaged over the micro-batches like the loss of the trainer. In several processes,
    they are computed from the tokens of all of them. A [`~toolbox.routing.RoutingMonitor`] logs them.

    Raises:
        ValueError: If the model is not a model of this package for sequence classification.

    Example:

    ```python
    >>> from trl import RewardTrainer
    >>> from modeling_sparse_moe_vlm.toolbox.training import RouterLossesMixin

    >>> class SparseMoeRewardTrainer(RouterLossesMixin, RewardTrainer): ...
    ```
    """

    model: nn.Module
    callback_handler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        classifiers = [
            module for module in self.model.modules() if isinstance(module, GenericForSequenceClassification)
        ]
        check(
            bool(classifiers and decoders(self.model)),
            "`RouterLossesMixin` needs a model of this package for sequence classification, but got "
            f"{type(self.model).__name__}. Models with a language head add their router losses themselves.",
        )
        for module in classifiers:
            module.may_warn_of_losses = False  # that router losses have no effect

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Computes the loss of the trainer and, in training, adds the router losses."""
        if not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        total: list[torch.Tensor] = []

        def add(config: SparseMoeVlmExpertsConfig, tokens: TokenModalities, layers: Sequence[LayerRouting]) -> None:
            with global_batch(model):
                losses = losses_of_layers(config, tokens, layers)
                # The losses of such trainers are means over the rows of a micro-batch.
                total.append(weighted_router_loss(losses["router_loss"], layers[0].logits, None))
            self._log(losses)

        hooks = watch_routing(model, add)
        try:
            result = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            for hook in hooks:
                hook.remove()
        loss = result[0] if isinstance(result, tuple) else result
        for router_loss in total:
            loss = loss + router_loss.to(loss.device) / len(total)
        return (loss, *result[1:]) if isinstance(result, tuple) else loss

    def _log(self, losses: dict[str, torch.Tensor]) -> None:
        named = losses_of(decoders(self.model)[0], losses)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RoutingMonitor):
                callback.add_losses(named)
