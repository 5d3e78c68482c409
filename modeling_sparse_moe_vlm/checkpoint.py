"""Checkpoints read without the library's conversion, as `Trainer` does to resume and to go back to the best model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

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
            for expert, (gate_up, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
                gate, up = gate_up.chunk(2)
                places[f"{name}.{expert}.gate_proj.weight"] = (f"{name}.gate_up_proj", gate)
                places[f"{name}.{expert}.up_proj.weight"] = (f"{name}.gate_up_proj", up)
                places[f"{name}.{expert}.down_proj.weight"] = (f"{name}.down_proj", down)
    return places
