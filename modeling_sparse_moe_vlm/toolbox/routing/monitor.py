"""A trainer callback that counts, balances and reports routing, and warns if it collapses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from ...experts_config import SparseMoeVlmExpertsConfig, experts_config_of
from ...parallel_plans import is_one_of_several_processes
from ...routing import LayerRouting
from ...token_modalities import TokenModalities
from .counts import RoutingCounts, count_batch, count_layers
from .router_bias import update_router_bias
from .statistics import RoutingStatistics, routing_statistics
from .watch import decoders, watch_routing

logger = logging.get_logger(__name__)


class RoutingMonitor(TrainerCallback):
    """
    A callback that monitors routing in any trainer: `Trainer`, the trainers of TRL, or
    [`~toolbox.training.SparseMoeTrainer`], which already includes it. It counts the routing of micro-batches on their
    device, updates the biases of the routers once per training step, and reports how the experts were used whenever the
    trainer logs the loss. It warns if the routing of a modality has collapsed. Models without our experts are ignored.

    The report is added to the trainer's `state.log_history` as `routing/<group>/<modality>/<figure>` (see
    [`~toolbox.routing.RoutingStatistics`]). It requires that the model returns its router logits
    (`config.output_router_logits`) or that `config.router_bias_update_rate` is set.

    Attributes:
        statistics ([`~toolbox.routing.RoutingStatistics`], *optional*): Statistics of the last report.

    Example:

    ```python
    >>> from transformers import Trainer
    >>> from modeling_sparse_moe_vlm.toolbox.routing import RoutingMonitor

    >>> trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[RoutingMonitor()])
    ```
    """

    def __init__(self) -> None:
        self.statistics: RoutingStatistics | None = None
        self._config: SparseMoeVlmExpertsConfig | None = None
        self._step: list[RoutingCounts] = []  # replicas of `DataParallel` append to it from their threads
        self._since_report: RoutingCounts | None = None
        self._alarmed: set[tuple[str, str, str]] = set()
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Called by `Trainer`. From now on, the routing of every forward pass in training is counted."""
        self._remove_hooks()  # hooks of an interrupted training
        self._step, self._since_report = [], None
        self._hooks = watch_routing(model, self._count, when=_is_counted)

    def on_train_end(self, args, state, control, **kwargs):
        """Called by `Trainer`. Stops counting."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _count(
        self, config: SparseMoeVlmExpertsConfig, tokens: TokenModalities, layers: Sequence[LayerRouting]
    ) -> None:
        self._add(config, count_layers(config, tokens, layers))

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
        if not self._step or self._config is None:
            return
        first, *others = self._step
        self._step = []
        counts = sum(others, first)
        if self._config.router_bias_update_rate:
            update_router_bias(model, counts)
        self._since_report = counts if self._since_report is None else self._since_report + counts

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Called by `Trainer` in all processes, after it has appended the log to the history. Adds the report to it."""
        if logs is not None and "loss" in logs:
            figures = {f"routing/{name}": round(value, 4) for name, value in self.report().items()}
            if figures:
                state.log_history[-1].update(figures)

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


def _is_counted(decoder: Any) -> bool:
    """Whether the next forward pass is part of training, not of evaluation, generation or a reference model."""
    is_training = decoder.training and torch.is_grad_enabled()
    config = experts_config_of(decoder.config)
    return is_training and bool(config.output_router_logits or config.router_bias_update_rate)
