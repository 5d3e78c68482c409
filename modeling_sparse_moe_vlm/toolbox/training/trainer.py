"""A `Trainer` for models with experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

from ...checks import check
from ...experts_config import experts_config_of
from ...losses import weighted_router_loss
from ..expert_modules import our_experts_config
from ..hub.push_trainer import PushesCheckpoints
from ..routing.monitor import RoutingMonitor
from .global_batch import global_batch
from .memory_errors import MemoryErrorsNameRows
from .resuming import ResumableTrainer
from .training_settings import no_training_settings


class _NextTokenSmoother(LabelSmoother):
    """Label smoothing with shifted labels. `Trainer` shifts them only for the model classes that it knows."""

    def __call__(self, model_output, labels, shift_labels=True, num_items_in_batch=None):
        return super().__call__(model_output, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)


def _with_router_loss(function: Callable) -> Callable:
    """Adds the router losses to a loss function that is computed outside of the model."""

    def loss_with_router_loss(outputs, labels, *args, num_items_in_batch=None, **kwargs):
        loss = function(outputs, labels, *args, num_items_in_batch=num_items_in_batch, **kwargs)
        router_loss = outputs.get("router_loss")
        if router_loss is None:
            return loss
        return loss + weighted_router_loss(router_loss.to(loss.device), labels, num_items_in_batch)

    return loss_with_router_loss


def _with_gradient(loss: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """
    Returns a loss that has a gradient. If only parts for images train, the loss of a batch of texts has none. The
    gradients of all parameters are then 0.
    """
    if loss.requires_grad:
        return loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss + sum((0.0 * parameter.sum()).to(loss) for parameter in trained)


class SparseMoeTrainer(PushesCheckpoints, MemoryErrorsNameRows, ResumableTrainer):
    """
    A `Trainer` for models with experts. It takes the same arguments as `Trainer`. In addition:

    - It has a [`~toolbox.routing.RoutingMonitor`], `trainer.routing`, which logs router losses, routing, speed and
      memory, and updates the biases of the routers after every step (`config.router_bias_update_rate`). To set its
      options, pass one among the `callbacks`.
    - If the loss is computed outside of the model (`compute_loss_func`, `label_smoothing_factor`), the router losses
      are added to it. Label smoothing compares every logit with the label of the next position.
    - `train(resume_from_checkpoint=True)` resumes from the newest complete checkpoint, and logs a warning that names
      newer, incomplete ones. The resumed run equals the uninterrupted one, also with a stream of
      [`~toolbox.data.load_rows`], whose earlier rows are not read again.
    - A batch of texts does not stop the training if only parts for images train, such as the connector.
    - A process whose batch has no image does not stop the others (DDP, FSDP2, expert parallelism).
    - An error about missing memory names the rows of the batch, with their sizes.
    - Uploads (`push_to_hub`) contain the whole checkpoint and nothing else, as those of
      [`~toolbox.hub.push_checkpoint`], also during training (`args.push_to_hub`).
    - Saved models do not keep `config.output_router_logits`, which router losses require in training.

    Raises:
        ValueError: In training, if `router_bias_update_rate` is set but the model does not return its router logits.
    """

    label_smoother: Callable | None
    compute_loss_func: Callable | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None:
            self.label_smoother = _with_router_loss(_NextTokenSmoother(epsilon=self.args.label_smoothing_factor))
        if self.compute_loss_func is not None:
            self.compute_loss_func = _with_router_loss(self.compute_loss_func)
        given = [one for one in self.callback_handler.callbacks if isinstance(one, RoutingMonitor)]
        self.routing = given[0] if given else RoutingMonitor()
        if not given:
            self.add_callback(self.routing)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """
        Trains the model, as `Trainer.train` does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Path to a checkpoint, or `True` to resume from the newest complete checkpoint in `args.output_dir`.
            *args: Further positional arguments of `Trainer.train`.
            **kwargs: Further keyword arguments of `Trainer.train`.

        Returns:
            `TrainOutput`: The result of `Trainer.train`.

        Raises:
            ValueError: If there is no complete checkpoint to resume from, or if `router_bias_update_rate` is set but
                the model does not return its router logits.
        """
        config = our_experts_config(self.accelerator.unwrap_model(self.model).config)
        check(
            not (config and config.router_bias_update_rate and config.layers_by_experts) or config.output_router_logits,
            "`router_bias_update_rate` is set, but the model does not return router logits: set "
            "`output_router_logits=True` in its configuration (and `router_aux_loss_coef=0` to disable the load "
            "balancing loss).",
        )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        has_own_loss = self.label_smoother is not None or self.compute_loss_func is not None
        config = experts_config_of(self.accelerator.unwrap_model(model).config)
        if has_own_loss and getattr(config, "output_router_logits", False):
            # In evaluation, a model without labels does not compute router losses unless this is set.
            inputs["output_router_logits"] = True
        with global_batch(model):
            result = super().compute_loss(model, inputs, *args, **kwargs)
        if not (model.training and torch.is_grad_enabled()):
            return result
        if isinstance(result, tuple):
            return (_with_gradient(result[0], model), *result[1:])
        return _with_gradient(result, model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with no_training_settings(self.accelerator.unwrap_model(self.model)):
            super()._save(output_dir, state_dict=state_dict)
