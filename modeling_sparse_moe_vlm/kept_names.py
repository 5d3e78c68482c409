"""The names of this package's tensors in checkpoints, which conversions of a base model must not change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    revert_weight_conversion,
)

# Stands for the part of a name that must not change. No pattern of a renaming matches it, except for `.`.
_HOLE = "\0"


class KeptNames:
    """
    The names of tensors that conversions must not change, each split into a start and an end. Renamings apply only to
    the start, such as `"model.layers.0."`. The end, such as `"mlp.gate.weight"`, never changes.

    Args:
        ends (`Mapping[str, frozenset[str]]`):
            The ends of the names, by start.
    """

    def __init__(self, ends: Mapping[str, frozenset[str]]) -> None:
        self.ends = ends

    def split(self, name: str) -> tuple[str, str] | None:
        """Splits a name into start and end. Returns `None` for names of other tensors."""
        for place in [0, *(place for place, character in enumerate(name, 1) if character == ".")]:
            if name[place:] in self.ends.get(name[:place], ()):
                return name[:place], name[place:]
        return None

    def __deepcopy__(self, memo: Any) -> KeptNames:
        return self  # Transformers copies a conversion for every tensor


class KeepingRenaming(WeightRenaming):
    """
    A renaming of Transformers that renames only the start of some names.

    Args:
        step (`WeightRenaming`):
            The renaming.
        names ([`KeptNames`]):
            The names of which only the start is renamed.
    """

    def __init__(self, step: WeightRenaming, names: KeptNames) -> None:
        super().__init__(list(step._original_source_patterns), list(step._original_target_patterns))
        self.scope_prefix, self.base_model_prefix = step.scope_prefix, step.base_model_prefix
        self.step, self.names = step, names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Renames a tensor: see `WeightTransform.rename_source_key` of Transformers."""
        kept = self.names.split(source_key)
        if kept is None:
            return self.step.rename_source_key(source_key)
        renamed, pattern = self.step.rename_source_key(kept[0] + _HOLE)
        return renamed.replace(_HOLE, kept[1]), pattern

    def was_used(self) -> bool:
        """Returns whether the renaming matched a name."""
        return self.step.was_used()

    def reverse_transform(self) -> KeepingRenaming:
        """Returns the reverse renaming."""
        return KeepingRenaming(self.step.reverse_transform(), self.names)


class KeepingConverter(WeightConverter):
    """
    A converter of Transformers that does not convert some tensors.

    Args:
        step (`WeightConverter`):
            The converter.
        names ([`KeptNames`]):
            Names of the tensors that are not converted.
    """

    def __init__(self, step: WeightConverter, names: KeptNames) -> None:
        sources, targets = list(step._original_source_patterns), list(step._original_target_patterns)
        super().__init__(sources, targets, step.operations, force_cpu=step.force_cpu)
        self.scope_prefix, self.base_model_prefix = step.scope_prefix, step.base_model_prefix
        self.step, self.names = step, names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Renames a tensor: see `WeightTransform.rename_source_key` of Transformers."""
        return (source_key, None) if self.names.split(source_key) else super().rename_source_key(source_key)

    def reverse_transform(self) -> KeepingConverter:
        """Returns the reverse converter."""
        return KeepingConverter(self.step.reverse_transform(), self.names)


def keep_names(
    steps: Iterable[WeightTransform], ends: Mapping[str, frozenset[str]], model_prefix: str
) -> list[WeightTransform]:
    """
    Returns conversions of Transformers that leave the names of some tensors unchanged, in loading and in saving.

    Args:
        steps (`Iterable[WeightTransform]`):
            The conversions, in the direction of loading.
        ends (`Mapping[str, frozenset[str]]`):
            Ends of the model's names of these tensors, by start: see [`KeptNames`].
        model_prefix (`str`):
            `base_model_prefix` of the model. A checkpoint can be that of a model with or without it.

    Returns:
        `list[WeightTransform]`: The conversions. Renamings still apply to the start of the names, so that prefixes are
        the same as those of other tensors.
    """
    steps = list(steps)
    prefix = f"{model_prefix}." if model_prefix else ""
    every: dict[str, frozenset[str]] = {}
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    reverse = [step.reverse_transform() for step in reversed(renamings)]
    for start, of_start in ends.items():
        forms = {start, start.removeprefix(prefix), prefix + start}
        for renaming in (*reverse, *(step.reverse_transform() for step in reversed(reverse))):
            forms |= {renaming.rename_source_key(form + _HOLE)[0].partition(_HOLE)[0] for form in forms}
        for form in forms:
            every[form] = every.get(form, frozenset()) | of_start
    names = KeptNames(every)
    kept: list[WeightTransform] = []
    for step in steps:
        if isinstance(step, PrefixChange):  # changes only the start, and Transformers must recognise it
            kept.append(step)
            continue
        kinds: Any = KeepingRenaming if isinstance(step, WeightRenaming) else KeepingConverter
        kept.append(kinds(step, names))
    return kept


def signature(step: WeightTransform) -> tuple:
    """Returns the properties that identify a weight conversion."""
    patterns = (tuple(step.source_patterns), tuple(step.target_patterns))
    return type(step).__name__, *patterns, getattr(step, "scope_prefix", None)


def check_names_on_disk(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """
    Checks that no two tensors of a model would be saved under the same name. Transformers would overwrite one of them.

    Args:
        model (`PreTrainedModel`):
            The model.
        state_dict (`Mapping[str, Any]`):
            The tensors to save, by their names in the model.

    Raises:
        ValueError: If two tensors have the same name in the checkpoint. The message names all three.
    """
    conversions: Any = model._weight_conversions
    steps = [step.reverse_transform() for step in conversions[::-1]]
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    converted: dict[str, list[str]] = {}
    on_disk: list[tuple[str, str]] = []
    for name in state_dict:
        renamed, pattern = name, None
        for converter in converters:
            renamed, pattern = converter.rename_source_key(name)
            if pattern is not None:
                converted.setdefault(renamed, []).append(name)
                break
        if pattern is None:
            for renaming in renamings:
                renamed, _ = renaming.rename_source_key(renamed)
            on_disk.append((renamed, name))
    for names in converted.values():
        # Only names are needed. Placeholders on the meta device need no memory.
        tensors = {name: torch.empty_like(state_dict[name], device="meta") for name in names}
        on_disk += [(name, names[0]) for name in revert_weight_conversion(model, tensors)]
    sources: dict[str, str] = {}
    for saved, name in on_disk:
        other = sources.setdefault(saved, name)
        if other != name:
            raise ValueError(
                f"{other!r} and {name!r} would both be saved under the name {saved!r}, and one of them would be lost. "
                "Rename one of the modules, or save with `save_original_format=False`."
            )
