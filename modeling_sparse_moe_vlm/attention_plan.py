"""What a forward pass knows of its attention parts, and which form of distributed attention it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing

from .attention_runs import Run, attend_runs, can_attend_runs, find_runs
from .checks import check, check_number
from .distributed_attention import Merged, attend_by_channels, attend_by_row, count_free, weights_of_rows

# Attention of one query over all keys that layers keep for reading out together; more would be memory.
MAX_KEPT_ROW = 2**20


@dataclass
class AttentionParts:
    """
    Made once per forward pass and handed to every layer, which adds its weights where they are read out.

    Args:
        key_ids (`torch.Tensor` of shape `(B, S)`):
            Modality id of every key, cached ones included.
        num_modalities (`int`):
            Number M of modalities.
        log_priors (`torch.Tensor` of shape `(M,)`, *optional*):
            log π of the configuration and of the call; the learned ones of a layer come on top.
        guidance (`float`):
            g.
        runs (`tuple[Run, ...]`, *optional*):
            The runs of one modality, where all rows share them and nothing is masked but what comes later.
        counts (`torch.Tensor` of shape `(B, T, M)`, *optional*):
            Number of keys of each part that a query sees, where the weights are read out.
        indicator (`torch.Tensor` of shape `(B, S, M)`, *optional*):
            1.0 where a key is of a modality, else 0.0: made by the first layer that needs it.
        weights (`list[torch.Tensor]`):
            What the layers read out, `(B, H, T, M)` each.
        keeps_rows (`bool`):
            Whether the weights of one query are read out for all layers together, and not handed back by each.
        rows (`list[torch.Tensor]`):
            What the layers kept for that, `(B, H, 1, S)` each.
    """

    key_ids: torch.Tensor
    num_modalities: int
    log_priors: torch.Tensor | None = None
    guidance: float = 0.0
    runs: tuple[Run, ...] | None = None
    counts: torch.Tensor | None = None
    indicator: torch.Tensor | None = None
    weights: list[torch.Tensor] = field(default_factory=list)
    keeps_rows: bool = False
    rows: list[torch.Tensor] = field(default_factory=list)

    def attend(
        self,
        attention_function: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        log_priors: torch.Tensor | None,
        *,
        scaling: float,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> Merged:
        """
        Distributed attention of one layer, in the cheapest form that fits.

        Args:
            log_priors (`torch.Tensor` of shape `(H, M)`, *optional*):
                The learned log-priors of the layer.

        The other arguments are those of the attention functions in `ALL_ATTENTION_FUNCTIONS`.

        Returns:
            [`Merged`]
        """
        if torch.is_autocast_enabled(query.device.type):  # for kernels that it does not know
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        log_priors = self._all_log_priors(log_priors, query)
        key_ids = _fit(self.key_ids.to(key.device), key.shape[2])
        forms: dict[str, Any] = {"scaling": scaling, "log_priors": log_priors, "guidance": self.guidance}
        needs_gradient = torch.is_grad_enabled() and (
            query.requires_grad or (log_priors is not None and log_priors.requires_grad)
        )
        reads_out = self.counts is not None
        wants_attentions = bool(kwargs.get("output_attentions"))
        if (
            self.runs is not None
            and self.runs[-1].stop == query.shape[2]
            and can_attend_runs(query, dropout)
            # Neither the weights nor guidance have a gradient in this form.
            and not (needs_gradient and (reads_out or self.guidance))
            and not wants_attentions
        ):
            length = query.shape[2]
            output, weights = attend_runs(
                query, key[:, :, :length], value[:, :, :length], self.runs, self.num_modalities, **forms
            )
            merged = Merged(output.transpose(1, 2).contiguous(), weights)
        elif _is_row(query, attention_mask) and dropout == 0.0 and not wants_attentions:
            if self.indicator is None:
                self.indicator = F.one_hot(key_ids, self.num_modalities).float()
            with _without_autocast(query.device):
                merged = attend_by_row(
                    query, key, value, attention_mask, key_ids, self.num_modalities, **forms,
                    indicator=self.indicator.to(key.device),
                    weigh=not self.keeps_rows or key_ids.numel() * query.shape[1] > MAX_KEPT_ROW,
                )  # fmt: skip
            if merged.weights is None and reads_out:
                self.rows.append(cast(torch.Tensor, merged.attentions))
            merged = Merged(merged.output, merged.weights)
        else:
            merged = attend_by_channels(
                attention_function, module, query, key, value, attention_mask, key_ids, self.num_modalities,
                dropout=dropout, **forms, **kwargs,
            )  # fmt: skip
        if self.counts is not None and merged.weights is not None:
            self.weights.append(merged.weights)
        return merged

    def read_out(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """What the layers read out, by name of the output; nothing where the weights are not read out."""
        if self.counts is None:
            return {}
        if self.rows:
            indicator = cast(torch.Tensor, self.indicator)
            with _without_autocast(indicator.device):
                self.weights += weights_of_rows(self.rows, indicator)
        weights = torch.stack([weights.to(self.counts.device) for weights in self.weights])
        return {
            "modality_weights": tuple(self.weights),
            "count_free_modality_weights": count_free(weights, self.counts).unbind(),
        }

    def _all_log_priors(self, learned: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
        """`(H, M)`: of the layer, the configuration and the call together."""
        if self.log_priors is None:
            return learned
        given = self.log_priors.to(query.device)
        return given.expand(query.shape[1], -1) if learned is None else learned + given


def plan_attention(
    config: PreTrainedConfig,
    mm_token_type_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    cache: Cache | None,
    *,
    has_learned_priors: bool = False,
    output_modality_weights: bool = False,
    modality_priors: Mapping[str, float] | None = None,
    modality_guidance: float = 0.0,
) -> AttentionParts | None:
    """
    Decides whether a forward pass needs distributed attention, and gathers what it takes.

    Args:
        config (`SparseMoeVlmTextConfig`):
            Configuration of the decoder.
        mm_token_type_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
            Modality ids of the tokens; all text when `None`.
        inputs_embeds (`torch.Tensor` of shape `(B, T, D)`):
            The embedded tokens.
        attention_mask:
            The backend's causal mask.
        cache (`Cache`, *optional*):
            Cached keys and values, before this call.
        has_learned_priors (`bool`, defaults to `False`):
            Whether some layer has priors that are not all equal, or that learn.
        output_modality_weights, modality_priors, modality_guidance:
            Arguments of the model.

    Returns:
        [`AttentionParts`], *optional*: `None` where plain attention is the same.

    Raises:
        ValueError: If `modality_priors` or `modality_guidance` are wrong, or the cache was filled without the modality
            ids that are needed now.
    """
    log_priors = _log_priors(config, modality_priors)
    check_number("modality_guidance", modality_guidance)
    if not (output_modality_weights or has_learned_priors or modality_guidance or log_priors is not None):
        return None
    batch_size, length = inputs_embeds.shape[:2]
    if mm_token_type_ids is None:
        mm_token_type_ids = torch.zeros(batch_size, length, dtype=torch.long, device=inputs_embeds.device)
    key_ids = mm_token_type_ids if cache is None else _remember(mm_token_type_ids, cache)
    traced = is_tracing(mm_token_type_ids)
    if not (output_modality_weights or traced) and not (key_ids != key_ids[:1, :1]).any():
        return None  # one part alone, whose weight is 1
    runs = counts = None
    if attention_mask is None and length > 1 and not traced and key_ids.device.type == "cpu":
        runs = find_runs(mm_token_type_ids)
    if output_modality_weights:
        counts = visible_counts(attention_mask, key_ids, length, len(config.modalities))
    priors = None if log_priors is None else torch.tensor(log_priors, device=inputs_embeds.device)
    return AttentionParts(key_ids, len(config.modalities), priors, modality_guidance, runs, counts, keeps_rows=True)


def initial_log_priors(config: PreTrainedConfig) -> list[float]:
    """log π that training starts from, by modality: `beta_init` for text, `alpha_init` for every other."""
    log_alpha, log_beta = math.log(config.alpha_init), math.log(config.beta_init)
    return [log_beta if modality == "text" else log_alpha for modality in config.modalities]


def given_log_priors(modalities: Sequence[str], modality_priors: Mapping[str, float] | None) -> list[float]:
    """
    log π that a call gives, by modality; 0 for those that it does not name.

    Raises:
        ValueError: If it is no mapping, a modality is unknown, or a prior is not a number of more than 0.
    """
    given = {} if modality_priors is None else modality_priors
    check(
        isinstance(given, Mapping),
        f"`modality_priors` must be a dict of factors by modality, such as {{'image': 2.0}}, got {given!r}.",
    )
    unknown = sorted(set(given) - set(modalities))
    check(not unknown, f"`modality_priors` has unknown modalities {unknown}: the model has {list(modalities)}.")
    for modality, prior in given.items():
        check_number(f"modality_priors[{modality!r}]", prior)
        check(prior > 0, f"`modality_priors[{modality!r}]` must be more than 0, got {prior!r}.")
    return [math.log(given.get(modality, 1.0)) for modality in modalities]


def visible_counts(
    attention_mask: Any,
    key_ids: torch.Tensor,
    length: int,
    num_modalities: int,
    *,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """
    Number of keys of each modality that a query sees.

    Args:
        attention_mask:
            As a backend has it: `None` (causal), `(B, S)` 0 for padding, `(B or 1, 1, T, S)`, or a `BlockMask`.
        key_ids (`torch.Tensor` of shape `(B, S)`):
            Modality id of every key.
        length (`int`):
            Number T of queries.
        num_modalities (`int`):
            Number M of modalities.
        sliding_window (`int`, *optional*):
            How many keys a query sees at most, where the mask does not say so: `None` or `(B, S)`.

    Returns:
        `torch.Tensor` of shape `(B, T, M)`, in float32.
    """
    if isinstance(attention_mask, BlockMask):
        batch_size, heads, queries, keys = attention_mask.shape
        attention_mask = create_mask(
            attention_mask.mask_mod, batch_size, heads, queries, keys, device=key_ids.device
        )[..., :length, :]  # fmt: skip
    if attention_mask is not None and attention_mask.dim() == 4:
        key_ids = _fit(key_ids, attention_mask.shape[-1])
        mask = attention_mask[:, 0]
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return visible.float() @ F.one_hot(key_ids, num_modalities).float()
    if attention_mask is None and length > 1:
        key_ids = key_ids[:, :length]  # nothing is cached; what may follow is room
    is_of = F.one_hot(key_ids, num_modalities).float()
    if attention_mask is not None:
        is_of = is_of * attention_mask[:, :, None].to(is_of)
    counts = is_of.cumsum(dim=1)
    if sliding_window is not None:
        counts = counts - F.pad(counts, (0, 0, sliding_window, 0))[:, : counts.shape[1]]
    return counts[:, -length:]


def _log_priors(config: PreTrainedConfig, modality_priors: Mapping[str, float] | None) -> list[float] | None:
    """By modality, those of the configuration, unless they are learned, and of the call; `None` where all are equal."""
    log_priors = given_log_priors(config.modalities, modality_priors)
    if not config.learned_modality_priors:
        log_priors = [given + own for given, own in zip(log_priors, initial_log_priors(config), strict=True)]
    # Their ratios count: equal ones are none.
    return None if all(log_prior == log_priors[0] for log_prior in log_priors) else log_priors


def _remember(mm_token_type_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Modality ids of the cached and the new tokens `(B, S)`, kept with the cache, whose keys do not tell."""
    seen = cache.get_seq_length()
    known = getattr(cache, "modality_ids", None)
    batch_size, length = mm_token_type_ids.shape
    if known is None or known.shape[0] != batch_size:
        check(
            is_tracing(mm_token_type_ids) or int(seen) == 0,
            "the cache was filled without the modality ids of its tokens, which distributed attention needs now: pass "
            "`output_modality_weights`, `modality_priors` or `modality_guidance` from the first call on.",
        )
        known = mm_token_type_ids.new_zeros(batch_size, cache.get_max_length() if cache.is_compileable else 0)
    if cache.is_compileable:  # its length is fixed
        positions = torch.arange(length, device=mm_token_type_ids.device) + seen
        cache.modality_ids = known.index_copy(1, positions, mm_token_type_ids)
    else:
        cache.modality_ids = torch.cat([known[:, :seen], mm_token_type_ids.to(known.device)], dim=1)
    return cache.modality_ids


def _fit(key_ids: torch.Tensor, length: int) -> torch.Tensor:
    """Padded with text, which a mask hides, or cut to the number of keys."""
    if key_ids.shape[1] == length:
        return key_ids
    return F.pad(key_ids, (0, max(length - key_ids.shape[1], 0)))[:, :length]


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """The weights stay in float32."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def _is_row(query: torch.Tensor, attention_mask: Any) -> bool:
    is_dense = attention_mask is None or (torch.is_tensor(attention_mask) and attention_mask.dim() == 4)
    return query.shape[2] == 1 and is_dense
