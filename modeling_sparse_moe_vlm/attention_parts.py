"""What the layers of a forward pass share of distributed attention, in the form that the plan has chosen.

[`.attention_plan.plan_attention`] chooses once per forward pass; a layer only calls `attend`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from .attention_runs import Run, attend_runs, takes_runs
from .distributed_attention import Merged, attend_by_channels, attend_by_row, count_free, weights_of_rows
from .visible_keys import fit_to_keys

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass
class AttentionParts:
    """
    Distributed attention in the form that fits every pass: through extra channels of the backend's own call. Where they
    fit, [`RunParts`] and [`RowParts`] cost less.

    Args:
        key_ids (`torch.Tensor` of shape `(B, S)`):
            Modality id of every key, cached ones included.
        num_modalities (`int`):
            Number M of modalities.
        log_priors (`torch.Tensor` of shape `(M,)`, *optional*):
            log π of the configuration and of the call; the learned ones of a layer come on top.
        guidance (`float`):
            g.
        counts (`torch.Tensor` of shape `(B, T, M)`, *optional*):
            Number of keys of each part that a query sees, where the weights are read out.
        weights (`list[torch.Tensor]`):
            What the layers read out, `(B, H, T, M)` each.
    """

    key_ids: torch.Tensor
    num_modalities: int
    log_priors: torch.Tensor | None = None
    guidance: float = 0.0
    counts: torch.Tensor | None = None
    weights: list[torch.Tensor] = field(default_factory=list)

    def attend(
        self,
        attention_function: AttentionFunction,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        log_priors: torch.Tensor | None,
        **kwargs: Any,
    ) -> Merged:
        """
        Distributed attention of one layer.

        Args:
            log_priors (`torch.Tensor` of shape `(H, M)`, *optional*):
                The learned log-priors of the layer.

        The other arguments are those of the attention functions in `ALL_ATTENTION_FUNCTIONS`.

        Returns:
            [`Merged`]
        """
        if torch.is_autocast_enabled(query.device.type):  # some of the kernels are not covered by autocast
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        merged = self._attend(
            attention_function, module, query, key, value, attention_mask,
            log_priors=self._all_log_priors(log_priors, query), **kwargs,
        )  # fmt: skip
        if self.counts is not None and merged.weights is not None:
            self.weights.append(merged.weights)
        return merged

    def read_out(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """What the layers read out, by name of the output; nothing where the weights are not read out."""
        if self.counts is None:
            return {}
        weights = torch.stack([weights.to(self.counts.device) for weights in self.weights])
        return {
            "modality_weights": tuple(self.weights),
            "count_free_modality_weights": count_free(weights, self.counts).unbind(),
        }

    def _attend(
        self,
        attention_function: AttentionFunction,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *,
        log_priors: torch.Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> Merged:
        return attend_by_channels(
            attention_function, module, query, key, value, attention_mask, self._ids_of(key), self.num_modalities,
            log_priors=log_priors, scaling=scaling, guidance=self.guidance, **kwargs,
        )  # fmt: skip

    def _ids_of(self, key: torch.Tensor) -> torch.Tensor:
        return fit_to_keys(self.key_ids.to(key.device), key.shape[2])

    def _all_log_priors(self, learned: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
        """`(H, M)`: of the layer, the configuration and the call together."""
        if self.log_priors is None:
            return learned
        given = self.log_priors.to(query.device)
        return given.expand(query.shape[1], -1) if learned is None else learned + given


@dataclass
class RunParts(AttentionParts):
    """
    Run by run, on the CPU: without dropout, where all rows share their runs, only later keys are masked, and neither
    the weights nor guidance need a gradient. A layer on another device goes through channels.

    Args:
        runs (`tuple[Run, ...]`):
            The runs of one modality.
    """

    runs: tuple[Run, ...] = ()

    def _attend(self, attention_function, module, query, key, value, attention_mask, *, log_priors, scaling, **kwargs):
        if not takes_runs(query):
            return super()._attend(
                attention_function, module, query, key, value, attention_mask,
                log_priors=log_priors, scaling=scaling, **kwargs,
            )  # fmt: skip
        length = query.shape[2]  # the rest of a static cache is empty
        output, weights = attend_runs(
            query, key[:, :, :length], value[:, :, :length], self.runs, self.num_modalities,
            scaling=scaling, log_priors=log_priors, guidance=self.guidance,
        )  # fmt: skip
        return Merged(output.transpose(1, 2).contiguous(), weights)


@dataclass
class RowParts(AttentionParts):
    """
    One query, by the plain formula, without dropout, with a dense mask or none.

    Args:
        indicator (`torch.Tensor` of shape `(B, S, M)`, *optional*):
            1.0 where a key is of a modality, else 0.0: made by the first layer.
        keeps_rows (`bool`):
            Whether the weights are read out for all layers together, from the attention that every layer keeps.
        rows (`list[torch.Tensor]`):
            What the layers kept for that, `(B, H, 1, S)` each.
    """

    indicator: torch.Tensor | None = None
    keeps_rows: bool = False
    rows: list[torch.Tensor] = field(default_factory=list)

    def _attend(self, attention_function, module, query, key, value, attention_mask, *, log_priors, scaling, **kwargs):
        key_ids = self._ids_of(key)
        if self.indicator is None:
            self.indicator = torch.nn.functional.one_hot(key_ids, self.num_modalities).float()
        with _without_autocast(query.device):
            merged = attend_by_row(
                query, key, value, attention_mask, key_ids, self.num_modalities,
                scaling=scaling, log_priors=log_priors, guidance=self.guidance,
                indicator=self.indicator.to(key.device), weigh=self.counts is not None and not self.keeps_rows,
            )  # fmt: skip
        if not self.keeps_rows:
            return Merged(merged.output, merged.weights)
        self.rows.append(cast(torch.Tensor, merged.attentions))
        return Merged(merged.output)

    def read_out(self) -> dict[str, tuple[torch.Tensor, ...]]:
        if self.rows:
            indicator = cast(torch.Tensor, self.indicator)
            with _without_autocast(indicator.device):
                self.weights += weights_of_rows(self.rows, indicator)
        return super().read_out()


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """The weights stay in float32."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
