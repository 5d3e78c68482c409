"""Distributed attention over runs of one modality, on the CPU: flash attention of torch, part by part.

A sequence like text | picture | text is a few runs of one modality. With the keys sorted by modality, what a run of
queries sees are a few stretches of the sorted keys: for every modality the earlier runs, in full, and the run itself,
causally. Each is one call of the flash kernel, which also returns its logsumexp; no logit is computed that plain causal
attention would not compute. The calls are merged as in [`.distributed_attention`].

The backward pass is that of ring attention (arXiv 2310.01889): the kernel's own, call by call, with the *merged* output
and logsumexp.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# With more, the calls are too small to be worth it.
MAX_RUNS = 8


class Run(NamedTuple):
    """Tokens `start` to `stop - 1`, all of one modality."""

    start: int
    stop: int
    modality: int


class _Call(NamedTuple):
    """One call of the kernel: queries, sorted keys, the modality of the keys, and whether it is causal."""

    queries: slice
    keys: slice
    modality: int
    is_causal: bool


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


def can_attend_runs(query: torch.Tensor, dropout: float) -> bool:
    """Whether the kernel takes such queries."""
    return query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16) and dropout == 0.0


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
    if log_priors is None:
        log_priors = torch.zeros(query.shape[1], num_modalities, device=query.device)
    return _AttendRuns.apply(query, key, value, log_priors.float(), runs, scaling, guidance)


class _AttendRuns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, value, log_priors, runs, scaling, guidance):
        order = _order(runs)
        key, value = _take(key, order), _take(value, order)
        num_modalities = log_priors.shape[1]
        shape = query.shape[:3]
        logsumexps = torch.full((num_modalities, *shape), -torch.inf)
        outputs = torch.zeros((num_modalities, *query.shape), dtype=query.dtype)
        for call in _calls(runs):
            output, logsumexp = _forward(
                query[:, :, call.queries], key[:, :, call.keys], value[:, :, call.keys],
                is_causal=call.is_causal, scale=scaling,
            )  # fmt: skip
            so_far = logsumexps[call.modality, :, :, call.queries]
            if torch.isneginf(so_far[0, 0, 0]):
                outputs[call.modality, :, :, call.queries] = output
                so_far.copy_(logsumexp)
            else:
                _merge_into(outputs[call.modality, :, :, call.queries], so_far, output, logsumexp)

        scores = logsumexps + log_priors.T[:, None, :, None]
        total = torch.logsumexp(scores, dim=0)
        weights = torch.exp(scores - total)
        merged = torch.zeros(query.shape, dtype=query.dtype)
        for modality in range(num_modalities):
            merged.addcmul_(outputs[modality], weights[modality].unsqueeze(-1).to(query.dtype))
        ctx.save_for_backward(query, key, value, log_priors, merged, total, outputs, weights, order)
        ctx.runs, ctx.scaling = runs, scaling
        output = merged
        if guidance:
            sees_both = ((weights[0] > 0) & (weights[1:].sum(dim=0) > 0)).unsqueeze(-1)
            output = torch.where(sees_both, merged + guidance * (merged - outputs[0]), merged)
        weights = weights.movedim(0, -1)
        ctx.mark_non_differentiable(weights)
        return output, weights

    @staticmethod
    def backward(ctx: Any, grad_output, _grad_weights):
        query, key, value, log_priors, merged, total, outputs, weights, order = ctx.saved_tensors
        grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for call in _calls(ctx.runs):
            queries, keys = call.queries, call.keys
            # exp(s − this) is the weight of a key in the merged softmax.
            logsumexp = total[:, :, queries] - log_priors[:, call.modality, None]
            parts = _backward(
                grad_output[:, :, queries], query[:, :, queries], key[:, :, keys], value[:, :, keys],
                merged[:, :, queries], logsumexp, 0.0, call.is_causal, scale=ctx.scaling,
            )  # fmt: skip
            for grad, part, at in zip((grad_query, grad_key, grad_value), parts, (queries, keys, keys), strict=True):
                grad[:, :, at] += part
        grad_priors = None
        if ctx.needs_input_grad[3]:
            # ∂Z/∂log π_P = w_P·(O_P − Z)
            shares = torch.einsum("mbhtd,bhtd->mbht", outputs - merged, grad_output).float()
            grad_priors = (weights * shares).sum(dim=(1, 3)).T
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return grad_query, _take(grad_key, back), _take(grad_value, back), grad_priors, None, None, None


def _merge_into(output: torch.Tensor, logsumexp: torch.Tensor, other: torch.Tensor, other_logsumexp: torch.Tensor):
    """Merges two stretches of one part, into the first."""
    total = torch.logaddexp(logsumexp, other_logsumexp)
    share = torch.exp(other_logsumexp - total).unsqueeze(-1).to(output.dtype)
    output.lerp_(other, share)
    logsumexp.copy_(total)


def _order(runs: tuple[Run, ...]) -> torch.Tensor:
    """The positions sorted by modality."""
    by_modality = sorted(runs, key=lambda run: run.modality)
    return torch.cat([torch.arange(run.start, run.stop) for run in by_modality])


def _take(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return tensor.index_select(2, order)


def _calls(runs: tuple[Run, ...]) -> list[_Call]:
    lengths: dict[int, int] = {}
    for run in runs:
        lengths[run.modality] = lengths.get(run.modality, 0) + run.stop - run.start
    first, start = {}, 0
    for modality in sorted(lengths):
        first[modality] = start
        start += lengths[modality]

    calls = []
    seen = dict.fromkeys(lengths, 0)
    for run in runs:
        queries = slice(run.start, run.stop)
        for modality, count in seen.items():
            if count:
                calls.append(_Call(queries, slice(first[modality], first[modality] + count), modality, False))
        begin = first[run.modality] + seen[run.modality]
        calls.append(_Call(queries, slice(begin, begin + run.stop - run.start), run.modality, True))
        seen[run.modality] += run.stop - run.start
    return calls
