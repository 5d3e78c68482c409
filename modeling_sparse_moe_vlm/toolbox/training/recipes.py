"""Recipes: training runs defined in YAML files."""

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
from .model_parts import PARTS
from .parts import check_parts

# Arguments that a run sets itself.
SET_BY_RUN = {"output_dir", "remove_unused_columns"}
MANY_KEYS = 12  # more are not listed in error messages
NUMBER_WITH_EXPONENT = r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"


@dataclass
class Recipe:
    """
    The definition of a training run.

    Args:
        model (`str`):
            Model configuration (JSON file) to train from scratch, or a checkpoint to continue from.
        data (`dict`):
            Arguments of [`~toolbox.demo.load_scenes`].
        training (`dict`):
            Arguments of [`~transformers.TrainingArguments`], except `output_dir` and `remove_unused_columns`.
        tokenizer (`dict`):
            Arguments of [`~toolbox.demo.train_tokenizer`], for a model from scratch.
        parts (`dict`):
            Parts of the model to freeze, or their learning rates, as in [`~toolbox.training.train_parts`].
    """

    model: str
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)

    def to_yaml(self) -> str:
        """Returns the recipe as YAML that [`load_recipe`] reads."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """
    Reads a recipe, and overrides some of its values.

    Args:
        path (`str` or `Path`):
            The YAML file.
        overrides (`Sequence[str]`):
            Values to override, such as `"training.max_steps=10"`. The right-hand side is YAML.

    Returns:
        [`Recipe`]: The recipe.

    Raises:
        ValueError: If the file is not YAML, if the file or an override has an unknown key, if a value has the wrong
            type, if an override has no value, if a value of `parts` is invalid, or if the tokenizer cannot have this
            `vocab_size`. The message names the file and the key.
        OSError: If the file cannot be read.
    """
    sections = {
        "data": data_arguments(),
        "training": training_arguments(),
        "tokenizer": tokenizer_arguments(),
        "parts": dict.fromkeys(PARTS, Any),
    }
    recipe = Recipe(**read_recipe(path, overrides, sections))
    try:
        recipe.parts = check_parts(recipe.parts)
    except ValueError as error:
        raise ValueError(f"{error} (in the recipe {path})") from error
    # Check this now: the run generates the data first, which may take minutes.
    if "vocab_size" in recipe.tokenizer:
        check_vocab_size(recipe.tokenizer["vocab_size"])
    return recipe


def read_recipe(
    path: str | Path, overrides: Sequence[str], sections: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """
    Reads a recipe with any sections, in the same way as [`load_recipe`].

    Args:
        path (`str` or `Path`):
            The YAML file.
        overrides (`Sequence[str]`):
            Values to override.
        sections (`Mapping[str, Mapping[str, Any]]`):
            Keys that each section can have, with the type of each value, by section.

    Returns:
        `dict[str, Any]`: `model` and the sections, including empty ones.

    Raises:
        ValueError: In the same cases as [`load_recipe`], except `vocab_size`.
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
            f"`{section}` of the recipe {path} has keys {unknown}, which a recipe cannot set: correct or remove them."
            + (f" It can have {', '.join(types)}." if len(types) <= MANY_KEYS else ""),
        )
        content[section] = {
            key: _of_type(value, types[key], f"`{section}.{key}`", f"in the recipe {path}")
            for key, value in values.items()
        }
    return content


def find_model(model: str, root: Path | None = None) -> str:
    """
    Finds a model. A path is looked up relative to the current directory, then relative to the root of the repository.
    Otherwise, the short names of the presets are searched. Any other name is one on the Hub.

    Args:
        model (`str`):
            Path to a configuration file or to the folder of a checkpoint, short name of a preset (`"tiny"`), or name on
            the Hub.
        root (`Path`, *optional*):
            Root of the repository. By default, the folder that contains `configuration`.

    Returns:
        `str`: The path, or the name on the Hub.

    Raises:
        FileNotFoundError: If there is no such path, and the name cannot be a name on the Hub.
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
    """Returns the keys that the section `data` of a recipe can have, with their types."""
    types = get_type_hints(load_scenes) | get_type_hints(scenes)
    return _without(types, {"kwargs", "return", "split", "num_examples"})


def tokenizer_arguments() -> dict[str, Any]:
    """Returns the keys that the section `tokenizer` of a recipe can have, with their types."""
    return _without(get_type_hints(train_tokenizer), {"return", "texts"})


def training_arguments() -> dict[str, Any]:
    """Returns the keys that the section `training` of a recipe can have, with their types."""
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
    """Sets one value from an override such as `"section.key=value"`."""
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
    Checks and converts the value of a key whose type is a number or a boolean. (In YAML 1.1, a number such as `1e-3` is
    a string.) Values of other types are returned unchanged; the function that receives them as arguments checks them.
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
