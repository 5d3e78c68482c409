"""Converts the stacked experts of a model in memory to separate linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...checkpoint_conversion import expert_stacks
from ...checks import check
from ...experts import SparseMoeVlmUnfusedExperts
from ..expert_modules import modules_of, our_experts_config


@torch.no_grad()
def unfuse_experts(model: PreTrainedModel) -> PreTrainedModel:
    """
    Converts the stacked routed experts of a model to separate linear layers, in place, which quantisers and adapters
    find. The outputs do not change.

    A model that is loaded from a checkpoint does not need this function: pass `unfused_experts=True` to
    `from_pretrained`. Checkpoints have the same format in both cases. To get the stacks back, save the model and load
    it with `unfused_experts=False`.

    Args:
        model (`PreTrainedModel`):
            A model of this package or an upcycled model, without adapters on its experts.

    Returns:
        `PreTrainedModel`: The same model. Its configuration has `unfused_experts=True`.

    Raises:
        ValueError: If the model has no experts of this package, or if its experts have adapters, are quantised, or were
            loaded with `num_expert_shards`.

    Example:

    ```python
    >>> from torchao.quantization import Int8WeightOnlyConfig, quantize_
    >>> from modeling_sparse_moe_vlm.toolbox.quantization import unfuse_experts

    >>> quantize_(unfuse_experts(model), Int8WeightOnlyConfig())
    ```
    """
    config = our_experts_config(model.config)
    check(config is not None, f"{type(model).__name__} has no experts of this package.")
    adapted = [name for name, module in modules_of(model) if "gate_up_proj" in getattr(module, "parameter_name", "")]
    check(not adapted, f"{adapted[:1]} has an adapter: merge or unload the adapters before `unfuse_experts`.")
    stacks = expert_stacks(model)
    sharded = [stack.name for stack in stacks if stack.is_sharded]
    check(not sharded, f"{sharded[:1]} is split into shards: load the model without `num_expert_shards`.")
    for stack in stacks:
        module = model.get_submodule(stack.name)
        odd = [name for name, weight in module.named_parameters() if type(weight) is not nn.Parameter]
        check(not odd, f"{stack.name}.{odd[:1]} is already quantised: call `unfuse_experts` on the original model.")
        model.set_submodule(stack.name, _unfused(config, module))
    config.unfused_experts = True
    if stacks:
        del model._weight_conversions  # they were those of stacks
    return model


def _unfused(config: Any, experts: nn.Module) -> SparseMoeVlmUnfusedExperts:
    gate_up_proj, down_proj = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
    with torch.device("meta"):
        unfused = SparseMoeVlmUnfusedExperts(config, gate_up_proj.shape[0], down_proj.shape[2])
    expert: Any
    for expert, gate_up, down in zip(unfused, gate_up_proj, down_proj, strict=True):
        gate, up = gate_up.chunk(2)
        # Copies, because a view would keep the whole stack in memory.
        expert.gate_proj.weight = nn.Parameter(gate.clone(), gate_up_proj.requires_grad)
        expert.up_proj.weight = nn.Parameter(up.clone(), gate_up_proj.requires_grad)
        expert.down_proj.weight = nn.Parameter(down.clone(), down_proj.requires_grad)
    return unfused.train(experts.training)
