"""
LoRA on experts that were loaded in shards (`num_expert_shards`). On disk, the adapter is the same as for whole stacks.

```python
model = get_peft_model(model, lora_config_for_shards(config, model))
save_adapter(model, "adapter")  # `PeftModel.from_pretrained(whole_model, "adapter")` can load it
model = load_adapter(sharded_model, "adapter")  # or `load_expert_lora`, to run it factored
```
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
    """Whether PEFT would match a parameter with one of the targets, that is, whether its name ends with the target."""
    return any(f".{name}".endswith(f".{target}") for target in targets)


class _NamesOfStacks(LoraConfig):
    """A configuration that is saved with the names of whole stacks instead of the names of shards."""

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
    Adds the shards of stacks of experts to the `target_parameters` of a configuration that name these stacks. The
    configuration is still saved with the names of the stacks. For a model without shards, it stays the same.

    Args:
        config (`LoraConfig`):
            Configuration of an adapter for whole stacks.
        model (`nn.Module`):
            Model to adapt.

    Returns:
        `LoraConfig`: A copy of the configuration, for `get_peft_model`.
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
    Saves an adapter as `PeftModel.save_pretrained` does, with the shards of every stack of experts joined.

    Args:
        model (`PeftModel`):
            Model with the adapter, made with [`lora_config_for_shards`] or [`load_adapter`].
        folder (`str` or `PathLike`):
            Folder to write the adapter to. As in PEFT, an adapter with a name other than `"default"` is written to a
            subfolder of this name.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Name of the adapter.

    Raises:
        KeyError: If the model has no adapter of this name.
    """
    model.peft_config[adapter_name] = lora_config_for_shards(model.peft_config[adapter_name], model)
    model.save_pretrained(str(folder), selected_adapters=[adapter_name])
    path = Path(folder) / ("" if adapter_name == "default" else adapter_name) / "adapter_model.safetensors"
    save_file(_join(load_file(path), _sizes(model)), path, metadata={"format": "pt"})


def load_adapter(
    model: nn.Module, folder: str | PathLike, adapter_name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """
    Loads an adapter of whole stacks of experts onto a model with any number of shards. It does not run factored; use
    [`~toolbox.expert_lora.load_expert_lora`] for that.

    Args:
        model (`nn.Module`):
            Model without adapters, or a `PeftModel` to add the adapter to.
        folder (`str` or `PathLike`):
            Folder of the adapter, or its name on the Hub.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Name of the adapter in the model.
        is_trainable (`bool`, *optional*, defaults to `False`):
            Whether the adapter can be trained further.

    Returns:
        `PeftModel`: The model with the adapter, in evaluation mode.

    Raises:
        OSError: If a file of the adapter is missing or damaged. The message names the file.
        ValueError: If the adapter does not fit the model, is not a LoRA adapter, or was trained by PEFT before 0.19.
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
    Loads an adapter of whole stacks of experts onto a model. The model may have shards, offloaded weights and other
    adapters.

    Args:
        model (`nn.Module`):
            Model without adapters, or a `PeftModel` to add the adapter to.
        path (`str` or `PathLike`):
            Folder of the adapter, or its name on the Hub.
        adapter_name (`str`):
            Name of the adapter in the model.
        is_trainable (`bool`):
            Whether the adapter can be trained further.
        prepare (`Callable[[LoraConfig], None]`, *optional*):
            Function that is called with the configuration of the adapter before PEFT adds the adapter.
        hub_options:
            `revision`, `token` and `cache_dir` for an adapter on the Hub.

    Returns:
        `PeftModel`: The model with the adapter.

    Raises:
        OSError: If a file of the adapter is missing or damaged. The message names the file.
        ValueError: If the adapter does not fit the model, is not a LoRA adapter, or was trained by PEFT before 0.19.
    """
    folder, weights = read_adapter(path, model, **hub_options)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not is_trainable
    config = lora_config_for_shards(config, model)
    prepare(config)
    # PEFT puts adapters of offloaded weights on the meta device, where copied values would be lost. With
    # `low_cpu_mem_usage`, it uses the loaded tensors themselves.
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
    """Returns the number of experts of each shard, by name of the stack in the state dict of an adapter."""
    sizes: dict[str, list[int]] = {}
    for name, module in experts_modules(model).items():
        stack, is_shard, _ = name.partition(".shards.")
        if is_shard:
            sizes.setdefault(stack, []).append(module.num_experts)
    return sizes


# `lora_A` of a stack has shape (experts · rank, in), where the expert is the slow index. `lora_B` has shape
# (out, rank · experts), where the expert is the fast index.


def _join(state: dict[str, torch.Tensor], sizes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Joins the tensors of the shards of each stack in the state dict of an adapter."""
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
    """Splits the tensors of an adapter of whole stacks into those of the shards of a model that has the adapter."""
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
