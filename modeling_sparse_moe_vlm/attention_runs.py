"""Distributed attention over runs of one modality on the CPU, with the flash attention kernel of torch.

A sequence such as text | image | text consists of a few runs of one modality. The queries of a run see all keys of the
earlier runs and attend causally to the keys of their own run. Each of these pairs of runs is one call of the flash
attention kernel, which also returns the logsumexp. No logits are computed beyond those of plain causal attention. The
results of the calls are merged as described in `distributed_attention.py`.

The backward pass is that of ring attention (arXiv 2310.01889): the backward kernel is called for each pair of runs with
the *merged* output and logsumexp.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# With more runs, the calls are too small to be faster than other implementations.
MAX_RUNS = 8


class Run(NamedTuple):
    """
    Consecutive tokens of one modality.

    Args:
        start (`int`):
            Index of the first token.
        stop (`int`):
            Index after the last token.
        modality (`int`):
            Modality id of the tokens.
    """

    start: int
    stop: int
    modality: int

    @property
    def tokens(self) -> slice:
        """The tokens as a slice of the sequence."""
        return slice(self.start, self.stop)


def find_runs(ids: torch.Tensor) -> tuple[Run, ...] | None:
    """
    Returns the runs of one modality if they are the same for all rows.

    Args:
        ids (`torch.Tensor` of shape `(B, T)`):
            Modality ids, on the CPU.

    Returns:
        `tuple[Run, ...]`, *optional*: The runs. `None` if the rows differ or have more than `MAX_RUNS` runs.
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
    """Returns whether the kernel supports the device and dtype of the queries."""
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
    Computes causal distributed attention over runs.

    Args:
        query (`torch.Tensor` of shape `(B, H, T, D)`):
            Queries.
        key (`torch.Tensor` of shape `(B, H_kv, T, D)`):
            Keys. H is a multiple of H_kv.
        value (`torch.Tensor` of shape `(B, H_kv, T, D)`):
            Values.
        runs (`tuple[Run, ...]`):
            The runs of the sequence.
        num_modalities (`int`):
            See [`~distributed_attention.attend_in_parts`].
        scaling (`float`):
            See [`~distributed_attention.attend_in_parts`].
        log_priors (`torch.Tensor` of shape `(H, M)`, *optional*):
            See [`~distributed_attention.attend_in_parts`].
        guidance (`float`, *optional*, defaults to 0.0):
            See [`~distributed_attention.attend_in_parts`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Z `(B, H, T, D)` and the modality weights `(B, H, T, M)` in float32, which
        have no gradient.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    if log_priors is None:
        log_priors = torch.zeros(query.shape[1], num_modalities)
    return _AttendRuns.apply(query, key, value, log_priors.float(), runs, scaling, guidance)


class _AttendRuns(torch.autograd.Function):
    """[`attend_runs`] for the same number of key, value and query heads."""

    @staticmethod
    def forward(ctx: Any, query, key, value, log_priors, runs, scaling, guidance):
        batch_size, num_heads, length, _ = query.shape
        # The memory has the layout (B, T, H, D) that attention functions return. This view is (B, H, T, D).
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
                # exp(s − logsumexp) is the weight of a key in the merged softmax.
                logsumexp = total[:, :, here] - log_priors[:, other.modality, None]
                parts = _backward(
                    grad_output[:, :, here], query[:, :, here], key[:, :, there], value[:, :, there],
                    merged[:, :, here], logsumexp, 0.0, other is run, scale=ctx.scaling,
                )  # fmt: skip
                for grad, part, tokens in zip(grads, parts, (here, there, there), strict=True):
                    grad[:, :, tokens] += part
        grad_priors = None
        if ctx.needs_input_grad[3]:
            # ∂Z/∂log π_P = w_P·(O_P − Z). Summed over the queries, the first term follows from the value gradient.
            along_values = (value * grads[2]).float().sum(dim=(0, 3))  # (H, T)
            along_output = (merged * grad_output).float().sum(dim=-1)  # (B, H, T)
            grad_priors = -torch.einsum("bhtm,bht->hm", weights, along_output)
            for run in ctx.runs:
                grad_priors[:, run.modality] += along_values[:, run.tokens].sum(dim=1)
        return *grads, grad_priors, None, None, None


def _mix(mixed: torch.Tensor, parts: list[torch.Tensor], shares: list[torch.Tensor]) -> None:
    """Writes the sum of the parts, weighted with these shares, to `mixed`."""
    torch.mul(parts[0], shares[0].unsqueeze(-1).to(mixed.dtype), out=mixed)
    for part, share in zip(parts[1:], shares[1:], strict=True):
        mixed.addcmul_(part, share.unsqueeze(-1).to(mixed.dtype))


def _guided(shares: list[torch.Tensor], modalities: list[int], guidance: float) -> list[torch.Tensor]:
    """
    Returns the weights of the parts in Z + g·(Z − O_text). They equal the weights of Z if the queries see only text or
    no text.
    """
    text = [share for share, modality in zip(shares, modalities, strict=True) if modality == 0]
    if not text or len(text) == len(shares):
        return shares
    text_share = torch.stack(text).sum(dim=0)
    return [
        share * (1.0 + guidance) - (guidance * share / text_share if modality == 0 else 0.0)
        for share, modality in zip(shares, modalities, strict=True)
    ]
