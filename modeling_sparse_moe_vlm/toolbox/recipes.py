"""Recipes: a training run as a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml


@dataclass
class Recipe:
    """
    What a training run is made of.

    Args:
        model (`str`):
            Model configuration (JSON file) to train from scratch, or a checkpoint to go on from.
        data (`dict`):
            Arguments of [`~toolbox.scenes.load_scenes`].
        training (`dict`):
            Arguments of [`~transformers.TrainingArguments`].
        tokenizer (`dict`):
            Arguments of [`~toolbox.tokenizer.train_tokenizer`], for a model from scratch.
    """

    model: str
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """
    Reads a recipe and changes some of its values.

    Args:
        path (`str` or `Path`):
            The YAML file.
        overrides (`Sequence[str]`):
            Values to change, as `"training.max_steps=10"`; the right-hand side is YAML.

    Returns:
        [`Recipe`]

    Raises:
        ValueError: If the file or an override has a key that recipes do not have, or an override no value; the message
            names it.
    """
    content = yaml.safe_load(Path(path).read_text())
    if not isinstance(content, dict):
        raise ValueError(f"the recipe {path} must be a mapping with the key `model`.")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"override {override!r} has no value: write it as `section.key=value`.")
        *sections, last = key.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ValueError(f"override {override!r}: {section!r} is a value, not a section.")
        place[last] = yaml.safe_load(value)
    known = [entry.name for entry in fields(Recipe)]
    unknown = sorted(set(content) - set(known))
    if unknown or "model" not in content:
        raise ValueError(f"the recipe {path} needs the key `model` and knows {known}; it has unknown keys {unknown}.")
    recipe = Recipe(**content)
    # YAML 1.1 reads `1e-3` as a string.
    recipe.training = {key: _number(value) for key, value in recipe.training.items()}
    return recipe


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
