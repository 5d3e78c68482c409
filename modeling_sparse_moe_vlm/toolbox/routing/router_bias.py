"""Auxiliary-loss-free load balancing: updates the router biases after every training step, against the load."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ...experts_config import experts_config_of
from ...routing import routers_with_bias
from .counts import RoutingCounts


def bias_direction(chosen: torch.Tensor, serving: torch.Tensor) -> torch.Tensor:
    """
    Computes the direction of the bias update of every expert: sign(c̄ − c), where c is the number of tokens that chose
    the expert, and c̄ is its mean over the experts that serve the modality (arXiv 2408.15664, algorithm 1; DeepSeek-V3,
    arXiv 2412.19437, section 2.1.2).

    Args:
        chosen (`torch.Tensor` of shape `(M, E)`):
            Number of tokens of each modality that chose each expert, of an integer type.
        serving (`torch.Tensor` of shape `(M, E)`):
            Whether the expert serves the modality.

    Returns:
        `torch.Tensor` of shape `(M, E)`: Values -1, 0 and 1. They are 0 for an expert that does not serve the modality,
        and for a modality without tokens.
    """
    # Multiplied by the number of experts, so that equal counts compare equal in integers.
    total, number = chosen.sum(dim=-1, keepdim=True), serving.sum(dim=-1, keepdim=True)
    return torch.sign(total - number * chosen) * serving


@torch.no_grad()
def update_router_bias(model: PreTrainedModel, counts: RoutingCounts, rate: float | None = None) -> None:
    """
    Updates the bias of every router by `rate`, in favour of experts that were chosen too rarely (auxiliary-loss-free
    load balancing, arXiv 2408.15664). Call it once per training step, after the optimizer's step, with the counts of
    all micro-batches. All data-parallel processes must call it; they make the same update.

    Each modality has its own bias, which is updated by the load of that modality over the experts that serve it. If a
    joint expert is overloaded with text and idle for images, both are corrected. Routers whose layers share experts are
    updated together, by the load of the shared experts. Frozen routers keep their biases: when an adapter is trained,
    for example, the biases would not be saved with it.

    Args:
        model (`PreTrainedModel`):
            The model, whose routers have biases (`config.router_bias_update_rate`), without a wrapper for parallelism.
        counts ([`RoutingCounts`]):
            Routing counts of this step in this process.
        rate (`float`, *optional*):
            Size of the update, in units of router scores. By default, `config.router_bias_update_rate`.

    Raises:
        ValueError: If the routers of the model have no bias.
    """
    routers = routers_with_bias(model)
    if not routers:
        raise ValueError(
            "The model's routers have no bias: set `router_bias_update_rate` in its configuration when it is created."
        )
    config = experts_config_of(model.config)
    rate = config.router_bias_update_rate if rate is None else rate
    chosen = counts.over_processes().wanted
    for layers in config.layers_by_experts:
        numbers = [config.sparse_layers.index(layer) for layer in layers]
        width = routers[numbers[0]].e_score_correction_bias.shape[1]
        groups = config.layer_expert_groups(layers[0], always_on=False)
        serving = torch.tensor(
            [
                [group.serves(modality) for group in groups for _ in range(group.num_experts)]
                for modality in config.modalities
            ],
            device=chosen.device,
        )
        direction = bias_direction(chosen[numbers, :, :width].sum(dim=0), serving)
        for number in numbers:
            bias, weight = routers[number].e_score_correction_bias, routers[number].weight
            if weight.requires_grad:
                bias += rate * direction.to(bias)
