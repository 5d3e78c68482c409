"""A trainer callback that counts, balances and reports routing, and logs router losses, speed and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import logging

from ...experts_config import SparseMoeVlmExpertsConfig, experts_config_of
from ...parallel_plans import is_one_of_several_processes
from ...routing import LayerRouting
from ...token_modalities import TokenModalities
from ..throughput import Throughput, largest_peak_memory
from ..trainer_figures import FiguresCallback
from .counts import RoutingCounts, count_batch, count_layers
from .loss_watch import mean_losses, warn_of_classifiers, warn_of_scaled_losses, watch_losses
from .router_bias import update_router_bias
from .statistics import RoutingStatistics, routing_statistics
from .watch import decoders, watch_routing
from .weight_watch import ModalityWeightsSample

logger = logging.get_logger(__name__)


class RoutingMonitor(FiguresCallback):
    """
    A callback that monitors a training in any trainer: `Trainer`, the trainers of TRL, or
    [`~toolbox.training.SparseMoeTrainer`], which already includes it. It counts the routing of micro-batches on their
    device, updates the biases of the routers once per training step, and warns if the routing of a modality has
    collapsed.

    Whenever the trainer logs the loss, the callback adds the following figures over the steps since the last log. All
    other callbacks receive them, such as those of TensorBoard and W&B:

    - Means of the router losses that the model computed: `aux_loss`, `aux_loss_<modality>`, `z_loss` and `router_loss`
      (the sum of all, with their coefficients). The trainers of TRL log their own `aux_loss`, which this replaces.
    - `routing/<group>/<modality>/<figure>`: routing over all layers (see [`~toolbox.routing.RoutingStatistics`]).
    - `routing/<place>/<group>/<modality>/<figure>` and `…/load/<expert>`: routing of each layer, if `by_layer`. These
      are neither printed nor stored in the history.
    - `modality_weights/layer_<layer>/<modality>`: mean weight of each modality in the attention (β, α, …), if
      `modality_weights`. Neither printed nor stored in the history.
    - `tokens_per_second`, `tokens_per_second_<modality>` (over all processes, without the time of evaluations), and
      `peak_memory_gib`.

    During training, an evaluation with labels gets the same router losses and `routing/<group>/<modality>/<figure>`
    as metrics, such as `eval_aux_loss`, so `metric_for_best_model` can name them.

    The model computes router losses if `config.output_router_logits` is set. Routing is counted if this or
    `config.router_bias_update_rate` is set. Models without our experts get `tokens_per_second`, `peak_memory_gib` and,
    if they return one, `aux_loss`.

    Args:
        by_layer (`bool`, *optional*):
            Whether to log the routing of each layer. By default, it is logged if `report_to` of the training arguments
            names an integration.
        modality_weights (`bool`, *optional*, defaults to `False`):
            Whether to log the weights of the attention parts, from one forward pass per log. This pass takes about a
            tenth longer. Only our own architecture has them.

    Attributes:
        statistics ([`~toolbox.routing.RoutingStatistics`], *optional*): Statistics of the last report.

    Example:

    ```python
    >>> from transformers import Trainer
    >>> from modeling_sparse_moe_vlm.toolbox.routing import RoutingMonitor

    >>> trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[RoutingMonitor()])
    ```
    """

    def __init__(self, by_layer: bool | None = None, modality_weights: bool = False) -> None:
        super().__init__()
        self.by_layer = by_layer
        self._weights = ModalityWeightsSample(when=_is_training) if modality_weights else None
        self.statistics: RoutingStatistics | None = None
        self._config: SparseMoeVlmExpertsConfig | None = None
        self._step: list[RoutingCounts] = []  # replicas of `DataParallel` append to it from their threads
        self._since_report: RoutingCounts | None = None
        self._losses: list[dict[str, torch.Tensor]] = []
        self._has_news = False  # whether the last log has new statistics
        self._has_labels = False  # whether the present forward pass has labels
        self._evaluated: list[RoutingCounts] = []
        self._evaluated_losses: list[dict[str, torch.Tensor]] = []
        self._alarmed: set[tuple[str, str, str]] = set()
        self._throughput = Throughput()
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Called by `Trainer`. From now on, every forward pass in training is counted."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        warn_of_scaled_losses(args, model)
        warn_of_classifiers(model)
        self._remove_hooks()  # hooks of an interrupted training
        self._step, self._since_report, self._losses = [], None, []
        self._evaluated, self._evaluated_losses = [], []
        self._hooks = [
            *self._watch_labels(model),
            *watch_routing(model, self._count, when=self._is_counted),
            *watch_losses(model, self._add_losses),
            *([] if self._weights is None else self._weights.watch(model)),
        ]
        self._throughput.start(model)

    def on_train_end(self, args, state, control, **kwargs):
        """Called by `Trainer`. Stops counting."""
        self._remove_hooks()
        self._throughput.stop()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _watch_labels(self, model: nn.Module) -> list[RemovableHandle]:
        """Evaluations pass labels. Generation and passes of a reference model do not."""

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._has_labels = kwargs.get("labels") is not None

        own = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        return [module.register_forward_pre_hook(before, with_kwargs=True) for module in own[:1]]

    def _is_evaluation(self, module: nn.Module) -> bool:
        return self._has_labels and not module.training and not torch.is_grad_enabled()

    def _is_counted(self, decoder: Any) -> bool:
        config = experts_config_of(decoder.config)
        is_watched = bool(config.output_router_logits or config.router_bias_update_rate)
        return is_watched and (_is_training(decoder) or self._is_evaluation(decoder))

    def _add_losses(self, model: nn.Module, inputs: Mapping[str, Any], losses: dict[str, torch.Tensor]) -> None:
        if _is_training(model):
            self.add_losses(losses)
        elif self._is_evaluation(model):
            self._evaluated_losses.append(losses)

    def add_losses(self, losses: dict[str, torch.Tensor]) -> None:
        """Adds the router losses of a forward pass in training, for trainers that compute them outside of the model."""
        self._losses.append(losses)

    def _count(
        self, config: SparseMoeVlmExpertsConfig, tokens: TokenModalities, layers: Sequence[LayerRouting]
    ) -> None:
        counts = count_layers(config, tokens, layers)
        if torch.is_grad_enabled():
            self._add(config, counts)
        else:
            self._config = config
            self._evaluated.append(counts)

    def _add(self, config: SparseMoeVlmExpertsConfig, counts: RoutingCounts) -> None:
        self._config = config
        self._step.append(counts)

    def add(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, torch.Tensor],
        router_logits: Sequence[torch.Tensor] | None,
        router_indices: Sequence[torch.Tensor] | None = None,
        router_dropped: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """
        Counts the routing of a forward pass, for custom training loops. With a trainer, do not call this method: the
        callback counts every forward pass.

        Args:
            model (`PreTrainedModel`):
                The model, without a wrapper for parallelism.
            inputs (`Mapping[str, torch.Tensor]`):
                Inputs of the forward pass.
            router_logits (`Sequence[torch.Tensor]`, *optional*):
                `outputs.router_logits` of the forward pass. Nothing is counted if it is `None`.
            router_indices (`Sequence[torch.Tensor]`, *optional*):
                `outputs.router_indices` of the forward pass. By default, the chosen experts are computed from the
                logits and the current biases of the routers.
            router_dropped (`Sequence[torch.Tensor]`, *optional*):
                `outputs.router_dropped` of the forward pass.
        """
        counts = count_batch(model, inputs, router_logits, router_indices, router_dropped) if decoders(model) else None
        if counts is not None:
            self._add(experts_config_of(model.config), counts)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Called by `Trainer` after the optimizer's step. Updates the biases of the routers."""
        self._throughput.add_time()
        if not self._step or self._config is None:
            return
        counts = _sum(self._step)
        self._step = []
        if self._config.router_bias_update_rate:
            update_router_bias(model, counts)
        self._since_report = counts if self._since_report is None else self._since_report + counts

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Called by `Trainer` after every evaluation."""
        super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
        self._throughput.resume()

    def on_save(self, args, state, control, **kwargs):
        """Called by `Trainer` after it has saved a checkpoint."""
        self._throughput.resume()

    def training_figures(self, args, model):
        """See [`FiguresCallback.training_figures`]."""
        self._throughput.add_time()  # the trainer has just waited for the device
        report = self.report()
        self._has_news = bool(report)
        figures = mean_losses(self._losses) | _named(report)
        self._losses = []
        figures |= self._throughput.figures()
        peak = largest_peak_memory(args.device)
        figures |= {} if peak is None else {"peak_memory_gib": peak}
        return {name: round(value, 4) for name, value in figures.items()}

    def training_details(self, args):
        """See [`FiguresCallback.training_details`]."""
        weights = {} if self._weights is None else self._weights.figures()
        details = {f"modality_weights/{name}": value for name, value in weights.items()}
        is_wanted = bool(args.report_to) if self.by_layer is None else self.by_layer
        if is_wanted and self.statistics is not None and self._has_news:
            details |= _named(self.statistics.metrics() | self.statistics.loads())
        return details

    def evaluation_figures(self, args, state, model, processing_class, prefix):
        """See [`FiguresCallback.evaluation_figures`]."""
        counts, losses = self._evaluated, self._evaluated_losses
        self._evaluated, self._evaluated_losses = [], []
        figures = mean_losses(losses)
        if counts and self._config is not None:
            figures |= _named(routing_statistics(self._config, _sum(counts).over_processes()).summary())
        return {f"{prefix}_{name}": round(value, 4) for name, value in figures.items()}

    def log_state(self) -> dict[str, Any]:
        """Returns what was counted since the last report, which [`~toolbox.training.SparseMoeTrainer`] saves."""
        counts = self._since_report
        return {
            "counts": None if counts is None else vars(counts),
            "losses": self._losses,
            "alarmed": sorted(self._alarmed),
        }

    def load_log_state(self, state: Mapping[str, Any]) -> None:
        """Continues with what [`log_state`] returned."""
        counts = state["counts"]
        self._since_report = None if counts is None else RoutingCounts(**counts)
        self._losses = list(state["losses"])
        self._alarmed = {tuple(place) for place in state["alarmed"]}

    def report(self) -> dict[str, float]:
        """
        Summarises the routing since the last report, over all data-parallel processes. All of them must call this
        method. The first process logs a warning for every layer, group and modality that has collapsed since the last
        report.

        Returns:
            `dict[str, float]`: The figures of [`RoutingStatistics.summary`], by `"<group>/<modality>/<figure>"`. Empty
            if nothing was counted.
        """
        if self._since_report is None or self._config is None:
            return {}
        self.statistics = routing_statistics(self._config, self._since_report.over_processes())
        self._since_report = None
        alarms = self.statistics.alarms()
        if not is_one_of_several_processes() or torch.distributed.get_rank() == 0:
            for place, message in alarms.items():
                if place not in self._alarmed:
                    logger.warning(message)
        self._alarmed = set(alarms)
        return self.statistics.summary()


def _is_training(module: nn.Module) -> bool:
    """Whether the next forward pass of a module is part of training, not of generation or a reference model."""
    return module.training and torch.is_grad_enabled()


def _sum(counts: list[RoutingCounts]) -> RoutingCounts:
    return sum(counts[1:], counts[0])


def _named(figures: Mapping[str, float]) -> dict[str, float]:
    return {f"routing/{name}": value for name, value in figures.items()}
