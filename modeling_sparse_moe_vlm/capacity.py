"""Expert capacity: how many tokens an expert takes, and which ones it drops (batch-priority routing)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def expert_capacity(
    *, share: Sequence[float], modality_ids: torch.Tensor, real: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Capacity of every expert for the tokens of each modality: ⌈C·k·n/E⌉, for the n tokens of the modality, each of which
    goes to k of the E experts that serve it, with the capacity factor C (V-MoE, arXiv 2106.05974; rounded up,
    as in its code, so that one token alone is never dropped).

    Args:
        share (`Sequence[float]`):
            C·k/E by modality.
        modality_ids (`torch.Tensor` of shape `(T,)`):
            Modality id of every token.
        real (`torch.Tensor` of shape `(T,)`, *optional*):
            `False` for padding, which does not count.

    Returns:
        `torch.Tensor`: `(num_modalities,)`.
    """
    counted = [modality_ids == modality_id for modality_id in range(len(share))]
    if real is not None:
        counted = [tokens & real for tokens in counted]
    # The margin keeps a product that is a whole number from being rounded up.
    return torch.stack(
        [torch.ceil(tokens.sum() * number * (1 - 1e-6)) for number, tokens in zip(share, counted, strict=True)]
    )


def drop_over_capacity(
    weights: torch.Tensor,
    index: torch.Tensor,
    *,
    num_experts: int,
    priority: torch.Tensor,
    capacity: torch.Tensor,
    modality_ids: torch.Tensor,
    real: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Batch-priority routing: experts take the first choices of all tokens before the second ones, and so on, among them
    the tokens of the highest priority first, until their capacity is used up (V-MoE, arXiv 2106.05974, and the
    algorithm there). Every modality has a capacity of its own, so none can crowd another out.

    Args:
        weights, index (`torch.Tensor` of shape `(T, k)`):
            Weights and ids of the chosen experts, best first; the sentinel E for an unused slot.
        num_experts (`int`):
            Number E of experts.
        priority (`torch.Tensor` of shape `(T,)`):
            The larger, the sooner a token is served. Of equal ones the earlier token is.
        capacity (`torch.Tensor` of shape `(num_modalities,)`):
            Number of tokens of each modality that an expert takes.
        modality_ids (`torch.Tensor` of shape `(T,)`):
            Modality id of every token.
        real (`torch.Tensor` of shape `(T,)`, *optional*):
            `False` for padding, which goes to no expert.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: weights and ids, `(T, k)`; a dropped slot has weight 0 and the sentinel
        id E. The weights that are left stay as they are.
    """
    wanted = index if real is None else index.masked_fill(~real[:, None], num_experts)
    order = torch.argsort(priority, descending=True, stable=True)
    # The queue of a modality at an expert, slot by slot in the order in which slots are served.
    queue = (modality_ids[:, None] * (num_experts + 1) + wanted)[order].T.reshape(-1)  # (k·T,)
    # A slot's place in its queue: where it stands once slots are sorted by queue, less the queue's start.
    by_queue, slots = torch.sort(queue, stable=True)
    numbers = torch.arange(queue.shape[0], device=queue.device)
    place = torch.empty_like(queue).scatter(0, slots, numbers - torch.searchsorted(by_queue, by_queue))
    places = torch.empty_like(index).index_copy(0, order, place.view(index.shape[1], -1).T)  # (T, k)
    dropped = (wanted == num_experts) | (places >= capacity[modality_ids][:, None])
    return weights.masked_fill(dropped, 0.0), wanted.masked_fill(dropped, num_experts)
