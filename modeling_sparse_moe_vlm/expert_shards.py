"""
Shards of a stack of experts: modules with some of its experts each, which a device map can put on different devices.
How many there are is chosen at loading (`num_expert_shards`); checkpoints do not know of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def shard_sizes(num_experts: int, num_shards: int) -> list[int]:
    """Numbers of experts of the shards: as even as can be, larger ones first, and no shard is empty."""
    share, rest = divmod(num_experts, min(num_shards, num_experts))
    return [share + (shard < rest) for shard in range(min(num_shards, num_experts))]


class SparseMoeVlmExpertShards(nn.Module):
    """The routed experts of one group in shards, with the interface of one stack: ids count through the shards."""

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
    """PEFT would only warn, and go on with an adapter that does nothing."""
    for name in state_dict:
        if name.startswith(prefix) and "lora_" in name and not name.startswith(f"{prefix}shards."):
            raise ValueError(
                f"{name!r} belongs to an adapter of a whole stack of experts, but the model was loaded with "
                "`num_expert_shards`: load the adapter with `load_adapter` of `toolbox.expert_lora`."
            )


def run_at_once(calls: Iterable[tuple[nn.Module, _Inputs]], home: torch.device) -> list[torch.Tensor]:
    """
    Runs experts that may lie on different devices, without waiting for any: all inputs are on their way before the
    first experts run, since a copy waits for what its device was given to do earlier.

    Args:
        calls (`Iterable[tuple[nn.Module, tuple]]`):
            Experts and their inputs.
        home (`torch.device`):
            Where the outputs go.

    Returns:
        `list[torch.Tensor]`: the outputs, in order.
    """
    sent = [(experts, tuple(send(tensor, _device(experts)) for tensor in inputs)) for experts, inputs in calls]
    outputs = [experts(*inputs) for experts, inputs in sent]
    return [send(output, home) for output in outputs]


def send(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """The tensor on the device, without waiting for it, save on the CPU, which would read it too early."""
    if device is None or tensor.device == device:
        return tensor
    return tensor.to(device, non_blocking=device.type != "cpu")


def _device(experts: nn.Module) -> torch.device | None:
    """Where experts lie; `None` where they have no weights of their own, or a hook of Accelerate brings them."""
    weight = getattr(experts, "down_proj", None)
    return None if weight is None or weight.device.type == "meta" else weight.device
