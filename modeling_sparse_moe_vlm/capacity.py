"""Expert capacity: how many tokens an expert accepts, and which ones it drops (batch priority routing)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def expert_capacity(
    *, share: Sequence[float], modality_ids: torch.Tensor, real: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Computes the capacity of every expert for the tokens of each modality: ⌈C·k·n/E⌉, where C is the capacity factor, n
    the number of tokens of the modality, k the number of experts per token, and E the number of experts that serve the
    modality (V-MoE, arXiv 2106.05974). It is rounded up, as in the code of V-MoE, so that a single token is never
    dropped.

    Args:
        share (`Sequence[float]`):
            C·k/E for each modality.
        modality_ids (`torch.Tensor` of shape `(T,)`):
            Modality id of every token.
        real (`torch.Tensor` of shape `(T,)`, *optional*):
            `False` for padding, which is not counted.

    Returns:
        `torch.Tensor` of shape `(num_modalities,)`: The capacity.
    """
    counted = [modality_ids == modality_id for modality_id in range(len(share))]
    if real is not None:
        counted = [tokens & real for tokens in counted]
    # The factor compensates for rounding errors, so that a product that is an integer is not rounded up.
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
    Drops tokens from experts over capacity with batch priority routing (V-MoE, arXiv 2106.05974).

    The experts accept the first choices of all tokens before the second choices, and so on, until their capacity is
    reached. Among tokens with the same rank of choice, tokens with a higher priority are accepted first. Every modality
    has its own capacity, so one modality cannot displace another.

    Args:
        weights (`torch.Tensor` of shape `(T, k)`):
            Weights of the chosen experts, best first.
        index (`torch.Tensor` of shape `(T, k)`):
            Ids of the chosen experts, best first; the sentinel E for an unused slot.
        num_experts (`int`):
            Number E of experts.
        priority (`torch.Tensor` of shape `(T,)`):
            Priority of every token. Among tokens with equal priority, earlier tokens are accepted first.
        capacity (`torch.Tensor` of shape `(num_modalities,)`):
            Number of tokens of each modality that an expert accepts.
        modality_ids (`torch.Tensor` of shape `(T,)`):
            Modality id of every token.
        real (`torch.Tensor` of shape `(T,)`, *optional*):
            `False` for padding, which is not routed to any expert.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Weights and ids, both of shape `(T, k)`. A dropped slot has weight 0 and
        the sentinel id E. The other weights are not changed.
    """
    wanted = index if real is None else index.masked_fill(~real[:, None], num_experts)
    order = torch.argsort(priority, descending=True, stable=True)
    # Number of the queue of every slot, in the order in which slots are accepted. There is one queue per modality and
    # expert.
    queue = (modality_ids[:, None] * (num_experts + 1) + wanted)[order].T.reshape(-1)  # (k·T,)
    # Position of a slot in its queue: its position when all slots are sorted by queue, minus the start of the queue.
    by_queue, slots = torch.sort(queue, stable=True)
    numbers = torch.arange(queue.shape[0], device=queue.device)
    place = torch.empty_like(queue).scatter(0, slots, numbers - torch.searchsorted(by_queue, by_queue))
    places = torch.empty_like(index).index_copy(0, order, place.view(index.shape[1], -1).T)  # (T, k)
    dropped = (wanted == num_experts) | (places >= capacity[modality_ids][:, None])
    return weights.masked_fill(dropped, 0.0), wanted.masked_fill(dropped, num_experts)
