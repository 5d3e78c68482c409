"""Distributed attention over runs of one modality, on the CPU: flash attention of torch, part by part.

A sequence like text | image | text consists of a few runs of one modality. A run of queries sees the earlier runs in
full and itself causally: each is one call of the flash kernel, which also returns its logsumexp. No logit is computed
that plain causal attention would not compute. The calls are merged as in [`.distributed_attention`].

The backward pass is that of ring attention (arXiv 2310.01889): the kernel's own, call by call, with the *merged* output
and logsumexp.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# With more runs, the calls are too small to pay off.
MAX_RUNS = 8


class Run(NamedTuple):
    """Tokens `start` to `stop - 1`, all of one modality."""

    start: int
    stop: int
    modality: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.stop)


def find_runs(ids: torch.Tensor) -> tuple[Run, ...] | None:
    """
    The runs that all rows share.

    Args:
        ids (`torch.Tensor` of shape `(B, T)`):
            Modality ids, on the CPU.

    Returns:
        `tuple[Run, ...]`, *optional*: `None` where rows differ, or there are more than `MAX_RUNS`.
    """
    row = ids[0]
    if not (ids == row).all():
        return None
    starts = [0, *((row[1:] != row[:-1]).nonzero().squeeze(1) + 1).tolist()]
    if len(starts) > MAX_RUNS:
        return None
    stops = [*starts[1:], len(row)]
    return tuple(Run(start, stop, int(row[start])) for start, stop in zip(starts, stops, strict=True))


def takes_runs(query: torch.Tensor) -> bool:
    """Whether the kernel takes such queries."""
    return query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16)


def attend_runs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: tuple[Run, ...],
    num_modalities: int,
    *,
    scaling: float,
    log_priors: torch.Tensor | None = None,
    guidance: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Causal distributed attention over runs.

    Args:
        query (`torch.Tensor` of shape `(B, H, T, D)`):
            Queries; keys and values have as many positions, and H or fewer heads.
        runs (`tuple[Run, ...]`):
            The runs of the sequence.
        num_modalities, scaling, log_priors, guidance:
            As in [`.distributed_attention.attend_in_parts`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Z `(B, H, T, D)` and the weights `(B, H, T, M)` in float32, which carry no
        gradient.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    if log_priors is None:
        log_priors = torch.zeros(query.shape[1], num_modalities)
    return _AttendRuns.apply(query, key, value, log_priors.float(), runs, scaling, guidance)


class _AttendRuns(torch.autograd.Function):
    """Takes as many heads of keys and values as of queries."""

    @staticmethod
    def forward(ctx: Any, query, key, value, log_priors, runs, scaling, guidance):
        batch_size, num_heads, length, _ = query.shape
        # In memory as attention functions return it; this view is (B, H, T, D).
        merged = query.new_empty(batch_size, length, num_heads, query.shape[3]).transpose(1, 2)
        output = torch.empty_like(merged) if guidance else merged
        total = torch.empty(batch_size, num_heads, length)
        weights = torch.zeros(batch_size, num_heads, length, log_priors.shape[1])
        for number, run in enumerate(runs):
            here = run.tokens
            seen = runs[: number + 1]
            parts, scores = [], []
            for other in seen:
                part, logsumexp = _forward(
                    query[:, :, here], key[:, :, other.tokens], value[:, :, other.tokens],
                    is_causal=other is run, scale=scaling,
                )  # fmt: skip
                parts.append(part)
                scores.append(logsumexp + log_priors[:, other.modality, None])
            total[:, :, here] = torch.logsumexp(torch.stack(scores), dim=0) if number else scores[0]
            shares = [torch.exp(score - total[:, :, here]) for score in scores]
            for other, share in zip(seen, shares, strict=True):
                weights[:, :, here, other.modality] += share
            _mix(merged[:, :, here], parts, shares)
            if guidance:
                _mix(output[:, :, here], parts, _guided(shares, [other.modality for other in seen], guidance))
        ctx.save_for_backward(query, key, value, log_priors, merged, total, weights)
        ctx.runs, ctx.scaling = runs, scaling
        ctx.mark_non_differentiable(weights)
        return output, weights

    @staticmethod
    def backward(ctx: Any, grad_output, _grad_weights):
        query, key, value, log_priors, merged, total, weights = ctx.saved_tensors
        grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for number, run in enumerate(ctx.runs):
            here = run.tokens
            for other in ctx.runs[: number + 1]:
                there = other.tokens
                # exp(s − this) is the weight of a key in the merged softmax.
                logsumexp = total[:, :, here] - log_priors[:, other.modality, None]
                parts = _backward(
                    grad_output[:, :, here], query[:, :, here], key[:, :, there], value[:, :, there],
                    merged[:, :, here], logsumexp, 0.0, other is run, scale=ctx.scaling,
                )  # fmt: skip
                for grad, part, tokens in zip(grads, parts, (here, there, there), strict=True):
                    grad[:, :, tokens] += part
        grad_priors = None
        if ctx.needs_input_grad[3]:
            # ∂Z/∂log π_P = w_P·(O_P − Z), and the first term, summed over queries, is that of the values' gradient.
            along_values = (value * grads[2]).float().sum(dim=(0, 3))  # (H, T)
            along_output = (merged * grad_output).float().sum(dim=-1)  # (B, H, T)
            grad_priors = -torch.einsum("bhtm,bht->hm", weights, along_output)
            for run in ctx.runs:
                grad_priors[:, run.modality] += along_values[:, run.tokens].sum(dim=1)
        return *grads, grad_priors, None, None, None


def _mix(mixed: torch.Tensor, parts: list[torch.Tensor], shares: list[torch.Tensor]) -> None:
    """Writes the sum of the parts with these weights."""
    torch.mul(parts[0], shares[0].unsqueeze(-1).to(mixed.dtype), out=mixed)
    for part, share in zip(parts[1:], shares[1:], strict=True):
        mixed.addcmul_(part, share.unsqueeze(-1).to(mixed.dtype))


def _guided(shares: list[torch.Tensor], modalities: list[int], guidance: float) -> list[torch.Tensor]:
    """Weights that make Z + g·(Z − O_text) of the parts; those of Z where a query sees only text, or no text."""
    text = [share for share, modality in zip(shares, modalities, strict=True) if modality == 0]
    if not text or len(text) == len(shares):
        return shares
    text_share = torch.stack(text).sum(dim=0)
    return [
        share * (1.0 + guidance) - (guidance * share / text_share if modality == 0 else 0.0)
        for share, modality in zip(shares, modalities, strict=True)
    ]
