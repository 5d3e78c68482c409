"""Shards of the experts of a group, which a device map can place on different devices.

Each shard is a module with some of the experts. The number of shards is chosen when a model is loaded
(`num_expert_shards`) and does not affect checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def shard_sizes(num_experts: int, num_shards: int) -> list[int]:
    """
    Returns the number of experts in each shard. Sizes differ by at most 1, larger shards come first, and no shard is
    empty.

    Args:
        num_experts (`int`):
            Number of experts.
        num_shards (`int`):
            Number of shards. There are fewer shards if there are fewer experts.

    Returns:
        `list[int]`: The sizes.
    """
    share, rest = divmod(num_experts, min(num_shards, num_experts))
    return [share + (shard < rest) for shard in range(min(num_shards, num_experts))]


class SparseMoeVlmExpertShards(nn.Module):
    """
    The routed experts of one group, split into shards. It has the interface of [`~experts.SparseMoeVlmExperts`]. Expert
    ids are numbered across the shards.

    Args:
        shards (`Sequence[nn.Module]`):
            The shards.
        sizes (`Sequence[int]`):
            Number of experts in each shard.
    """

    def __init__(self, shards: Sequence[nn.Module], sizes: Sequence[int]):
        super().__init__()
        self.shards = nn.ModuleList(shards)
        self.sizes = tuple(sizes)
        self.starts = tuple(accumulate(sizes, initial=0))[:-1]
        self.num_experts = sum(sizes)
        self.register_load_state_dict_pre_hook(_refuse_adapters_of_stacks)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Runs the experts: see [`~experts.SparseMoeVlmExperts.forward`]."""
        calls = []
        for shard, first, size in zip(self.shards, self.starts, self.sizes, strict=True):
            index = top_k_index - first
            elsewhere = (index < 0) | (index >= size)
            inputs = (hidden_states, index.masked_fill(elsewhere, size), top_k_weights.masked_fill(elsewhere, 0.0))
            calls.append((shard, inputs))
        output, *others = run_at_once(calls, hidden_states.device)
        for other in others:
            output = output + other
        return output


def _refuse_adapters_of_stacks(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    """
    Raises `ValueError` for the weights of an adapter for a whole group. PEFT would only warn and continue with an
    adapter that has no effect.
    """
    for name in state_dict:
        if name.startswith(prefix) and "lora_" in name and not name.startswith(f"{prefix}shards."):
            raise ValueError(
                f"{name!r} belongs to an adapter for unsharded experts, but the model was loaded with "
                "`num_expert_shards`: load the adapter with `load_adapter` from "
                "`modeling_sparse_moe_vlm.toolbox.expert_lora`."
            )


def run_at_once(calls: Iterable[tuple[nn.Module, _Inputs]], home: torch.device) -> list[torch.Tensor]:
    """
    Runs experts that can be on different devices, without waiting for any of them. All inputs are sent before the first
    experts run, because a copy waits for earlier operations of its device.

    Args:
        calls (`Iterable[tuple[nn.Module, tuple]]`):
            Experts and their inputs.
        home (`torch.device`):
            Device of the outputs.

    Returns:
        `list[torch.Tensor]`: The outputs, in order.
    """
    sent = [(experts, tuple(send(tensor, _device(experts)) for tensor in inputs)) for experts, inputs in calls]
    outputs = [experts(*inputs) for experts, inputs in sent]
    return [send(output, home) for output in outputs]


def send(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """
    Moves a tensor to a device without waiting for the copy, except for copies to the CPU, which would be read too
    early.

    Args:
        tensor (`torch.Tensor`):
            The tensor.
        device (`torch.device`, *optional*):
            The device. With `None`, the tensor is not moved.

    Returns:
        `torch.Tensor`: The tensor on the device.
    """
    if device is None or tensor.device == device:
        return tensor
    return tensor.to(device, non_blocking=device.type != "cpu")


def _device(experts: nn.Module) -> torch.device | None:
    """Returns the device of experts, or `None` if they have no weights or a hook of Accelerate loads the weights."""
    weight = getattr(experts, "down_proj", None)
    return None if weight is None or weight.device.type == "meta" else weight.device
