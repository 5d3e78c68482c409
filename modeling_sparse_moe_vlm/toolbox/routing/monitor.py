"""What a training loop does about routing: counts it, balances it, reports it and warns when it collapses."""

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
    A callback for any trainer (`Trainer`, TRL's, [`~toolbox.training.SparseMoeTrainer`], which has one already): adds
    up the routing of micro-batches on their device, moves the routers' biases once per training step, and with every
    log of the loss reports how experts were used since the last, with a warning where one has collapsed. Models of
    other classes are left alone.

    The report goes to the trainer's `state.log_history`, as `routing/<group>/<modality>/<figure>` (see
    [`~toolbox.routing.RoutingStatistics`]). There is one where the model returns its router logits
    (`config.output_router_logits`) or `config.router_bias_update_rate` is set.

    Attributes:
        statistics ([`~toolbox.routing.RoutingStatistics`], *optional*): Those of the last report.

    ```python
    >>> from transformers import Trainer
    >>> from modeling_sparse_moe_vlm.toolbox.routing import RoutingMonitor

    >>> trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[RoutingMonitor()])
    ```
    """

    def __init__(self) -> None:
        self.statistics: RoutingStatistics | None = None
        self._config: SparseMoeVlmExpertsConfig | None = None
        self._step: list[RoutingCounts] = []  # appended to, also by replicas of `DataParallel` in their threads
        self._since_report: RoutingCounts | None = None
        self._alarmed: set[tuple[str, str, str]] = set()
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Called by `Trainer`: from here on the routing of every forward pass in training is counted."""
        self._remove_hooks()  # of a training that was cut off
        self._step, self._since_report = [], None
        self._hooks = watch_routing(model, self._count, when=_is_counted)

    def on_train_end(self, args, state, control, **kwargs):
        """Called by `Trainer`."""
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
        Counts the routing of a forward pass in training, for training loops of your own: a trainer needs no call.

        Args:
            model (`PreTrainedModel`):
                The model, without a wrapper for parallelism.
            inputs (`Mapping[str, torch.Tensor]`):
                What it was given.
            router_logits, router_indices, router_dropped (`Sequence[torch.Tensor]`, *optional*):
                What it returned.
        """
        counts = count_batch(model, inputs, router_logits, router_indices, router_dropped) if decoders(model) else None
        if counts is not None:
            self._add(experts_config_of(model.config), counts)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Called by `Trainer` after the optimizer's step."""
        if not self._step or self._config is None:
            return
        first, *others = self._step
        self._step = []
        counts = sum(others, first)
        if self._config.router_bias_update_rate:
            update_router_bias(model, counts)
        self._since_report = counts if self._since_report is None else self._since_report + counts

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Called by `Trainer` in all processes, after the log has become the last entry of the history."""
        if logs is not None and "loss" in logs:
            figures = {f"routing/{name}": round(value, 4) for name, value in self.report().items()}
            if figures:
                state.log_history[-1].update(figures)

    def report(self) -> dict[str, float]:
        """
        The summary of the routing since the last report, over all data-parallel processes, all of which must call this.
        Warns of every layer, group and modality that has collapsed since.
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
    """Whether the next forward pass is one of training: not an evaluation, generation or reference model's."""
    is_training = decoder.training and torch.is_grad_enabled()
    config = experts_config_of(decoder.config)
    return is_training and bool(config.output_router_logits or config.router_bias_update_rate)
