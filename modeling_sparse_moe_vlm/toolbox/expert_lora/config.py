"""Configuration of LoRA on experts, and how many parameters it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from .adapted_layer import FactoredExpertsLayer


@dataclass
class ExpertLoraConfig(LoraConfig):
    """
    A `LoraConfig` whose adapters of experts are factored from the start, and may have what PEFT alone refuses. On disk
    it is a plain `LoraConfig`: dropout is for training, and is saved as 0 where experts have adapters, since PEFT alone
    would refuse to load them otherwise; ranks and projections are seen from the zeros in the weights.

    Args:
        expert_ranks (`dict[str, list[int]]`, *optional*):
            By name of a stack, as `target_parameters` has it, the rank of each expert, at most `r`; 0 for none.
            Of experts with less, the other rows are 0 and stay so. `lora_alpha / r` scales all alike.
        gate_up (`str`, *optional*):
            `"gate"` or `"up"` where only this half of the stack of gates and ups is adapted.
    """

    expert_ranks: dict[str, list[int]] = field(default_factory=dict)
    gate_up: str | None = None

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        for name in ("expert_ranks", "gate_up"):
            values.pop(name)
        if self.target_parameters:
            values["lora_dropout"] = 0.0
        return values

    @torch.no_grad()
    def settle(self, layer: FactoredExpertsLayer, adapter_name: str) -> None:
        """Confines a layer's new adapter to the ranks and outputs that it may use."""
        if self.gate_up is not None and layer.parameter_name == "gate_up_proj":
            layer.output_masks[adapter_name] = layer.output_mask(self.gate_up)
        ranks = next((ranks for name, ranks in self.expert_ranks.items() if layer.stack_name.endswith(name)), None)
        if ranks is None:
            return
        a, _ = layer.factors(adapter_name)
        if len(ranks) != a.shape[0] or not all(0 <= rank <= a.shape[1] for rank in ranks):
            raise ValueError(
                f"`expert_ranks` of {layer.stack_name!r} must be {a.shape[0]} numbers from 0 to r = {a.shape[1]}, "
                f"got {ranks}."
            )
        used = torch.arange(a.shape[1], device=a.device) < torch.tensor(ranks, device=a.device)[:, None]
        a.mul_(used[:, :, None])
        # Zeros in both factors get no gradient, and stay.
        layer.lora_B[adapter_name].weight.view(-1, a.shape[1], a.shape[0]).mul_(used.T)


def num_adapter_parameters(model: nn.Module) -> int:
    """
    Number of trainable adapter parameters that can change: without the rows beyond an expert's rank, and the outputs
    that an adapter may not change. PEFT's own count has the zeros, too.
    """
    total = 0
    counted: set[nn.Parameter] = set()
    for layer in model.modules():
        if not isinstance(layer, FactoredExpertsLayer):
            continue
        for name in layer.lora_A:
            weights = layer.lora_A[name].weight, layer.lora_B[name].weight
            if not all(weight.requires_grad for weight in weights):
                continue
            counted.update(weights)
            a, _ = layer.factors(name)
            rows = int(a.detach().any(dim=-1).sum())
            mask = layer.output_masks.get(name)
            total += rows * (a.shape[-1] + (weights[1].shape[0] if mask is None else int(mask.sum())))
    for parameter in model.parameters():
        if parameter.requires_grad and parameter not in counted:
            total += parameter.numel()
    return total
