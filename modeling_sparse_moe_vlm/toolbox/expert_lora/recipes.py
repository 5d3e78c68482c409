"""Recipes for fine-tuning with LoRA on experts, as YAML files."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from peft import LoraConfig

from ..training.recipes import data_arguments, read_recipe, training_arguments
from .selection import expert_lora_config

# Arguments that a recipe cannot set: `expert_lora_config` sets them itself.
SET_BY_SELECTION = {"target_modules", "target_parameters", "modules_to_save", "model", "options"}


@dataclass
class LoraRecipe:
    """
    A recipe for fine-tuning with LoRA.

    Args:
        model (`str`):
            Trained model to start from: folder of a checkpoint, or name on the Hub.
        lora (`dict`):
            Arguments of [`~toolbox.expert_lora.expert_lora_config`].
        data (`dict`):
            Arguments of [`~toolbox.demo.load_scenes`]. `held_out_style` is the drawing style to learn.
        training (`dict`):
            Arguments of [`~transformers.TrainingArguments`], as in [`~toolbox.training.recipes.Recipe`].
    """

    model: str
    lora: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def load_lora_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoraRecipe:
    """
    Reads a recipe and changes some of its values, as [`~toolbox.training.recipes.load_recipe`] does.

    Args:
        path (`str` or `Path`):
            Path to the YAML file.
        overrides (`Sequence[str]`, *optional*):
            Values to change, such as `"lora.r=16"`.

    Returns:
        [`LoraRecipe`]: The recipe.

    Raises:
        ValueError: As [`~toolbox.training.recipes.load_recipe`] does.
        OSError: If the file cannot be read.
    """
    sections = {"lora": lora_arguments(), "data": data_arguments(), "training": training_arguments()}
    return LoraRecipe(**read_recipe(path, overrides, sections))


def lora_arguments() -> dict[str, Any]:
    """Returns the keys that the section `lora` of a recipe can have, with their types."""
    # PEFT declares `lora_alpha` as an integer, but it takes any number.
    types = get_type_hints(LoraConfig) | get_type_hints(expert_lora_config) | {"lora_alpha": float}
    known = [*inspect.signature(expert_lora_config).parameters, *(entry.name for entry in fields(LoraConfig))]
    return {name: types[name] for name in known if name not in SET_BY_SELECTION}
