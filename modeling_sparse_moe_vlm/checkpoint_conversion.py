"""The format of experts in checkpoints, in memory and in shards, and the conversion between these formats.

Each model passes its own conversions to Transformers; nothing is registered globally. The conversions are derived from
[`ExpertStack`]. So is [`convert_from_disk`], for state dicts that are loaded without the conversions of Transformers.
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

from .checks import check
from .expert_shards import SparseMoeVlmExpertShards
from .experts import SparseMoeVlmExpertGroups, SparseMoeVlmSparseMoeBlock, SparseMoeVlmUnfusedExperts
from .experts_config import experts_config_of

# The matrices of an expert that are concatenated in each stacked parameter.
MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class ExpertStack:
    """
    The routed experts of one group in a layer or expert pool, and the names of their tensors::

        in checkpoints                         <name>.<expert>.gate_proj.weight, .up_proj.weight, .down_proj.weight
        in memory (or in fused checkpoints)    <name>.gate_up_proj, <name>.down_proj
        in memory, with shards                 <name>.shards.<shard>.gate_up_proj, .down_proj

    Experts are numbered across the shards.

    Args:
        name (`str`):
            Name of the module: `"…layers.0.mlp.experts"`, `"…layers.0.mlp.experts.image"`, `"…expert_pools.0"`, ….
        sizes (`tuple[int, ...]`):
            Number of experts of each shard. A single number if there are no shards.
    """

    name: str
    sizes: tuple[int, ...]

    @property
    def is_sharded(self) -> bool:
        """Whether the experts are split into shards."""
        return len(self.sizes) > 1

    @property
    def starts(self) -> tuple[int, ...]:
        """Number of the first expert of each shard."""
        return tuple(accumulate(self.sizes, initial=0))[:-1]

    @property
    def parts(self) -> dict[str, range]:
        """The numbers of the experts in each module of the stack, by the name of the module."""
        names = [f"{self.name}.shards.{shard}" for shard in range(len(self.sizes))] if self.is_sharded else [self.name]
        return {
            name: range(start, start + size) for name, start, size in zip(names, self.starts, self.sizes, strict=True)
        }

    @property
    def place(self) -> str:
        """The name within the layer or decoder. Stacks with the same place have the same experts and shards."""
        return _place(self.name)

    def names_on_disk(self, parameter: str) -> list[str]:
        """Returns the names of the matrices of a stacked parameter in checkpoints."""
        experts = range(sum(self.sizes))
        return [f"{self.name}.{expert}.{matrix}.weight" for expert in experts for matrix in MATRICES[parameter]]


def _place(name: str) -> str:
    """Returns the name of a block, a stack or a pool within its layer or decoder."""
    # The part after the number of the layer. A number can also belong to the block (`layers.0.ffn.1.experts`).
    layer = r"(?!expert_pools\.)\w+\.\d+\.(?!experts(?:\.|$))"
    return re.split(rf"(?<![^.])(?:{layer}|(?=expert_pools\.))", name)[-1]


def expert_stacks(model: nn.Module) -> list[ExpertStack]:
    """Returns the stacks of routed experts of a model, in the order of its modules."""
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
                # Expert parallelism changes `num_experts`, so the shape of the parameter is used. Experts with adapters
                # have another structure and are skipped.
                parameter = stack._parameters.get("gate_up_proj")
                if isinstance(stack, SparseMoeVlmExpertShards):
                    sizes = stack.sizes
                elif parameter is not None:
                    sizes = (parameter.shape[0],)
                else:
                    continue
                stacks.append(ExpertStack(f"{name}.{place}{group}".removeprefix("."), sizes))
    return stacks


def own_names(model: nn.Module) -> dict[str, frozenset[str]]:
    """
    Returns the names of all tensors of the sparse blocks and expert pools, and of experts of the base model that are
    saved in the format of this package, in memory and in checkpoints. Each name is split into the name of the layer or
    decoder and the name within it.

    Args:
        model (`nn.Module`):
            The model.

    Returns:
        `dict[str, frozenset[str]]`: The names within the layer or decoder (`"mlp.experts.0.up_proj.weight"`), by the
        name of the layer or decoder (`"model.layers.0."`, with the dot).
    """
    names: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SparseMoeVlmSparseMoeBlock):
            place = _place(name)
        elif name.rpartition(".")[2] == "expert_pools":
            place = "expert_pools"
        else:
            continue
        tensors = names.setdefault(name.removesuffix(place), set())
        tensors |= {f"{place}.{tensor}" for tensor in module.state_dict()}
    stacks = expert_stacks(model)
    # The conversions of a stack also apply to experts of the base model with the same place in other layers.
    for place in {stack.place for stack in stacks}:
        for name, experts_of_base in model.named_parameters():
            if name.endswith(f".{place}.gate_up_proj") and name.removesuffix(f"{place}.gate_up_proj") not in names:
                stacks.append(ExpertStack(name.removesuffix(".gate_up_proj"), (experts_of_base.shape[0],)))
    for stack in stacks:
        tensors = names.setdefault(stack.name.removesuffix(stack.place), set())
        # Up to 5.20, Transformers applies renamings to names that have a star instead of the number of the expert.
        experts = ["*", *range(sum(stack.sizes))]
        for parameter, matrices in MATRICES.items():
            tensors.add(f"{stack.place}.{parameter}")
            tensors |= {f"{stack.place}.{expert}.{matrix}.weight" for expert in experts for matrix in matrices}
    return {start: frozenset(tensors) for start, tensors in names.items()}


# ------------------------------------------------------------------------------------------------ with Transformers


def loading_conversions(
    model: PreTrainedModel, of_library: Iterable[WeightTransform], quantizer: Any = None
) -> list[WeightTransform]:
    """
    Returns the conversions for loading a checkpoint of a model.

    Args:
        model (`PreTrainedModel`):
            The model that is loaded.
        of_library (`Iterable[WeightTransform]`):
            Conversions of Transformers, such as those of the names of a vision tower, and renamings from the user.
        quantizer (`HfQuantizer`, *optional*):
            Quantiser of the model, which can add conversions to load scales together with the weights.

    Returns:
        `list[WeightTransform]`: All renamings, then the conversions of experts, then the other conversions of
        Transformers.
    """
    of_library = list(of_library)
    renamings = [step for step in of_library if isinstance(step, WeightRenaming)]
    converters: list[WeightTransform] = list(_converters(model, also_fused=True))
    others = [step for step in _of_other_tensors(of_library, converters) if not isinstance(step, WeightRenaming)]
    if quantizer is not None:
        # The quantiser appends general conversions, which are already among those of Transformers. Up to 5.20, it does
        # not accept the model.
        takes_model = "model" in inspect.signature(quantizer.update_weight_conversions).parameters
        converters = quantizer.update_weight_conversions(converters, *[model] * takes_model)
        converters = converters[: len(converters) - len(quantizer.get_weight_conversions())]
    return [*renamings, *_own_renamings(model), *converters, *others]


def saving_conversions(model: PreTrainedModel) -> list[WeightTransform]:
    """
    Returns the conversions for saving a model that was not loaded from a checkpoint.

    Args:
        model (`PreTrainedModel`):
            The model.

    Returns:
        `list[WeightTransform]`: The conversions, in the direction of loading. Transformers reverses them.
    """
    of_library = model.library_conversions()
    # A prefix is only added back if it was removed while loading.
    of_library = [step for step in of_library if not isinstance(step, PrefixChange)]
    converters = list(_converters(model, also_fused=False))
    # Transformers applies them in reverse order, and uses the first one that matches.
    return [*_of_other_tensors(of_library, converters), *converters]


def _of_other_tensors(
    of_library: Iterable[WeightTransform], converters: Iterable[WeightTransform]
) -> list[WeightTransform]:
    """
    Returns the conversions of Transformers except for those with the same target as a conversion of this package. They
    exist if the base model also has experts in other layers, which are then saved in the format of this package. When
    saving, Transformers treats two conversions with the same target as one.
    """
    targets = {target for step in converters for target in step.target_patterns}
    return [
        step
        for step in of_library
        if not (isinstance(step, WeightConverter) and targets.intersection(step.target_patterns))
    ]


def _own_renamings(model: PreTrainedModel) -> list[WeightRenaming]:
    """Returns the renamings that models of this package need in addition to those of Transformers."""
    if experts_config_of(model.config) is not model.config:
        return []
    # A decoder can also be loaded from a checkpoint of the whole model.
    return [PrefixChange(prefix_to_remove="language_model", model_prefix="model")]


def _converters(model: nn.Module, also_fused: bool) -> Iterator[WeightConverter]:
    """
    Yields the conversions that stack the separate experts of a checkpoint. With `also_fused`, conversions that split
    the fused experts of a checkpoint into shards are included.
    """
    for stack in {stack.place: stack for stack in expert_stacks(model)}.values():
        place = re.escape(stack.place)
        # Transformers removes the lookahead from the pattern when it reverses the conversion.
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
                    # The escaped dot distinguishes the patterns from those above when they are reversed.
                    target_patterns=[
                        rf"{stack.place}.shards.{shard}\.{parameter}" for shard in range(len(stack.sizes))
                    ],
                    operations=[Split(dim=0)],
                    force_cpu=True,  # otherwise, the device of the first shard would temporarily hold all experts
                )


class StackShard(ConversionOps):
    """
    Conversion that stacks the experts of one shard. The reverse conversion splits shards into experts with their
    numbers.

    Args:
        starts (`tuple[int, ...]`):
            Number of the first expert of each shard.
        inverse (`bool`, *optional*, defaults to `False`):
            Whether this is the reverse conversion.
    """

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
        """Converts tensors: see `ConversionOps.convert` of Transformers."""
        if not self.inverse:
            stacks = [torch.stack(input_dict.pop(pattern)) for pattern in source_patterns]
            return {target_patterns[0]: torch.cat(stacks, dim=1)}
        # The full names are returned, because Transformers only completes them if a shard contains the first expert.
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
        """The reverse conversion."""
        return StackShard(self.starts, not self.inverse)


# ------------------------------------------------------------------------------------------------ without Transformers


@torch.no_grad()
def convert_from_disk(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """
    Converts a state dict from the format of checkpoints to the format of the model. `Trainer` needs this to resume from
    a checkpoint and to load the best model. Separate experts are copied into the stacked parameters of the model, and
    tensors with other names in checkpoints (of some vision towers) are renamed.

    Args:
        model (`PreTrainedModel`):
            The model into which the state dict is loaded.
        state_dict (`Mapping[str, torch.Tensor]`):
            Tensors of a checkpoint or of one of its files.

    Returns:
        `Mapping[str, torch.Tensor]`: The state dict for `load_state_dict`. Stacked parameters of which the state dict
        contains only some experts are left out, because these experts are already copied.

    Raises:
        ValueError: If the state dict contains an expert that the model does not have, or an expert with another shape.
            The message names the keys, and the model is not changed.
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
    """
    Returns the place of every expert matrix, by its name in checkpoints: the name of the stacked parameter, and the
    view of it that contains the matrix.
    """
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
    Checks that the separate experts of a checkpoint match the experts of the model, before the weights are loaded.

    Args:
        model (`PreTrainedModel`):
            The model that is loaded.
        state_dict (`Mapping[str, Any]`, *optional*):
            Tensors of the checkpoint, if they are in memory.
        files (`Iterable[str]`, *optional*):
            Files of the checkpoint, if the tensors are not in memory.
        renamings (`Iterable[WeightRenaming]`):
            Renamings from names in the checkpoint to names of the model.
        allow_other_sizes (`bool`, *optional*, defaults to `False`):
            Whether a checkpoint with another number of experts is allowed (`ignore_mismatched_sizes`).

    Raises:
        ValueError: If an expert of a stack is missing, if there are more experts than in the model, or if the shape of
            an expert differs from that of the others. The message names the keys. Stacks without any expert in the
            checkpoint are not checked; Transformers reports them as missing.
    """
    shapes = _shapes(state_dict, files or [])
    stacks = {stack.name: stack for stack in expert_stacks(model)}
    found: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}  # by stack and by the model's name of a matrix
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
            if len(set(same.values())) > 1:  # if all experts have a wrong shape, Transformers reports it
                usual = shape if shape in same.values() else Counter(same.values()).most_common(1)[0][0]
                odd += [f"{key} of shape {found} instead of {usual}" for key, found in same.items() if found != usual]
    if lacking or surplus or odd:
        raise ValueError(_message(lacking, sorted(surplus), odd))


def _shapes_of_matrices(model: nn.Module, stack: ExpertStack) -> dict[str, tuple[int, int]]:
    """Returns the shapes of the matrices of an expert, by name."""
    part = model.get_submodule(next(iter(stack.parts)))
    shapes = {}
    for parameter, matrices in MATRICES.items():
        _, height, width = part.get_parameter(parameter).shape
        shapes.update(dict.fromkeys(matrices, (height // len(matrices), width)))
    return shapes


def _message(lacking: list[str], surplus: list[str], odd: list[str]) -> str:
    """Returns the error message for missing experts, additional experts and experts of another shape."""
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
    """Returns the shapes of the tensors of a checkpoint, by name."""
    states = [state_dict] if state_dict is not None else (load_state_dict(path, map_location="meta") for path in files)
    return {key: tuple(tensor.shape) for state in states for key, tensor in state.items()}


def _split(name: str) -> tuple[str, str] | None:
    """Splits the name of a matrix of a separate expert into the name of the stack and the rest."""
    found = re.fullmatch(r"(.+?)\.(\d+\.(?:gate|up|down)_proj\.weight)", name)
    return None if found is None else (found[1], found[2])


def _own_name(stack: str, stacks: Mapping[str, ExpertStack], prefix: str) -> str | None:
    """Returns the model's name of a stack in a checkpoint, which can be that of a base model or a model with a head."""
    names = stack, f"{prefix}.{stack}", stack.removeprefix(f"{prefix}.")
    return next((name for name in names if name in stacks), None)


def check_unfused_experts(model: nn.Module, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """
    Checks that a checkpoint contained the experts of a model with `unfused_experts`, after the weights were loaded.

    Args:
        model (`PreTrainedModel`):
            The model that was loaded.
        missing (`Iterable[str]`):
            Names of the tensors that the checkpoint lacks.
        unexpected (`Iterable[str]`):
            Names of the tensors of the checkpoint that the model does not have.

    Raises:
        ValueError: If the experts of the checkpoint are stacked, if an expert is missing, or if there are more experts
            than in the model. The message names the keys. Modules without any expert in the checkpoint are not checked;
            Transformers reports them as missing.
    """
    missing, unexpected = set(missing), sorted(unexpected)
    lacking, surplus = [], []
    for name, module in model.named_modules():
        if not isinstance(module, SparseMoeVlmUnfusedExperts):
            continue
        stacked = [key for key in unexpected if key.endswith(tuple(f"{name}.{matrix}" for matrix in MATRICES))]
        check(
            not stacked,
            f"{stacked[:1]} is a stack of experts, which cannot be loaded with `unfused_experts=True`: load the "
            "checkpoint without it and save it again.",
        )
        names = {f"{name}.{key}" for key in module.state_dict() if key.endswith("_proj.weight")}
        if not names <= missing:
            lacking += sorted(names & missing)
        surplus += [key for key in unexpected if (split := _split(key)) is not None and split[0] == name]
    if lacking or surplus:
        raise ValueError(_message(lacking, surplus, []))


def check_device_map(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    """
    Checks that a device map matches the model.

    Args:
        model (`nn.Module`):
            The model.
        device_map (`Mapping[str, Any]`):
            Devices by the name of a module or parameter.

    Raises:
        ValueError: If the device map contains an unknown name or does not cover a tensor. The message names it.
    """
    tensors = list(model.state_dict())
    names = {"", *tensors, *(name for name, _ in (*model.named_modules(), *model.named_buffers()))}
    for name in device_map:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0)
            raise ValueError(
                f"`device_map` names {name!r}, which {type(model).__name__} does not have: did you mean {close[0]!r}? "
                "(`model.named_modules()` lists all names.)"
            )
    starts = tuple(f"{name}." for name in device_map)
    left_out = [] if "" in device_map else [name for name in tensors if not f"{name}.".startswith(starts)]
    if left_out:
        raise ValueError(
            f"`device_map` has no device for {left_out[0]!r} and {len(left_out) - 1} more tensors of "
            f"{type(model).__name__}: add them, or a module that contains them."
        )
