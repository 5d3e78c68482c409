"""Recipes: a training run as a YAML file."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers import TrainingArguments

from ...checks import check
from ..demo.scenes import load_scenes, scenes
from ..demo.tokenizer import train_tokenizer
from ..shipped_files import shipped_presets, shipped_root

# What the scripts decide themselves.
SET_BY_SCRIPT = {"output_dir", "remove_unused_columns"}
NUMBER_WITH_EXPONENT = r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"


@dataclass
class Recipe:
    """
    What a training run is made of.

    Args:
        model (`str`):
            Model configuration (JSON file) to train from scratch, or a checkpoint to go on from.
        data (`dict`):
            Arguments of [`~toolbox.demo.load_scenes`].
        training (`dict`):
            Arguments of [`~transformers.TrainingArguments`], but for `output_dir` and `remove_unused_columns`.
        tokenizer (`dict`):
            Arguments of [`~toolbox.demo.train_tokenizer`], for a model from scratch.
    """

    model: str
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)

    def to_yaml(self) -> str:
        """The recipe as a YAML file that [`load_recipe`] reads."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


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
    tokenizer = {*inspect.signature(train_tokenizer).parameters} - {"texts"}
    sections = {"data": data_arguments(), "training": training_arguments(), "tokenizer": tokenizer}
    return Recipe(**read_recipe(path, overrides, sections))


def read_recipe(path: str | Path, overrides: Sequence[str], sections: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """
    Reads a recipe of any kind, as [`load_recipe`] does.

    Args:
        path (`str` or `Path`):
            The YAML file.
        overrides (`Sequence[str]`):
            Values to change.
        sections (`Mapping[str, Collection[str]]`):
            By section, the keys that it may have.

    Returns:
        `dict[str, Any]`: the sections, empty ones included, and `model`.
    """
    content = yaml.safe_load(Path(path).read_text())
    check(isinstance(content, dict), f"the recipe {path} must be a mapping with the key `model`.")
    for override in overrides:
        _override(content, override)

    known = ["model", *sections]
    unknown = [key for key in content if key not in known]
    check(not unknown, f"the recipe {path} has unknown keys {unknown}; known ones are {known}.")
    check(
        isinstance(content.get("model"), str),
        f"the recipe {path} needs the key `model`, a file or a name, got {content.get('model')!r}.",
    )
    for section, arguments in sections.items():
        if content.get(section) is None:
            content[section] = {}
        values = content[section]
        check(isinstance(values, dict), f"`{section}` of the recipe {path} must be a mapping, got {values!r}.")
        unknown = [key for key in values if key not in arguments]
        check(
            not unknown,
            f"`{section}` of the recipe {path} has keys {unknown}, which a recipe cannot set: correct or remove them.",
        )
    content["training"] = _with_numbers(content["training"])
    return content


def find_model(model: str, root: Path | None = None) -> str:
    """
    Finds a model: relative to the current directory, else to the root of the repository, else among the presets by its
    short name, else on the Hub.

    Args:
        model (`str`):
            Configuration file, folder of a checkpoint, short name of a preset (`"tiny"`), or name on the Hub.
        root (`Path`, *optional*):
            Root of the repository; by default, where the presets are.

    Returns:
        `str`: the path, or the name as it is.

    Raises:
        FileNotFoundError: If there is no such path, and it cannot be a name on the Hub.
    """
    places = list(dict.fromkeys([Path.cwd() / model, (root or shipped_root()) / model]))
    for place in places:
        if place.exists():
            return str(place)
    if model in (presets := shipped_presets("models")):
        return str(presets[model])
    if model.endswith(".json") or model.count("/") > 1:
        raise FileNotFoundError(f"there is no model {' or '.join(map(str, places))}: correct `model` in the recipe.")
    return model


def _override(content: dict[str, Any], override: str) -> None:
    """Sets one value, as `"section.key=value"` says."""
    key, separator, value = override.partition("=")
    check(bool(separator), f"override {override!r} has no value: write it as `section.key=value`.")
    *sections, last = key.split(".")
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        check(isinstance(content, dict), f"override {override!r}: {section!r} is a value, not a section.")
    content[last] = yaml.safe_load(value)


def data_arguments() -> set[str]:
    """What the section `data` of a recipe may have."""
    drawn = {*inspect.signature(load_scenes).parameters, *inspect.signature(scenes).parameters}
    return drawn - {"kwargs", "split", "num_examples"}


def training_arguments() -> set[str]:
    """What the section `training` of a recipe may have."""
    return {entry.name for entry in fields(TrainingArguments) if entry.init} - SET_BY_SCRIPT


def _with_numbers(training: dict[str, Any]) -> dict[str, Any]:
    """Arguments in which `1e-3`, a string to YAML 1.1, is a number where a number is wanted."""
    hints = get_type_hints(TrainingArguments)
    numbers: dict[str, Any] = {}
    for key, value in training.items():
        types = get_args(hints[key]) or (hints[key],)
        if not isinstance(value, str) or str in types or not re.fullmatch(NUMBER_WITH_EXPONENT, value):
            continue
        if float in types:
            numbers[key] = float(value)
        elif int in types:
            check(float(value).is_integer(), f"`training.{key}` must be a whole number, got {value}.")
            numbers[key] = int(float(value))
    return training | numbers
