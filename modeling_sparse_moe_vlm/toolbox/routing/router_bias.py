"""Loss-free balancing: after every training step, the bias of each router moves against the observed load."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ...experts_config import experts_config_of
from ...routing import routers_with_bias
from .counts import RoutingCounts


def bias_direction(chosen: torch.Tensor, serving: torch.Tensor) -> torch.Tensor:
    """
    Direction in which the bias of every expert moves: sign(c̄ − c), with c the number of tokens that chose the expert
    and c̄ its mean over the experts that serve the modality (arXiv 2408.15664, algorithm 1; DeepSeek-V3, arXiv
    2412.19437, sec. 2.1.2).

    Args:
        chosen (`torch.Tensor` of shape `(M, E)`):
            Number of tokens of each modality that chose each expert, of an integer type.
        serving (`torch.Tensor` of shape `(M, E)`):
            Whether the expert serves the modality.

    Returns:
        `torch.Tensor`: `(M, E)`, of values -1, 0 and 1; 0 where an expert does not serve the modality, and for a
        modality of which there was no token.
    """
    # Times the number of experts, so that equal counts are equal.
    total, number = chosen.sum(dim=-1, keepdim=True), serving.sum(dim=-1, keepdim=True)
    return torch.sign(total - number * chosen) * serving


@torch.no_grad()
def update_router_bias(model: PreTrainedModel, counts: RoutingCounts, rate: float | None = None) -> None:
    """
    Moves the bias of every router by `rate`, towards the experts that were chosen too rarely. To be called once per
    training step, after the optimizer's, with the counts of all its micro-batches; all data-parallel processes must
    call it, and move their biases alike.

    The load of a modality is judged by its own tokens and over the experts that serve it: each modality has a bias of
    its own, so a joint expert may be overloaded with text and idle for images, and both are corrected. Routers whose
    layers share experts move together, by the load of the shared experts. Frozen routers keep their biases, as with an
    adapter, which would not be saved with them.

    Args:
        model (`PreTrainedModel`):
            The model, with biases (`config.router_bias_update_rate`) and without a wrapper for parallelism.
        counts ([`RoutingCounts`]):
            What was routed in this step, in this process.
        rate (`float`, *optional*):
            How far to move, in units of scores; `config.router_bias_update_rate` by default.

    Raises:
        ValueError: If the model's routers have no bias.
    """
    routers = routers_with_bias(model)
    if not routers:
        raise ValueError(
            "The model's routers have no bias: set `router_bias_update_rate` in its configuration when it is made."
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
