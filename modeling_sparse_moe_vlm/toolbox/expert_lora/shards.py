"""
LoRA on experts that were loaded in shards (`num_expert_shards`): the same adapter on disk as of whole stacks.

    model = get_peft_model(model, lora_config_for_shards(config, model))
    save_adapter(model, "adapter")                # `PeftModel.from_pretrained(whole_model, "adapter")` loads it
    model = load_adapter(sharded_model, "adapter")  # or `load_expert_lora`, to run factored
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn

from ...checks import check
from ..expert_modules import experts_modules, name_without_adapters, name_without_shard
from .peft_0_18 import read_adapter


def _is_reached(name: str, targets: Iterable[str]) -> bool:
    """Whether PEFT would find the parameter by the targets, which name its end."""
    return any(f".{name}".endswith(f".{target}") for target in targets)


class _NamesOfStacks(LoraConfig):
    """A configuration that is saved with the names that stacks have without shards."""

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        names: list[str] = []
        for name in sorted(values.get("target_parameters") or [], key=lambda name: name_without_shard(name) != name):
            stack = name_without_shard(name)
            if not _is_reached(stack, names):
                names.append(stack)
        if names:
            values["target_parameters"] = names
        return values


def lora_config_for_shards(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """
    A configuration whose `target_parameters`, which name stacks of experts, reach the shards of the stacks as well. It
    is saved as it was given. For a model without shards it changes nothing.

    Args:
        config (`LoraConfig`):
            Configuration of an adapter.
        model (`nn.Module`):
            The model that it is meant for.

    Returns:
        `LoraConfig`: a copy, for `get_peft_model`.
    """
    adapted = copy.copy(config)
    names = [name_without_adapters(name) for name, _ in model.named_parameters()]
    sharded = [name for name in dict.fromkeys(names) if name_without_shard(name) != name]
    if not sharded:
        return adapted
    if not isinstance(config, _NamesOfStacks):
        adapted.__class__ = type(type(config).__name__, (_NamesOfStacks, type(config)), {})
    targets = list(config.target_parameters or [])
    reached = [name for name in sharded if _is_reached(name_without_shard(name), targets)]
    if reached:
        adapted.target_parameters = list(dict.fromkeys([*targets, *reached]))
    return adapted


def save_adapter(model: PeftModel, folder: str | PathLike, adapter_name: str = "default") -> None:
    """
    Saves an adapter as `PeftModel.save_pretrained` does, the shards of every stack of experts joined.

    Args:
        model (`PeftModel`):
            The model with the adapter, made with [`lora_config_for_shards`] or by [`load_adapter`].
        folder (`str` or `PathLike`):
            Where to write the adapter; as with PEFT, one that is not `"default"` goes into a folder of its name there.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Name of the adapter.
    """
    model.peft_config[adapter_name] = lora_config_for_shards(model.peft_config[adapter_name], model)
    model.save_pretrained(str(folder), selected_adapters=[adapter_name])
    path = Path(folder) / ("" if adapter_name == "default" else adapter_name) / "adapter_model.safetensors"
    save_file(_join(load_file(path), _sizes(model)), path, metadata={"format": "pt"})


def load_adapter(
    model: nn.Module, folder: str | PathLike, adapter_name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """
    Loads an adapter of whole stacks of experts onto a model with any number of shards.

    Args:
        model (`nn.Module`):
            The model.
        folder (`str` or `PathLike`):
            Folder of the adapter, or its name on the Hub.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Name that it gets.
        is_trainable (`bool`, *optional*, defaults to `False`):
            Whether it can be trained on.

    Returns:
        `PeftModel`: the model with the adapter, ready for inference.

    Raises:
        ValueError: If the adapter does not fit the model, or was trained by PEFT before 0.19.
    """
    return load_onto(model, folder, adapter_name, is_trainable=is_trainable).eval()


def load_onto(
    model: nn.Module,
    path: str | PathLike,
    adapter_name: str,
    *,
    is_trainable: bool,
    prepare: Callable[[LoraConfig], None] = lambda config: None,
    **hub_options: Any,
) -> PeftModel:
    """
    Loads an adapter of whole stacks of experts onto a model, in shards or not, offloaded or not, with or without other
    adapters.

    Args:
        model (`nn.Module`): The model, or a `PeftModel` to add this adapter to.
        path (`str` or `PathLike`): The adapter's folder, or its name on the Hub.
        adapter_name (`str`): The name that it gets.
        is_trainable (`bool`): Whether it is trained further.
        prepare (`Callable[[LoraConfig], None]`): Called with its configuration before PEFT is.
        **hub_options: `revision`, `token`, `cache_dir`.

    Returns:
        `PeftModel`: the model with the adapter.

    Raises:
        OSError: If a file of the adapter is missing or damaged; the message names it.
        ValueError: If the adapter does not fit the model, or was trained by PEFT before 0.19.
    """
    folder, weights = read_adapter(path, model, **hub_options)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not is_trainable
    config = lora_config_for_shards(config, model)
    prepare(config)
    # New values would be lost where PEFT puts them beside offloaded weights, on the meta device.
    is_offloaded = any(parameter.is_meta for parameter in model.parameters())
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config, low_cpu_mem_usage=is_offloaded)
        if is_trainable:
            model.set_requires_grad(adapter_name)
    else:
        model = get_peft_model(model, config, adapter_name, low_cpu_mem_usage=is_offloaded)
    weights = split_over_shards(weights, model)
    result = set_peft_model_state_dict(model, weights, adapter_name, low_cpu_mem_usage=is_offloaded)
    own = get_peft_model_state_dict(model, adapter_name=adapter_name)
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    check(
        not missing and not unexpected and not result.unexpected_keys,
        f"the adapter {str(path)!r} does not fit the model: it lacks {missing}, "
        f"and the model lacks {unexpected or result.unexpected_keys}.",
    )
    return model


def _sizes(model: nn.Module) -> dict[str, list[int]]:
    """Numbers of experts of the shards, by the stack's name in the state of an adapter."""
    sizes: dict[str, list[int]] = {}
    for name, module in experts_modules(model).items():
        stack, is_shard, _ = name.partition(".shards.")
        if is_shard:
            sizes.setdefault(stack, []).append(module.num_experts)
    return sizes


# `lora_A` of a stack is (experts · rank, in), with the expert slowest; `lora_B` (out, rank · experts), with the expert
# fastest.


def _join(state: dict[str, torch.Tensor], sizes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    joined: dict[str, torch.Tensor] = {}
    shards: dict[str, list[torch.Tensor]] = {}
    for name, tensor in state.items():
        shards.setdefault(name_without_shard(name), []).append(tensor)
    for name, tensors in shards.items():
        stack = next((stack for stack in sizes if name.startswith(f"{stack}.")), None)
        if stack is None:
            joined[name] = tensors[0]
        elif "lora_B" not in name:
            joined[name] = torch.cat(tensors)
        else:
            parts = [b.unflatten(1, (-1, size)) for b, size in zip(tensors, sizes[stack], strict=True)]
            joined[name] = torch.cat(parts, dim=-1).flatten(1)
    return joined


def split_over_shards(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of an adapter of whole stacks, split over the shards that the model, which has it, has of them."""
    sizes = _sizes(model)
    split: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        stack = next((stack for stack in sizes if name.startswith(f"{stack}.")), None)
        if stack is None:
            split[name] = tensor
            continue
        num_experts = sum(sizes[stack])
        if "lora_B" not in name:
            parts = tensor.unflatten(0, (num_experts, -1)).split(sizes[stack])
            parts = tuple(part.flatten(0, 1) for part in parts)
        else:
            parts = tensor.unflatten(1, (-1, num_experts)).split(sizes[stack], dim=-1)
            parts = tuple(part.flatten(1) for part in parts)
        for number, part in enumerate(parts):
            split[f"{stack}.shards.{number}{name.removeprefix(stack)}"] = part.contiguous()
    return split
