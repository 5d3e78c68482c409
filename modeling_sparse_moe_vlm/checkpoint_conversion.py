"""Checkpoints read without the library's conversion, as `Trainer` does to resume and to go back to the best model."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .expert_shards import first_expert
from .experts import SparseMoeVlmExperts


@torch.no_grad()
def convert_from_disk(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """
    Brings a state as it lies on disk into the model's own form: experts, stored one by one, are written into their
    stacks, and what else has another name on disk (some vision towers) is renamed.

    Args:
        model (`PreTrainedModel`):
            The model that the state is meant for.
        state_dict (`Mapping[str, torch.Tensor]`):
            Tensors of a checkpoint, or of one of its shards.

    Returns:
        `Mapping[str, torch.Tensor]`: what `load_state_dict` takes. A stack that got only some of its experts is left
        out; those are in place all the same.
    """
    own = model.state_dict()
    if all(name in own for name in state_dict) or any(tensor.is_meta for tensor in own.values()):
        return state_dict
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    places = _places_of_experts(model)
    sizes = Counter(stack for stack, _ in places.values())
    filled: Counter[str] = Counter()
    converted = {}
    for name, tensor in state_dict.items():
        if name not in own and name not in places:
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
        stack, place = places.get(name, (name, None))
        if place is None or place.shape != tensor.shape:
            converted[name] = tensor
        else:
            place.copy_(tensor)
            filled[stack] += 1
    return converted | {stack: own[stack] for stack in filled if filled[stack] == sizes[stack]}


def _places_of_experts(model: PreTrainedModel) -> dict[str, tuple[str, torch.Tensor]]:
    """By name on disk, the name of the stack and the part of it that holds the matrix."""
    places = {}
    for name, module in model.named_modules():
        if isinstance(module, SparseMoeVlmExperts):
            first, stack = first_expert(model, name), name.rpartition(".shards.")[0] or name
            for expert, (gate_up, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True), first):
                gate, up = gate_up.chunk(2)
                places[f"{stack}.{expert}.gate_proj.weight"] = (f"{name}.gate_up_proj", gate)
                places[f"{stack}.{expert}.up_proj.weight"] = (f"{name}.gate_up_proj", up)
                places[f"{stack}.{expert}.down_proj.weight"] = (f"{name}.down_proj", down)
    return places


def check_device_map(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    """
    Checks that a device map fits the model.

    Args:
        model (`nn.Module`):
            The model.
        device_map (`Mapping[str, Any]`):
            Device by name of a module, or of a parameter.

    Raises:
        ValueError: If it names what does not exist, or leaves something out; the message names it.
    """
    tensors = list(model.state_dict())
    names = {"", *tensors, *(name for name, _ in (*model.named_modules(), *model.named_buffers()))}
    for name in device_map:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0)
            raise ValueError(
                f"`device_map` names {name!r}, which {type(model).__name__} does not have: did you mean {close[0]!r}? "
                "(`named_modules()` has all names.)"
            )
    starts = tuple(f"{name}." for name in device_map)
    left_out = [] if "" in device_map else [name for name in tensors if not f"{name}.".startswith(starts)]
    if left_out:
        raise ValueError(
            f"`device_map` gives no device for {left_out[0]!r} and {len(left_out) - 1} more tensors of "
            f"{type(model).__name__}: name them, or a module that they lie in."
        )
