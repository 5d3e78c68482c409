"""
Shards of a stack of experts: modules with some of its experts each, which a device map can put on different devices.
How many there are is chosen at loading (`num_expert_shards`); checkpoints do not know of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, Split, WeightConverter

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
                "`num_expert_shards`: load the adapter with `load_adapter` of `toolbox.sharded_lora`."
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


# ------------------------------------------------------------------------------------------------ checkpoints


def shard_converters(prefix: str, group: str | None, num_experts: int, num_shards: int) -> list[WeightConverter]:
    """
    How experts that lie one by one in a checkpoint become the shards of a stack, and back; likewise fused ones.

    Args:
        prefix (`str`):
            Name of the stack, as patterns of the library have it: `"mlp.experts"`, `"mlp.experts.image"`, ….
        group (`str`, *optional*):
            Name of the group of experts; `None` where the model has only one.
        num_experts (`int`):
            Number of experts of the group.
        num_shards (`int`):
            Number of shards that were asked for.

    Returns:
        `list[WeightConverter]`: fused ones first, since the last one that matches counts when a model is saved that was
        not loaded.
    """
    sizes = shard_sizes(num_experts, num_shards)
    # An escaped dot keeps the patterns apart from those below when they are reversed.
    fused = [
        WeightConverter(
            source_patterns=f"{prefix}.{name}",
            target_patterns=[rf"{prefix}.shards.{shard}\.{name}" for shard in range(len(sizes))],
            operations=[Split(dim=0)],
            force_cpu=True,  # else the whole stack would lie on the device of the first shard for a while
        )
        for name in ("gate_up_proj", "down_proj")
    ]
    one_by_one = []
    for shard, (first, size) in enumerate(zip(accumulate(sizes, initial=0), sizes, strict=False)):
        # The library drops what looks ahead from the names that it writes. The shard's own number, which no name has,
        # keeps the pattern apart from those of other models whose shards begin elsewhere.
        numbers = "|".join(rf"{expert}\." for expert in range(first, first + size))
        expert = f"{prefix}.(?=shard {shard}|{numbers})*"
        for names, target in ((("gate_proj", "up_proj"), "gate_up_proj"), (("down_proj",), "down_proj")):
            one_by_one.append(
                WeightConverter(
                    source_patterns=[f"{expert}.{name}.weight" for name in names],
                    target_patterns=f"{prefix}.shards.{shard}.{target}",
                    operations=[StackShard(group)],
                )
            )
    return [*fused, *one_by_one]


class StackShard(ConversionOps):
    """Stacks the experts of one shard. Its reverse takes shards apart again, with the numbers of their experts."""

    def __init__(self, group: str | None, inverse: bool = False):
        self.group = group
        self.inverse = inverse

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        config: Any = None,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        if not self.inverse:
            stacks = [torch.stack(input_dict.pop(pattern)) for pattern in source_patterns]
            return {target_patterns[0]: torch.cat(stacks, dim=1)}
        text_config = config.get_text_config()
        name = text_config.routed_group_names[0] if self.group is None else self.group
        num_experts = next(group["num_experts"] for group in text_config.expert_groups if group["name"] == name)
        sizes = shard_sizes(num_experts, text_config.num_expert_shards)
        starts = list(accumulate(sizes, initial=0))
        # With the full names, since the library finds them only where the stack's first expert is among the shards.
        before, _, after = full_layer_name.partition(target_patterns[0])
        experts = {}
        for pattern, tensors in input_dict.items():
            found = re.search(r"\.shards\.(\d+)\.", pattern)
            assert found is not None
            stack = tensors[0] if isinstance(tensors, list) else tensors
            for target, matrices in zip(target_patterns, stack.chunk(len(target_patterns), dim=1), strict=True):
                for number, matrix in enumerate(matrices.contiguous(), starts[int(found[1])]):
                    experts[before + target.replace("*", str(number)) + after] = matrix
        return experts

    @property
    def reverse_op(self) -> StackShard:
        return StackShard(self.group, not self.inverse)


def first_expert(model: nn.Module, name: str) -> int:
    """The number within its stack of the first expert of a module of experts, which may be a shard of the stack."""
    stack, is_shard, shard = name.rpartition(".shards.")
    if not is_shard:
        return 0
    shards = model.get_submodule(stack)
    assert isinstance(shards, SparseMoeVlmExpertShards)
    return shards.starts[int(shard)]
