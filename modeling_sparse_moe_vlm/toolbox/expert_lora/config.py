"""The configuration of LoRA on experts, and the number of parameters that it trains."""

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
    Configuration of LoRA (Hu et al., arXiv 2106.09685) on experts. [`~toolbox.expert_lora.expert_lora_config`] makes
    it. Adapters of experts run factored and may use features that PEFT itself refuses for them, such as dropout and
    DoRA.

    The configuration is saved as a plain `LoraConfig`, so PEFT can load the adapter without this package. If experts
    have adapters, `lora_dropout` is saved as 0, because PEFT would refuse to load the adapter otherwise; dropout only
    affects training. `expert_ranks` and `gate_up` are not saved, because they can be seen from the zeros in the
    weights.

    Args:
        expert_ranks (`dict[str, list[int]]`, *optional*):
            Rank of each expert, by name of the stack as in `target_parameters`. Each rank is from 0 (no adapter) to
            `r`. Rows of the factors beyond the rank of an expert are 0 and stay 0. The scaling is `lora_alpha / r` for
            all experts.
        gate_up (`str`, *optional*):
            `"gate"` or `"up"` to adapt only this half of a fused stack `gate_up_proj`. By default, both are adapted.
        kwargs:
            All arguments of `peft.LoraConfig`.
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
        """
        Restricts a new adapter of a layer to the ranks and outputs that it may use. The layer calls this method after
        it has added the adapter.

        Args:
            layer (`FactoredExpertsLayer`):
                Layer of the adapter.
            adapter_name (`str`):
                Name of the adapter.

        Raises:
            ValueError: If `expert_ranks` does not have one rank from 0 to `r` for each expert of the stack. The message
                names the stack.
        """
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
        # Rows that are 0 in both factors get no gradient, so they stay 0.
        layer.lora_B[adapter_name].weight.view(-1, a.shape[1], a.shape[0]).mul_(used.T)


def num_adapter_parameters(model: nn.Module) -> int:
    """
    Counts the trainable parameters of a model with adapters. Entries that always stay 0 are not counted: those beyond
    the rank of an expert, and those of outputs that an adapter must not change. The count of PEFT
    (`print_trainable_parameters`) includes them.

    Args:
        model (`nn.Module`):
            Model with adapters, as `get_peft_model` returns it.

    Returns:
        `int`: The number of parameters that training can change.
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
