"""
How experts lie in checkpoints, in memory and in shards, and how a model's tensors get from one form to the other.

Each model brings its own conversions; nothing is registered with Transformers. They are derived from [`ExpertStack`],
and so is [`convert_from_disk`], for states that are read without the library's conversion.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    Split,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)
from transformers.modeling_utils import load_state_dict

from .expert_shards import SparseMoeVlmExpertShards
from .experts import SparseMoeVlmExpertGroups, SparseMoeVlmSparseMoeBlock
from .experts_config import experts_config_of

# By stacked parameter, the matrices of an expert that it holds, one above the other.
MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class ExpertStack:
    """
    The routed experts of one group, in one layer or pool::

        on disk                      <name>.<expert>.gate_proj.weight, .up_proj.weight, .down_proj.weight
        in memory (or fused, on disk)  <name>.gate_up_proj, <name>.down_proj
        in memory, in shards         <name>.shards.<shard>.gate_up_proj, .down_proj; experts count through the shards

    Args:
        name (`str`):
            Name of the module: `"…layers.0.mlp.experts"`, `"…layers.0.mlp.experts.image"`, `"…expert_pools.0"`, ….
        sizes (`tuple[int, ...]`):
            Number of experts of each shard; a single number where there are no shards.
    """

    name: str
    sizes: tuple[int, ...]

    @property
    def is_sharded(self) -> bool:
        return len(self.sizes) > 1

    @property
    def starts(self) -> tuple[int, ...]:
        """Number of the first expert of each shard."""
        return tuple(accumulate(self.sizes, initial=0))[:-1]

    @property
    def parts(self) -> dict[str, range]:
        """By name of a module that holds a part of the stack, the numbers of its experts."""
        names = [f"{self.name}.shards.{shard}" for shard in range(len(self.sizes))] if self.is_sharded else [self.name]
        return {
            name: range(start, start + size) for name, start, size in zip(names, self.starts, self.sizes, strict=True)
        }

    @property
    def place(self) -> str:
        """The name within the decoder, without the layer: stacks that share it have the same experts and shards."""
        # After the last number that is not the block's own (`h.0.ffn.experts`, but `layers.0.ffn.1.experts`).
        layer = r"(?!expert_pools\.)\w+\.\d+\.(?!experts(?:\.|$))"
        return re.split(rf"(?<![^.])(?:{layer}|(?=expert_pools\.))", self.name)[-1]

    def names_on_disk(self, parameter: str) -> list[str]:
        """The names of the matrices that a stacked parameter is made of."""
        experts = range(sum(self.sizes))
        return [f"{self.name}.{expert}.{matrix}.weight" for expert in experts for matrix in MATRICES[parameter]]


def expert_stacks(model: nn.Module) -> list[ExpertStack]:
    """The stacks of a model's routed experts, in the order of its modules."""
    stacks = []
    for name, module in model.named_modules():
        places: dict[str, nn.Module] = {}
        if isinstance(module, SparseMoeVlmSparseMoeBlock) and module.experts is not None:
            places = {"experts": module.experts}
        elif isinstance(getattr(module, "expert_pools", None), nn.ModuleDict):
            places = {f"expert_pools.{pool}": experts for pool, experts in module.expert_pools.named_children()}
        for place, experts in places.items():
            groups = {"": experts}
            if isinstance(experts, SparseMoeVlmExpertGroups):
                groups = {f".{group}": stack for group, stack in experts.items()}
            for group, stack in groups.items():
                # Not `num_experts`, which expert parallelism changes. Experts with adapters have another structure.
                parameter = stack._parameters.get("gate_up_proj")
                if isinstance(stack, SparseMoeVlmExpertShards):
                    sizes = stack.sizes
                elif parameter is not None:
                    sizes = (parameter.shape[0],)
                else:
                    continue
                stacks.append(ExpertStack(f"{name}.{place}{group}".removeprefix("."), sizes))
    return stacks


# ------------------------------------------------------------------------------------------------ of Transformers


def loading_conversions(
    model: PreTrainedModel, of_library: Iterable[WeightTransform], quantizer: Any = None
) -> list[WeightTransform]:
    """
    The conversions that a checkpoint of the model needs.

    Args:
        model (`PreTrainedModel`):
            The model that is loaded.
        of_library (`Iterable[WeightTransform]`):
            What Transformers converts by itself: a vision tower's names, and the renamings that the user asked for.
        quantizer (`HfQuantizer`, *optional*):
            What quantises the model while it is loaded, and may have to read scales beside the weights.

    Returns:
        `list[WeightTransform]`: all renamings, then what stacks experts, then the library's other conversions.
    """
    of_library = list(of_library)
    renamings = [step for step in of_library if isinstance(step, WeightRenaming)]
    converters: list[WeightTransform] = list(_converters(model, also_fused=True))
    others = [step for step in _of_other_tensors(of_library, converters) if not isinstance(step, WeightRenaming)]
    if quantizer is not None:
        # It appends general conversions, which are among the library's, too. Until 5.20 it was not given the model.
        takes_model = "model" in inspect.signature(quantizer.update_weight_conversions).parameters
        converters = quantizer.update_weight_conversions(converters, *[model] * takes_model)
        converters = converters[: len(converters) - len(quantizer.get_weight_conversions())]
    return [*renamings, *_own_renamings(model), *converters, *others]


def saving_conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """
    The conversions that a model which was not loaded from a checkpoint is saved with, each in the direction of loading.
    """
    of_library = model.library_conversions()
    # A prefix is put back only where a checkpoint had it.
    of_library = [step for step in of_library if not isinstance(step, PrefixChange)]
    converters = list(_converters(model, also_fused=False))
    # The library goes through them backwards, and the first match counts.
    return [*_of_other_tensors(of_library, converters), *converters]


def _of_other_tensors(
    of_library: Iterable[WeightTransform], converters: Iterable[WeightTransform]
) -> list[WeightTransform]:
    """
    The library's conversions but for those of experts that our own take as well: a base with experts in other layers,
    which then lie on disk as ours do. The library takes two conversions with the same target for one when it saves.
    """
    targets = {target for step in converters for target in step.target_patterns}
    return [
        step
        for step in of_library
        if not (isinstance(step, WeightConverter) and targets.intersection(step.target_patterns))
    ]


def _own_renamings(model: PreTrainedModel) -> list[WeightRenaming]:
    if experts_config_of(model.config) is not model.config:
        return []
    # Our decoder by itself finds its weights in a checkpoint of the whole model, too.
    return [PrefixChange(prefix_to_remove="language_model", model_prefix="model")]


def _converters(model: nn.Module, also_fused: bool) -> Iterator[WeightConverter]:
    """What stacks the experts that lie one by one on disk. What is fused on disk only needs a conversion for shards."""
    for stack in {stack.place: stack for stack in expert_stacks(model)}.values():
        place = re.escape(stack.place)
        # What looks ahead is not in the names that the library writes.
        if not stack.is_sharded:
            expert = rf"{place}\.(?=\d+\.\w+_proj)*"
            yield WeightConverter(
                source_patterns=[rf"{expert}.{matrix}\.weight" for matrix in MATRICES["gate_up_proj"]],
                target_patterns=f"{stack.place}.gate_up_proj",
                operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
            )
            yield WeightConverter(
                source_patterns=rf"{expert}.down_proj\.weight",
                target_patterns=f"{stack.place}.down_proj",
                operations=[MergeModulelist(dim=0)],
            )
            continue
        for shard, experts in enumerate(stack.parts.values()):
            numbers = "|".join(rf"{expert}\." for expert in experts)
            for parameter, matrices in MATRICES.items():
                yield WeightConverter(
                    source_patterns=[rf"{place}\.(?={numbers})*.{matrix}\.weight" for matrix in matrices],
                    target_patterns=f"{stack.place}.shards.{shard}.{parameter}",
                    operations=[StackShard(stack.starts)],
                )
        if also_fused:
            for parameter in MATRICES:
                yield WeightConverter(
                    source_patterns=rf"{place}\.{parameter}",
                    # An escaped dot keeps the patterns apart from those above when they are reversed.
                    target_patterns=[
                        rf"{stack.place}.shards.{shard}\.{parameter}" for shard in range(len(stack.sizes))
                    ],
                    operations=[Split(dim=0)],
                    force_cpu=True,  # else the whole stack would lie on the device of the first shard for a while
                )


class StackShard(ConversionOps):
    """Stacks the experts of one shard. Its reverse takes shards apart again, with the numbers of their experts."""

    def __init__(self, starts: tuple[int, ...], inverse: bool = False):
        self.starts = starts
        self.inverse = inverse

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        if not self.inverse:
            stacks = [torch.stack(input_dict.pop(pattern)) for pattern in source_patterns]
            return {target_patterns[0]: torch.cat(stacks, dim=1)}
        # With the full names, since the library finds them only where the stack's first expert is among the shards.
        before, _, after = full_layer_name.partition(target_patterns[0])
        experts = {}
        for pattern, tensors in input_dict.items():
            found = re.search(r"\.shards\.(\d+)\.", pattern)
            assert found is not None
            stack = tensors[0] if isinstance(tensors, list) else tensors
            for target, matrices in zip(target_patterns, stack.chunk(len(target_patterns), dim=1), strict=True):
                for number, matrix in enumerate(matrices.contiguous(), self.starts[int(found[1])]):
                    experts[before + target.replace("*", str(number)) + after] = matrix
        return experts

    @property
    def reverse_op(self) -> StackShard:
        return StackShard(self.starts, not self.inverse)


# ------------------------------------------------------------------------------------------------ without the library


@torch.no_grad()
def convert_from_disk(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """
    Brings a state as it lies on disk into the model's own form, as `Trainer` needs to resume and to go back to the best
    model: experts, stored one by one, are written into their stacks, and what else has another name on disk (some
    vision towers) is renamed.

    Args:
        model (`PreTrainedModel`):
            The model that the state is meant for.
        state_dict (`Mapping[str, torch.Tensor]`):
            Tensors of a checkpoint, or of one of its shards.

    Returns:
        `Mapping[str, torch.Tensor]`: what `load_state_dict` takes. A stack that got only some of its experts is left
        out; those are in place all the same.

    Raises:
        ValueError: If the state has an expert that the model does not have, or one of another shape; the message names
            the keys, and the model stays as it was.
    """
    own = model.state_dict()
    if all(name in own for name in state_dict) or any(tensor.is_meta for tensor in own.values()):
        return state_dict
    found = model.library_conversions(get_model_conversion_mapping(model))
    of_library = [step for step in found if isinstance(step, WeightRenaming)]
    renamings = [*of_library, *_own_renamings(model)]
    stacks = expert_stacks(model)
    names = {stack.name for stack in stacks}
    places = _places_of_experts(stacks, own)
    converted, experts, surplus, odd = {}, {}, [], []
    for key, tensor in state_dict.items():
        name = key
        if name not in own and name not in places:
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
        split = _split(name)
        if name in places:
            shape = tuple(places[name][1].shape)
            odd += [f"{key} of shape {tuple(tensor.shape)} instead of {shape}"] if tensor.shape != shape else []
            experts[name] = tensor
        elif split is not None and split[0] in names:
            surplus.append(key)
        else:
            converted[name] = tensor
    if surplus or odd:
        raise ValueError(_message([], sorted(surplus), odd))
    filled: Counter[str] = Counter()
    for name, tensor in experts.items():
        stack, place = places[name]
        place.copy_(tensor)
        filled[stack] += 1
    sizes = Counter(stack for stack, _ in places.values())
    return converted | {stack: own[stack] for stack in filled if filled[stack] == sizes[stack]}


def _places_of_experts(
    stacks: Iterable[ExpertStack], own: Mapping[str, torch.Tensor]
) -> dict[str, tuple[str, torch.Tensor]]:
    """By name on disk, the name of the stacked parameter and the part of it that holds the matrix."""
    places = {}
    for stack in stacks:
        for part, experts in stack.parts.items():
            for parameter, matrices in MATRICES.items():
                for expert, of_expert in zip(experts, own[f"{part}.{parameter}"], strict=True):
                    for matrix, place in zip(matrices, of_expert.chunk(len(matrices)), strict=True):
                        places[f"{stack.name}.{expert}.{matrix}.weight"] = f"{part}.{parameter}", place
    return places


# ------------------------------------------------------------------------------------------------ checks


def check_experts(
    model: PreTrainedModel,
    state_dict: Mapping[str, Any] | None,
    files: Iterable[str] | None,
    renamings: Iterable[WeightRenaming],
    allow_other_sizes: bool = False,
) -> None:
    """
    Checks that the experts which lie one by one in a checkpoint are those of the model, before anything is loaded.

    Args:
        model (`PreTrainedModel`):
            The model that is loaded.
        state_dict (`Mapping[str, Any]`, *optional*):
            The checkpoint's tensors, where they are in memory.
        files (`Iterable[str]`, *optional*):
            The checkpoint's files, where they are not.
        renamings (`Iterable[WeightRenaming]`):
            How names on disk become the model's.
        allow_other_sizes (`bool`, defaults to `False`):
            Whether a checkpoint with another number of experts is fine (`ignore_mismatched_sizes`).

    Raises:
        ValueError: If an expert of a stack is missing, one too many is there, or its shape is not that of the others;
            the message names the keys. Stacks that the checkpoint has nothing of are left to the library.
    """
    shapes = _shapes(state_dict, files or [])
    stacks = {stack.name: stack for stack in expert_stacks(model)}
    found: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}  # by stack and the model's own name of a matrix
    for key, shape in shapes.items():
        name = key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        split = _split(name)
        own = split and _own_name(split[0], stacks, model.base_model_prefix)
        if split and own:
            found.setdefault(own, {})[f"{own}.{split[1]}"] = key, shape
    lacking, surplus, odd = [], [], []
    for name, matrices in found.items():
        stack = stacks[name]
        if allow_other_sizes:
            stack = ExpertStack(name, (len({matrix.removeprefix(f"{name}.").split(".")[0] for matrix in matrices}),))
        expected = {parameter: stack.names_on_disk(parameter) for parameter in MATRICES}
        for names in expected.values():
            missing = [matrix for matrix in names if matrix not in matrices]
            lacking += missing if len(missing) < len(names) else []
        known = {matrix for names in expected.values() for matrix in names}
        surplus += [key for matrix, (key, _) in matrices.items() if matrix not in known]
        for matrix, shape in _shapes_of_matrices(model, stack).items():
            same = {key: found for name, (key, found) in matrices.items() if name.endswith(f".{matrix}.weight")}
            if len(set(same.values())) > 1:  # the library reports what is of another shape throughout
                usual = shape if shape in same.values() else Counter(same.values()).most_common(1)[0][0]
                odd += [f"{key} of shape {found} instead of {usual}" for key, found in same.items() if found != usual]
    if lacking or surplus or odd:
        raise ValueError(_message(lacking, sorted(surplus), odd))


def _shapes_of_matrices(model: nn.Module, stack: ExpertStack) -> dict[str, tuple[int, int]]:
    """By name, the shape of each of the matrices of an expert."""
    part = model.get_submodule(next(iter(stack.parts)))
    shapes = {}
    for parameter, matrices in MATRICES.items():
        _, height, width = part.get_parameter(parameter).shape
        shapes.update(dict.fromkeys(matrices, (height // len(matrices), width)))
    return shapes


def _message(lacking: list[str], surplus: list[str], odd: list[str]) -> str:
    faults = []
    for fault, keys in (("it lacks", lacking), ("has no place for", surplus), ("cannot stack", odd)):
        if keys:
            more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
            subject = "the model " if keys is not lacking else ""
            faults.append(f"{subject}{fault} {', '.join(keys[:6])}{more}")
    return (
        f"the checkpoint's experts are not those of the model: {'; '.join(faults)}. Experts are numbered from 0 "
        "without gaps: compare the number of experts in `config.json` with the files, or save the checkpoint again."
    )


def _shapes(state_dict: Mapping[str, Any] | None, files: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a checkpoint, by name."""
    states = [state_dict] if state_dict is not None else (load_state_dict(path, map_location="meta") for path in files)
    return {key: tuple(tensor.shape) for state in states for key, tensor in state.items()}


def _split(name: str) -> tuple[str, str] | None:
    """The name of a stack and the rest of the name of a matrix that lies one by one on disk."""
    found = re.fullmatch(r"(.+?)\.(\d+\.(?:gate|up|down)_proj\.weight)", name)
    return None if found is None else (found[1], found[2])


def _own_name(stack: str, stacks: Mapping[str, ExpertStack], prefix: str) -> str | None:
    """The model's own name of a stack on disk, which may be one of its base model, or of a model with a head."""
    names = stack, f"{prefix}.{stack}", stack.removeprefix(f"{prefix}.")
    return next((name for name in names if name in stacks), None)


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
