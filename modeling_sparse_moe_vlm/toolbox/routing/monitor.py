"""What a training loop does about routing: counts it, balances it, reports it and warns when it collapses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from ...config_validation import TEXT_MODEL_TYPE
from ...experts_config import SparseMoeVlmExpertsConfig
from ...parallel_plans import is_one_of_several_processes
from .counts import RoutingCounts, count_batch
from .router_bias import update_router_bias
from .statistics import RoutingStatistics, routing_statistics

logger = logging.get_logger(__name__)


class RoutingMonitor(TrainerCallback):
    """
    Adds up the routing of micro-batches on their device, moves the routers' biases once per training step, and tells
    how experts were used since the last report. Models of other classes are left alone.

    Attributes:
        statistics ([`~toolbox.routing.RoutingStatistics`], *optional*): Those of the last report.
    """

    def __init__(self) -> None:
        self.statistics: RoutingStatistics | None = None
        self._config: SparseMoeVlmExpertsConfig | None = None
        self._step: RoutingCounts | None = None
        self._since_report: RoutingCounts | None = None
        self._alarmed: set[tuple[str, str, str]] = set()

    def add(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, torch.Tensor],
        router_logits: Sequence[torch.Tensor] | None,
    ) -> None:
        """
        Counts the routing of a forward pass in training.

        Args:
            model (`PreTrainedModel`):
                The model, without a wrapper for parallelism.
            inputs (`Mapping[str, torch.Tensor]`):
                What it was given.
            router_logits (`Sequence[torch.Tensor]`, *optional*):
                What it returned.

        Raises:
            ValueError: If the routers' biases are to be moved, but there are no router logits to tell how.
        """
        config = model.config.get_text_config()
        if config.model_type != TEXT_MODEL_TYPE:
            return
        counts = count_batch(model, inputs, router_logits)
        if counts is None:
            if config.router_bias_update_rate and config.layers_by_experts:
                raise ValueError(
                    "`router_bias_update_rate` is set, but the model returns no router logits to balance by: set "
                    "`output_router_logits=True` in its configuration (and `router_aux_loss_coef=0` for no other "
                    "balancing)."
                )
            return
        self._config = config
        self._step = counts if self._step is None else self._step + counts

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Called by `Trainer` after the optimizer's step."""
        if self._step is None or self._config is None:
            return
        if self._config.router_bias_update_rate:
            update_router_bias(model, self._step)
        self._since_report = self._step if self._since_report is None else self._since_report + self._step
        self._step = None

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
