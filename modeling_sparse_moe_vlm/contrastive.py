"""Embeddings of sequences, and contrastive losses between embeddings of queries and documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .parallel_plans import is_one_of_several_processes

# The label of a hard negative, which has no partner. Smaller labels are unique only within a process.
NO_PARTNER = -1
_LABELS_PER_PROCESS = 2**40


def pool_tokens(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """
    Returns one vector per row. Padding on either side does not change it.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, D)`):
            Hidden states of the tokens.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            0 for padding. By default, there is no padding.
        pooling (`str`):
            `"last_token"` for the last token of each row that is not padding, or `"mean"` for the mean of the tokens.

    Returns:
        `torch.Tensor` of shape `(B, D)`: The vectors, in float32.

    Raises:
        ValueError: If the shape of the mask does not match the tokens.
    """
    batch_size, length = hidden_states.shape[:2]
    if attention_mask is None:
        attention_mask = hidden_states.new_ones(batch_size, length, dtype=torch.long)
    elif attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"`attention_mask` must have the shape {(batch_size, length)} of the tokens, but got "
            f"{tuple(attention_mask.shape)}."
        )
    is_token = attention_mask.to(hidden_states.device) != 0
    if pooling == "mean":
        weight = is_token[:, :, None].float()
        return (hidden_states.float() * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
    last = (is_token * torch.arange(length, device=hidden_states.device)).argmax(dim=1)
    return hidden_states[torch.arange(batch_size, device=hidden_states.device), last].float()


def truncate(embeddings: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """
    Returns the first `size` components of embeddings (by default all), scaled to the length 1.

    Args:
        embeddings (`torch.Tensor` of shape `(N, D)`):
            Embeddings of any length.
        size (`int`, *optional*):
            Number of components, from 1 to D.

    Returns:
        `torch.Tensor` of shape `(N, size)`: The embeddings.

    Raises:
        ValueError: If the size is out of range.
    """
    full = embeddings.shape[-1]
    if size is not None and (not isinstance(size, int) or not 1 <= size <= full):
        raise ValueError(f"`embedding_size` must be an integer from 1 to {full}, but got {size!r}.")
    return F.normalize(embeddings[..., :size], dim=-1)


class _AtMost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, limit: float) -> torch.Tensor:
        ctx.save_for_backward(values >= limit)
        return values.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (is_full,) = ctx.saved_tensors
        return grads[0].masked_fill(is_full & (grads[0] < 0), 0.0), None


def at_most(values: torch.Tensor, limit: float) -> torch.Tensor:
    """
    Limits values as `torch.clamp` does, but keeps the gradients that make values smaller. Otherwise, a value that has
    passed the limit would stay there.

    Args:
        values (`torch.Tensor`):
            The values.
        limit (`float`):
            The largest value.

    Returns:
        `torch.Tensor`: The limited values.
    """
    return _AtMost.apply(values, limit)


def softmax_loss(scores: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """
    Computes the softmax contrastive loss (InfoNCE, as in CLIP, arXiv 2103.00020): the mean over the two directions.

    In each direction, the loss of a pair is the cross-entropy of its score among the scores of the negatives and its
    own. Other positives of the same row are left out, so a row does not push its positives away. The loss of a row is
    the mean over its positives, and the loss of a direction is the mean over the rows that have positives.

    Args:
        scores (`torch.Tensor` of shape `(Q, D)`):
            Scores of queries and documents, multiplied by the learned scale.
        positive (`torch.Tensor` of shape `(Q, D)`):
            Which query belongs to which document, of type bool.

    Returns:
        `torch.Tensor`: A scalar; 0 if there are no pairs.
    """
    return (_one_direction(scores, positive) + _one_direction(scores.T, positive.T)) / 2


def _one_direction(scores: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    if scores.shape[1] == 0:
        return scores.sum()
    lowest = torch.finfo(scores.dtype).min  # minus infinity would have no gradient in a row without negatives
    negatives = torch.logsumexp(scores.masked_fill(positive, lowest), dim=1, keepdim=True)
    losses = F.softplus(negatives - scores) * positive
    count = positive.sum(dim=1)
    by_row = losses.sum(dim=1) / count.clamp(min=1)
    return by_row.sum() / (count > 0).sum().clamp(min=1)


def sigmoid_loss(scores: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """
    Computes the sigmoid contrastive loss of SigLIP (arXiv 2303.15343): every pair of a query and a document is a binary
    decision. The sum over all pairs is divided by the number of queries that have a document. Pairs of two hard
    negatives are left out, because nothing is known about them.

    Args:
        scores (`torch.Tensor` of shape `(Q, D)`):
            Scores of queries and documents, multiplied by the learned scale, plus the learned bias.
        positive (`torch.Tensor` of shape `(Q, D)`):
            Which query belongs to which document, of type bool.

    Returns:
        `torch.Tensor`: A scalar; 0 if there are no pairs.
    """
    has_document, has_query = positive.any(dim=1), positive.any(dim=0)
    counts = has_document[:, None] | has_query[None, :]
    sign = torch.where(positive, 1.0, -1.0)
    return -(F.logsigmoid(sign * scores) * counts).sum() / has_document.sum().clamp(min=1)


LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


def contrastive_loss(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    is_document: torch.Tensor,
    *,
    loss: str,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    sizes: Sequence[int],
) -> torch.Tensor:
    """
    Computes the contrastive loss between the queries and documents of all processes.

    Args:
        embeddings (`torch.Tensor` of shape `(N, D)`):
            Embeddings of the queries and documents of this process.
        labels (`torch.Tensor` of shape `(N,)`):
            A query and a document with the same label belong together. -1 is a hard negative, which has no partner.
            Labels below -1 are only unique within a process: they do not match those of other processes.
        is_document (`torch.Tensor` of shape `(N,)`):
            Which rows are documents; the others are queries. Of type bool.
        loss (`str`):
            `"softmax"` or `"sigmoid"`.
        scale (`torch.Tensor` of shape `(1,)`):
            Factor of the similarities.
        bias (`torch.Tensor` of shape `(1,)`, *optional*):
            Added to the scores.
        sizes (`Sequence[int]`):
            Matryoshka sizes (arXiv 2205.13147). The loss is the mean of the losses of the truncated embeddings.

    Returns:
        `torch.Tensor`: A scalar, which is the same in all processes.
    """
    embeddings, labels, is_document = gather_rows(embeddings, labels.to(embeddings.device), is_document)
    queries, documents = embeddings[~is_document], embeddings[is_document]
    of_query, of_document = labels[~is_document, None], labels[None, is_document]
    positive = (of_query == of_document) & (of_query != NO_PARTNER)
    losses = []
    for size in sizes:
        scores = scale * (truncate(queries, size) @ truncate(documents, size).T)
        losses.append(LOSSES[loss](scores if bias is None else scores + bias, positive))
    return torch.stack(losses).mean()


# ------------------------------------------------------------------------------------------------ several processes


class _Gather(torch.autograd.Function):
    """
    Gathers rows of all processes. Each process then computes the loss of all rows. As the gradients of a row are the
    same in all processes, their sum is the number of processes times the gradient in the process of the row.
    Data parallelism divides it by the number of processes again.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.counts = counts
        return _gather(rows, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rank = torch.distributed.get_rank()
        return grads[0].split(ctx.counts)[rank] * len(ctx.counts), None


def gather_rows(
    embeddings: torch.Tensor, labels: torch.Tensor, is_document: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Returns the rows of all processes, in the order of the processes. All processes must call this function. Their
    numbers of rows can differ. The gradients are those of data parallelism, which averages over processes.

    Args:
        embeddings (`torch.Tensor` of shape `(N, D)`):
            Embeddings of this process.
        labels (`torch.Tensor` of shape `(N,)`):
            See [`contrastive_loss`].
        is_document (`torch.Tensor` of shape `(N,)`):
            See [`contrastive_loss`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: The same three tensors with the rows of all processes. With
        one process, these are the arguments.
    """
    if not is_one_of_several_processes():
        return embeddings, labels, is_document
    distributed = torch.distributed
    labels = torch.where(labels < NO_PARTNER, labels - distributed.get_rank() * _LABELS_PER_PROCESS, labels)
    own_count = torch.tensor([len(embeddings)], device=embeddings.device)
    all_counts = [torch.empty_like(own_count) for _ in range(distributed.get_world_size())]
    distributed.all_gather(all_counts, own_count)
    counts = [int(count) for count in all_counts]
    sides = torch.stack([labels, is_document.to(labels)], dim=1)
    labels, is_document = _gather(sides, counts).unbind(dim=1)
    return _Gather.apply(embeddings, counts), labels, is_document.bool()


def _gather(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Gathers rows `(N, columns)`, of which each process has its own number. Shorter ones are padded on the way."""
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts)])
