"""Recipes for fine-tuning with LoRA on experts, as YAML files."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from peft import LoraConfig

from ..training.model_parts import PARTS
from ..training.own_evaluation import EVALUATION_ARGUMENTS
from ..training.recipes import check_stages, check_values, dump_recipe, keys_of_data, read_recipe, training_arguments
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
            With the key `train`, own data, as in [`~toolbox.training.recipes.Recipe`]. Otherwise, arguments of
            [`~toolbox.demo.load_scenes`], of which `held_out_style` is the drawing style to learn.
        training (`dict`):
            Arguments of [`~transformers.TrainingArguments`], as in [`~toolbox.training.recipes.Recipe`].
        parts (`dict`):
            Parts of the adapted model to freeze, or their learning rates, as in [`~toolbox.training.train_parts`].
        stages (`list[dict]`):
            Stages, which train the same adapters one after the other, as in [`~toolbox.training.recipes.Recipe`].
        task (`str`, *optional*):
            Task of own data, as in [`~toolbox.training.recipes.Recipe`].
        evaluation (`dict`):
            How own data are evaluated, as in [`~toolbox.training.recipes.Recipe`].
    """

    model: str
    lora: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    task: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)

    def to_yaml(self) -> str:
        """Returns the recipe as YAML that [`load_lora_recipe`] reads."""
        return dump_recipe(self, optional=("parts", "stages", "task", "evaluation"))


def load_lora_recipe(
    path: str | Path, overrides: Sequence[str] = (), given: Mapping[str, Any] | None = None
) -> LoraRecipe:
    """
    Reads a recipe and changes some of its values, as [`~toolbox.training.recipes.load_recipe`] does.

    Args:
        path (`str` or `Path`):
            Path to the YAML file.
        overrides (`Sequence[str]`, *optional*):
            Values to change, such as `"lora.r=16"`.
        given (`Mapping[str, Any]`, *optional*):
            Values that replace those of the file, as in [`~toolbox.training.recipes.load_recipe`].

    Returns:
        [`LoraRecipe`]: The recipe.

    Raises:
        ValueError: As [`~toolbox.training.recipes.load_recipe`] does.
        OSError: If the file cannot be read.
    """
    sections: dict[str, Any] = {
        "lora": lora_arguments(),
        "data": keys_of_data,
        "training": training_arguments(),
        "parts": dict.fromkeys(PARTS, Any),
        "evaluation": EVALUATION_ARGUMENTS,
    }
    recipe = LoraRecipe(**read_recipe(path, overrides, sections, ("stages", "task"), given))
    recipe.stages = check_stages(recipe.stages, recipe.data, path)
    check_values(recipe, path)
    return recipe


def lora_arguments() -> dict[str, Any]:
    """Returns the keys that the section `lora` of a recipe can have, with their types."""
    # PEFT declares `lora_alpha` as an integer, but it takes any number.
    types = get_type_hints(LoraConfig) | get_type_hints(expert_lora_config) | {"lora_alpha": float}
    known = [*inspect.signature(expert_lora_config).parameters, *(entry.name for entry in fields(LoraConfig))]
    return {name: types[name] for name in known if name not in SET_BY_SELECTION}
