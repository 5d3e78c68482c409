"""State of distributed attention that the layers of a forward pass share, one class per implementation.

[`~attention_plan.plan_attention`] chooses the implementation once per forward pass. The layers only call `attend`.
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
    Distributed attention through additional channels of the query, key and value, which works with every attention
    implementation. [`RunParts`] and [`RowParts`] are faster where they are applicable.

    Args:
        key_ids (`torch.Tensor` of shape `(B, S)`):
            Modality id of every key, cached ones included.
        num_modalities (`int`):
            Number M of modalities.
        log_priors (`torch.Tensor` of shape `(M,)`, *optional*):
            Log priors log π of the configuration and of the call. The learned log priors of a layer are added.
        guidance (`float`, *optional*, defaults to 0.0):
            Guidance scale g.
        counts (`torch.Tensor` of shape `(B, T, M)`, *optional*):
            Number of keys of each part that a query sees. Only set if the modality weights are returned.
        weights (`list[torch.Tensor]`, *optional*):
            Modality weights of the layers that have run, of shape `(B, H, T, M)` each.
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
        Computes the distributed attention of one layer.

        Args:
            attention_function (`Callable`):
                One of the attention functions in `ALL_ATTENTION_FUNCTIONS`.
            module (`torch.nn.Module`):
                The attention module.
            query (`torch.Tensor` of shape `(B, H, T, head_dim)`):
                Queries.
            key (`torch.Tensor` of shape `(B, H_kv, S, head_dim)`):
                Keys.
            value (`torch.Tensor` of shape `(B, H_kv, S, head_dim)`):
                Values.
            attention_mask (`Any`, *optional*):
                Mask in the format of the attention function.
            log_priors (`torch.Tensor` of shape `(H, M)`, *optional*):
                Learned log priors of the layer.
            kwargs (`Any`):
                Other arguments of the attention function.

        Returns:
            [`~distributed_attention.Merged`]: The output, and the modality weights if they are returned.
        """
        if torch.is_autocast_enabled(query.device.type):  # autocast does not support some of the kernels
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
        """Returns the modality weights of all layers as model outputs, or an empty dict if they are not returned."""
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
        """Returns the sum of the log priors of the layer, the configuration and the call, of shape `(H, M)`."""
        if self.log_priors is None:
            return learned
        given = self.log_priors.to(query.device)
        return given.expand(query.shape[1], -1) if learned is None else learned + given


@dataclass
class RunParts(AttentionParts):
    """
    Distributed attention over runs of one modality, on the CPU. It requires that there is no dropout, that all rows
    have the same runs and only a causal mask, and that the modality weights and the guidance need no gradient. Layers
    on other devices use [`AttentionParts`]. The other arguments are those of [`AttentionParts`].

    Args:
        runs (`tuple[Run, ...]`):
            The runs (see [`~attention_runs.Run`]).
    """

    runs: tuple[Run, ...] = ()

    def _attend(self, attention_function, module, query, key, value, attention_mask, *, log_priors, scaling, **kwargs):
        if not takes_runs(query):
            return super()._attend(
                attention_function, module, query, key, value, attention_mask,
                log_priors=log_priors, scaling=scaling, **kwargs,
            )  # fmt: skip
        length = query.shape[2]  # a static cache can be longer; the rest is empty
        output, weights = attend_runs(
            query, key[:, :, :length], value[:, :, :length], self.runs, self.num_modalities,
            scaling=scaling, log_priors=log_priors, guidance=self.guidance,
        )  # fmt: skip
        return Merged(output.transpose(1, 2).contiguous(), weights)


@dataclass
class RowParts(AttentionParts):
    """
    Distributed attention of a single query per row, computed directly. It requires that there is no dropout and that
    the mask is dense or `None`. The other arguments are those of [`AttentionParts`].

    Args:
        indicator (`torch.Tensor` of shape `(B, S, M)`, *optional*):
            1.0 if a key has the modality, otherwise 0.0. Computed by the first layer.
        keeps_rows (`bool`, *optional*, defaults to `False`):
            Whether to compute the modality weights of all layers together at the end, from their attention weights.
        rows (`list[torch.Tensor]`, *optional*):
            Attention weights of the layers that have run, of shape `(B, H, 1, S)` each. Only kept with `keeps_rows`.
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
        """See [`AttentionParts.read_out`]."""
        if self.rows:
            indicator = cast(torch.Tensor, self.indicator)
            with _without_autocast(indicator.device):
                self.weights += weights_of_rows(self.rows, indicator)
        return super().read_out()


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Disables autocast, so that the modality weights stay in float32."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
