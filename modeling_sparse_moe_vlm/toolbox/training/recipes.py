"""Recipes: a training run as a YAML file."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import TrainingArguments

from ...checks import check
from ..demo.scenes import load_scenes, scenes
from ..demo.tokenizer import check_vocab_size, train_tokenizer
from ..shipped_files import shipped_presets, shipped_root

# What a run decides itself.
SET_BY_RUN = {"output_dir", "remove_unused_columns"}
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
        ValueError: If the file is not YAML; if the file or an override has a key that recipes do not have; if a value
            that must be a number is not one; if an override has no value; or if the tokenizer cannot have its
            `vocab_size`. The message names the file and the key.
    """
    sections = {"data": data_arguments(), "training": training_arguments(), "tokenizer": tokenizer_arguments()}
    recipe = Recipe(**read_recipe(path, overrides, sections))
    # Now, since the data are made first, which may take minutes.
    if "vocab_size" in recipe.tokenizer:
        check_vocab_size(recipe.tokenizer["vocab_size"])
    return recipe


def read_recipe(
    path: str | Path, overrides: Sequence[str], sections: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """
    Reads a recipe of any kind, as [`load_recipe`] does.

    Args:
        path (`str` or `Path`):
            The YAML file.
        overrides (`Sequence[str]`):
            Values to change.
        sections (`Mapping[str, Mapping[str, Any]]`):
            By section, the keys that it may have, with the type of each value.

    Returns:
        `dict[str, Any]`: the sections, empty ones included, and `model`.

    Raises:
        ValueError: As [`load_recipe`] does.
        OSError: If the file cannot be read.
    """
    content = _read_yaml(Path(path).read_bytes(), f"the recipe {path}")
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
    for section, types in sections.items():
        if content.get(section) is None:
            content[section] = {}
        values = content[section]
        check(isinstance(values, dict), f"`{section}` of the recipe {path} must be a mapping, got {values!r}.")
        unknown = [key for key in values if key not in types]
        check(
            not unknown,
            f"`{section}` of the recipe {path} has keys {unknown}, which a recipe cannot set: correct or remove them.",
        )
        content[section] = {
            key: _of_type(value, types[key], f"`{section}.{key}`", f"in the recipe {path}")
            for key, value in values.items()
        }
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
        raise FileNotFoundError(
            f"there is no model {' or '.join(map(str, places))}: name a configuration file, a checkpoint's folder, "
            f"a model on the Hub, or one of {', '.join(presets)}."
        )
    return model


def data_arguments() -> dict[str, Any]:
    """What the section `data` of a recipe may have, with the types."""
    types = get_type_hints(load_scenes) | get_type_hints(scenes)
    return _without(types, {"kwargs", "return", "split", "num_examples"})


def tokenizer_arguments() -> dict[str, Any]:
    """What the section `tokenizer` of a recipe may have, with the types."""
    return _without(get_type_hints(train_tokenizer), {"return", "texts"})


def training_arguments() -> dict[str, Any]:
    """What the section `training` of a recipe may have, with the types."""
    types = get_type_hints(TrainingArguments)
    return _without({entry.name: types[entry.name] for entry in fields(TrainingArguments) if entry.init}, SET_BY_RUN)


def _without(types: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: of for name, of in types.items() if name not in names}


def _read_yaml(text: bytes | str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} is not YAML: {error}") from error


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
    content[last] = _read_yaml(value, f"the value of override {override!r}")


def _of_type(value: Any, hint: Any, name: str, where: str) -> Any:
    """
    The value of a key that takes a number, or true or false. A number such as `1e-3` is a string to YAML 1.1. Values of
    other types are left to what they are arguments of.
    """
    types = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
    given = value
    if isinstance(value, str) and types & {int, float} and str not in types:
        value = float(value) if re.fullmatch(NUMBER_WITH_EXPONENT, value) else value
    if not types <= {int, float, bool, NoneType} or (value is None and NoneType in types):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if float in types:
        check(is_number, f"{name} must be a number, got {given} ({where}).")
    elif int in types:
        is_whole = is_number and (isinstance(value, int) or value.is_integer())
        check(is_whole, f"{name} must be a whole number, got {given} ({where}).")
        value = int(value)
    else:
        check(value in (True, False), f"{name} must be true or false, got {given} ({where}).")
    return value
