"""Distributed attention: attention is computed for each modality separately and merged exactly.

A query q sees the keys of the parts P (text, image, …) with the logits s_j. The attention to each part is::

    O_P = Σ_{j∈P} softmax_P(s)_j · v_j          ℓ_P = logsumexp_{j∈P} s_j

The parts are merged with the priors π_P > 0 (D-Attn, arXiv 2502.01906, without its learned gates; ring attention merges
blocks in the same way, arXiv 2310.01889)::

    w_P = π_P·exp(ℓ_P) / Σ_Q π_Q·exp(ℓ_Q)       Z = Σ_P w_P·O_P

The weights sum to 1; α is the weight of the image part, and β the weight of the text part. With equal priors, Z is the
plain attention over all keys. With a guidance scale g (classifier-free guidance in attention space, arXiv 2601.13707),
the result is Z + g·(Z − O_text) instead.

[`attend_in_parts`] is the reference implementation. The faster implementations give the same result:
[`attend_by_channels`] for any attention function, [`attend_by_row`] for a single query, and
[`~attention_runs.attend_runs`] for long runs of one modality on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

# The kernels need head sizes that are multiples of 8.
_CHANNELS = 8
# Log prior that excludes a part: far below all other values, but finite in every dtype.
_NEVER = -1e4


class Merged(NamedTuple):
    """
    Result of distributed attention, for B rows, H heads of size D, T queries, S keys and M modalities.

    Args:
        output (`torch.Tensor` of shape `(B, T, H, D)`):
            The output Z, in the layout of the attention functions of Transformers.
        weights (`torch.Tensor` of shape `(B, H, T, M)`, *optional*):
            The modality weights w_P, in float32.
        attentions (`torch.Tensor` of shape `(B, H, T, S)`, *optional*):
            The attention weights of the keys, if the implementation computes them.
    """

    output: torch.Tensor
    weights: torch.Tensor | None = None
    attentions: torch.Tensor | None = None


def merge(outputs: torch.Tensor, logsumexps: torch.Tensor, log_priors: torch.Tensor | None = None) -> tuple:
    """
    Merges attention parts.

    Args:
        outputs (`torch.Tensor` of shape `(P, ..., D)`):
            Output O_P of each part. Outputs of empty parts are ignored.
        logsumexps (`torch.Tensor` of shape `(P, ...)`):
            ℓ_P of each part; minus infinity if no key of the part is visible.
        log_priors (`torch.Tensor`, *optional*):
            Log priors log π_P, broadcastable to `(P, ...)`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Z of shape `(..., D)`, which is 0 where all parts are empty, and the
        weights w of shape `(P, ...)`.
    """
    scores = logsumexps if log_priors is None else logsumexps + log_priors
    nothing = torch.isneginf(scores).all(dim=0, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), dim=0).masked_fill(nothing, 0.0)
    return (weights.unsqueeze(-1) * outputs).sum(dim=0), weights


def attend_in_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_ids: torch.Tensor,
    num_modalities: int,
    *,
    visible: torch.Tensor,
    scaling: float,
    log_priors: torch.Tensor | None = None,
    guidance: float = 0.0,
) -> Merged:
    """
    Computes distributed attention with the reference implementation, which computes each part separately.

    Args:
        query (`torch.Tensor` of shape `(B, H, T, D)`):
            Queries.
        key (`torch.Tensor` of shape `(B, H_kv, S, D)`):
            Keys. H is a multiple of H_kv.
        value (`torch.Tensor` of shape `(B, H_kv, S, D)`):
            Values.
        key_ids (`torch.Tensor` of shape `(B, S)`):
            Modality id of every key.
        num_modalities (`int`):
            Number M of modalities.
        visible (`torch.Tensor` of shape `(B or 1, 1, T, S)`):
            Which keys a query sees, of type bool.
        scaling (`float`):
            Scaling factor of the logits.
        log_priors (`torch.Tensor` of shape `(H, M)`, *optional*):
            Log priors log π by head and modality. Equal by default.
        guidance (`float`, *optional*, defaults to 0.0):
            Guidance scale g.

    Returns:
        [`Merged`]: The output and the modality weights.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)).float() * scaling
    outputs, logsumexps = [], []
    for modality in range(num_modalities):
        part = visible & (key_ids == modality)[:, None, None]
        empty = ~part.any(dim=-1, keepdim=True)
        # An empty part is computed over all keys to avoid NaN gradients. Its weight is 0.
        part_scores = scores.masked_fill(~(part | empty), -torch.inf)
        outputs.append(torch.softmax(part_scores, dim=-1) @ value.float())
        logsumexps.append(torch.logsumexp(part_scores, dim=-1).masked_fill(empty.squeeze(-1), -torch.inf))
    by_part = None if log_priors is None else log_priors.float().T[:, None, :, None]
    merged, weights = merge(torch.stack(outputs), torch.stack(logsumexps), by_part)
    if guidance:
        merged = _guide(merged, outputs[0], (weights[0] > 0) & (weights[1:].sum(dim=0) > 0), guidance)
    return Merged(merged.to(value.dtype).transpose(1, 2), weights.movedim(0, -1))


def attend_by_channels(
    attention_function: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    key_ids: torch.Tensor,
    num_modalities: int,
    *,
    log_priors: torch.Tensor | None = None,
    guidance: float = 0.0,
    **kwargs: Any,
) -> Merged:
    """
    Computes distributed attention with any attention function and mask. Additional query and key channels add the log
    priors to the logits, and additional value channels, which indicate the modality of a key, return the weights. The
    other arguments are those of [`attend_in_parts`].

    Args:
        attention_function (`Callable`):
            One of the attention functions in `ALL_ATTENTION_FUNCTIONS`.
        module (`torch.nn.Module`):
            The attention module.
        attention_mask (`Any`, *optional*):
            Mask in the format of the attention function.
        kwargs (`Any`):
            Other arguments of the attention function. `scaling` is required.

    Returns:
        [`Merged`]: The output, the modality weights, and the attention weights if the function returns them.
    """
    channels = -(-(num_modalities - 1) // _CHANNELS) * _CHANNELS
    # The priors are relative to that of text (id 0), so text needs no channel.
    indicator = F.one_hot(key_ids, channels + 1)[:, None, :, 1:].to(key.dtype)  # (B, 1, S, channels)
    indicator = indicator.expand(-1, key.shape[1], -1, -1)

    def attend(log_priors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = query.new_zeros(*query.shape[:3], channels)
        if log_priors is not None:
            # Clamped to stay finite in float16: an infinite channel times 0, at keys of other parts, would be NaN.
            limit = min(torch.finfo(query.dtype).max, torch.finfo(torch.float32).max) / 4
            relative = ((log_priors[:, 1:] - log_priors[:, :1]).float() / kwargs["scaling"]).clamp(-limit, limit)
            bias = F.pad(relative, (0, channels - relative.shape[1])).to(query.dtype)[None, :, None].expand_as(bias)
        return attention_function(
            module,
            torch.cat([query, bias], dim=-1),
            torch.cat([key, indicator], dim=-1),
            torch.cat([value, indicator], dim=-1),
            attention_mask,
            **kwargs,
        )

    extended, attentions = attend(log_priors)
    output, others = extended.split([value.shape[-1], channels], dim=-1)
    others = others[..., : num_modalities - 1].float().transpose(1, 2)  # (B, H, T, M - 1)
    weights = torch.cat([1.0 - others.sum(dim=-1, keepdim=True), others], dim=-1).clamp(0.0, 1.0)
    if guidance:
        only_text = query.new_full((query.shape[1], num_modalities), _NEVER)
        only_text[:, 0] = 0.0
        text_output, text_others = attend(only_text)[0].split([value.shape[-1], channels], dim=-1)
        sees_text = text_others.sum(dim=-1) < 0.5  # without text, the other parts share the total weight of 1
        sees_other = others.sum(dim=-1).transpose(1, 2) > 0
        output = _guide(output, text_output, sees_text & sees_other, guidance)
    return Merged(output.contiguous(), weights, attentions)


def attend_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    key_ids: torch.Tensor,
    num_modalities: int,
    *,
    scaling: float,
    log_priors: torch.Tensor | None = None,
    guidance: float = 0.0,
    indicator: torch.Tensor | None = None,
    weigh: bool = True,
) -> Merged:
    """
    Computes distributed attention for one query per row, as in decoding. The logits of a query are a vector, so they
    can be computed directly. The other arguments are those of [`attend_in_parts`], with T = 1.

    Args:
        attention_mask (`torch.Tensor` of shape `(B or 1, 1 or H, 1, S)`, *optional*):
            Mask of type bool, or values that are added to the logits.
        indicator (`torch.Tensor` of shape `(B, S, M)`, *optional*):
            1.0 if a key has the modality, otherwise 0.0. Computed by default.
        weigh (`bool`, *optional*, defaults to `True`):
            Whether to compute the modality weights. Otherwise, [`weights_of_rows`] can compute those of several layers
            together.

    Returns:
        [`Merged`]: The output, the attention weights, and the modality weights with `weigh` or guidance.
    """
    batch_size, num_heads, _, head_dim = query.shape
    keys, values = key.flatten(0, 1), value.flatten(0, 1)  # (B·H_kv, S, D)
    grouped = query.view(len(keys), -1, head_dim)  # (B·H_kv, H / H_kv, D)
    scores = torch.baddbmm(grouped.new_empty(1, 1, 1), grouped, keys.transpose(1, 2), beta=0, alpha=scaling)
    if scores.dtype != torch.float32:
        scores = scores.float()
    by_head = (batch_size, num_heads, -1)
    if attention_mask is not None:
        mask = attention_mask.squeeze(2)  # (B or 1, 1 or H, S)
        is_bool = mask.dtype == torch.bool
        scores = scores.view(by_head).masked_fill(~mask, -torch.inf) if is_bool else scores.view(by_head) + mask
    is_of = F.one_hot(key_ids, num_modalities).float() if indicator is None else indicator
    if log_priors is not None:
        scores = scores.view(by_head) + (is_of @ log_priors.float().T).transpose(1, 2)
    probabilities = torch.softmax(scores, dim=-1).view(by_head)
    weights = torch.bmm(probabilities, is_of) if weigh or guidance else None  # (B, H, M)

    def average(probabilities: torch.Tensor) -> torch.Tensor:
        if value.dtype != torch.float32:
            probabilities = probabilities.to(value.dtype)
        return torch.bmm(probabilities.view(len(values), -1, key.shape[2]), values).view(batch_size, 1, num_heads, -1)

    output = average(probabilities)
    if guidance:
        assert weights is not None
        text_share = weights[..., :1]
        text_output = average(probabilities * is_of[..., 0][:, None] / text_share.clamp(min=1e-30))
        sees_both = (text_share > 0) & (weights[..., 1:].sum(dim=-1, keepdim=True) > 0)
        output = _guide(output, text_output, sees_both.transpose(1, 2), guidance)
    return Merged(output, None if weights is None else weights.unsqueeze(2), probabilities.unsqueeze(2))


def weights_of_rows(attentions: Sequence[torch.Tensor], indicator: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """
    Computes the modality weights of several layers in one matrix product.

    Args:
        attentions (`Sequence[torch.Tensor]` of shape `(B, H, 1, S)`):
            Attention weights of a single query, by layer.
        indicator (`torch.Tensor` of shape `(B, S, M)`):
            1.0 if a key has the modality, otherwise 0.0.

    Returns:
        `tuple[torch.Tensor, ...]`: Modality weights w_P of every layer, of shape `(B, H, 1, M)`.
    """
    rows = torch.cat([attention.to(indicator.device) for attention in attentions], dim=1).squeeze(2)
    return torch.bmm(rows, indicator).unsqueeze(2).split(attentions[0].shape[1], dim=1)


def count_free(weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """
    Computes the modality weights without the effect of the number of keys of each part: with ℓ_P − log n_P instead of
    ℓ_P. Otherwise, an image with many tokens has a large α only because it has many tokens.

    Args:
        weights (`torch.Tensor` of shape `(..., B, H, T, M)`):
            Modality weights w_P.
        counts (`torch.Tensor` of shape `(B, T, M)`):
            Number n_P of keys of each part that a query sees.

    Returns:
        `torch.Tensor` of shape `(..., B, H, T, M)`: The weights. They sum to 1 for every query that sees a key.
    """
    each = weights / counts.clamp(min=1)[:, None].to(weights)
    return each / each.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(each.dtype).tiny)


def _guide(output: torch.Tensor, text_output: torch.Tensor, sees_both: torch.Tensor, guidance: float) -> torch.Tensor:
    """Returns Z + g·(Z − O_text) for queries that see text and another modality, and Z for other queries."""
    guided = output + guidance * (output - text_output.to(output.dtype))
    return torch.where(sees_both.unsqueeze(-1), guided, output)
