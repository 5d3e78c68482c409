"""Recipes: training runs defined in YAML files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import TrainingArguments

from ...checks import check
from ..demo.scenes import load_scenes, scenes
from ..demo.tokenizer import check_vocab_size, train_tokenizer
from ..model_names import is_local
from ..shipped_files import shipped_presets, shipped_root
from .model_parts import PARTS
from .own_data import is_own, own_data_arguments
from .own_evaluation import EVALUATION_ARGUMENTS, RETRIEVAL, check_task
from .parts import check_parts
from .processor_options import PROCESSOR_ARGUMENTS

# Arguments that a run sets itself.
SET_BY_RUN = {"output_dir", "remove_unused_columns"}
DTYPES = ("float32", "bfloat16", "float16")
MANY_KEYS = 12  # more are not listed in error messages
NUMBER_WITH_EXPONENT = r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"

# Keys of the section `retrieval`, with their types.
RETRIEVAL_ARGUMENTS = {"pooling": str, "contrastive_loss": str, "matryoshka_dims": list[int] | None}


@dataclass
class Recipe:
    """
    The definition of a training run.

    Args:
        model (`str`):
            Preset or model configuration (JSON file) to train from scratch, or a checkpoint to continue from: a folder,
            or a name on the Hub.
        data (`dict`):
            With the key `train`, own data: the keys of [`~toolbox.training.own_data.own_data_arguments`]. Otherwise,
            arguments of [`~toolbox.demo.load_scenes`], the built-in data.
        training (`dict`):
            Arguments of [`~transformers.TrainingArguments`], except `output_dir` and `remove_unused_columns`.
        tokenizer (`dict`):
            Arguments of [`~toolbox.demo.train_tokenizer`], for a model from scratch.
        config (`dict`):
            Fields of the model configuration that replace those of the file, for a model from scratch: `config_fields`
            of [`~toolbox.training.from_scratch`].
        parts (`dict`):
            Parts of the model to freeze, or their learning rates, as in [`~toolbox.training.train_parts`].
        stages (`list[dict]`):
            Stages of the training, one after the other. Each has a `name`, and can have `training` and `data`, which
            override values of the recipe, and `parts`, which replace those of the recipe.
        dtype (`str`, *optional*):
            Data type of the weights of a checkpoint in training: `"float32"` by default, also if the checkpoint
            has another type, because small updates of 16-bit weights are lost. `training.bf16` computes in 16 bits.
        task (`str`, *optional*):
            Task of own data, which chooses the metrics: one of [`~toolbox.training.own_evaluation.TASKS`].
        evaluation (`dict`):
            How own data are evaluated: `metrics` (names of metrics), `batch_size` and `max_new_tokens` (see
            [`~toolbox.evaluation.evaluate_rows`]), and for evaluations during training `sample` and
            `early_stopping_patience` (see [`~toolbox.training.own_callbacks.callbacks_of`]).
        retrieval (`dict`):
            Fields of the head for `task: retrieval`: `pooling`, `contrastive_loss` and `matryoshka_dims`.
        processor (`dict`):
            How images are cut into tiles (`min_tiles`, `max_tiles`, `max_image_tokens` and `do_pad` of
            [`SparseMoeVlmProcessor`]) and which frames of videos are read (`max_frames` and `video_fps`). By default,
            as in the checkpoint, and the defaults of the class for models from scratch.
    """

    model: str
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    dtype: str | None = None
    task: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    retrieval: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)

    def to_yaml(self) -> str:
        """Returns the recipe as YAML that [`load_recipe`] reads."""
        optional = ("config", "stages", "dtype", "task", "retrieval", "evaluation", "processor")
        return dump_recipe(self, optional=optional)


def dump_recipe(recipe: Any, optional: Collection[str] = ()) -> str:
    """Returns a recipe as YAML, without optional fields that are not set."""
    values = {key: value for key, value in asdict(recipe).items() if value or key not in optional}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), given: Mapping[str, Any] | None = None) -> Recipe:
    """
    Reads a recipe, and overrides some of its values.

    Args:
        path (`str` or `Path`):
            The YAML file.
        overrides (`Sequence[str]`):
            Values to override, such as `"training.max_steps=10"`. The right-hand side is YAML. A value of a stage is
            named by the name or the number (from 0) of the stage, such as `"stages.connector.training.max_steps=10"`.
        given (`Mapping[str, Any]`, *optional*):
            Values that replace those of the file, by key, before `overrides` apply. `data` keeps the keys of the file
            that are for the same kind of data.

    Returns:
        [`Recipe`]: The recipe.

    Raises:
        ValueError: If the file is not YAML, if the file or an override has an unknown key, if a value has the wrong
            type, if an override has no value, if a value of `parts` is invalid, or if the tokenizer cannot have this
            `vocab_size`. The message names the file and the key.
        OSError: If the file cannot be read.
    """
    sections: dict[str, Any] = {
        "data": keys_of_data,
        "training": training_arguments(),
        "tokenizer": tokenizer_arguments(),
        "config": lambda values: dict.fromkeys(values, Any),  # `from_scratch` knows the fields
        "parts": dict.fromkeys(PARTS, Any),
        "evaluation": EVALUATION_ARGUMENTS,
        "retrieval": RETRIEVAL_ARGUMENTS,
        "processor": PROCESSOR_ARGUMENTS,
    }
    recipe = Recipe(**read_recipe(path, overrides, sections, ("stages", "dtype", "task"), given))
    check(
        recipe.dtype in (None, *DTYPES),
        f"`dtype` of the recipe {path} must be one of {', '.join(DTYPES)}, got {recipe.dtype!r}.",
    )
    recipe.stages = check_stages(recipe.stages, recipe.data, path)
    check_values(recipe, path)
    # Check this now: the run generates the data first, which may take minutes.
    if "vocab_size" in recipe.tokenizer:
        check_vocab_size(recipe.tokenizer["vocab_size"])
    return recipe


def check_values(recipe: Any, path: str | Path) -> None:
    """
    Checks `parts` and `task` of a recipe, and converts the values of `parts`.

    Args:
        recipe (`Any`):
            The recipe.
        path (`str` or `Path`):
            The file, for error messages.

    Raises:
        ValueError: If a value is invalid.
    """
    try:
        recipe.parts = check_parts(recipe.parts)
        check_task(recipe.task)
        is_retrieval = recipe.task == RETRIEVAL
        check(
            not is_retrieval or hasattr(recipe, "retrieval"),
            f"`task: {RETRIEVAL}` is only for `sparse-moe-vlm train`.",
        )
        check(
            is_retrieval or not getattr(recipe, "retrieval", None),
            f"the section `retrieval` only has an effect with `task: {RETRIEVAL}`.",
        )
    except ValueError as error:
        raise ValueError(f"{error} (in the recipe {path})") from error


def read_recipe(
    path: str | Path,
    overrides: Sequence[str],
    sections: Mapping[str, Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]]],
    others: Collection[str] = (),
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Reads a recipe with any sections, in the same way as [`load_recipe`].

    Args:
        path (`str` or `Path`):
            The YAML file.
        overrides (`Sequence[str]`):
            Values to override.
        sections (`Mapping[str, Mapping[str, Any]]`):
            Keys that each section can have, with the type of each value, by section. Or a function that returns them
            for the values of the section.
        others (`Collection[str]`, *optional*):
            Further keys, whose values are returned unchanged.
        given (`Mapping[str, Any]`, *optional*):
            Values that replace those of the file.

    Returns:
        `dict[str, Any]`: `model`, the sections, including empty ones, and those of the other keys that are set.

    Raises:
        ValueError: In the same cases as [`load_recipe`], except `vocab_size`.
        OSError: If the file cannot be read.
    """
    content = _read_yaml(Path(path).read_bytes(), f"the recipe {path}")
    check(isinstance(content, dict), f"the recipe {path} must be a mapping with the key `model`.")
    for key, value in (given or {}).items():
        content[key] = _kept_data(content.get("data"), value) | value if key == "data" else value
    for override in overrides:
        _override(content, override)

    known = ["model", *sections, *others]
    unknown = [key for key in content if key not in known]
    check(not unknown, f"the recipe {path} has unknown keys {unknown}; known ones are {known}.")
    check(
        isinstance(content.get("model"), str),
        f"the recipe {path} needs the key `model`, a file or a name, got {content.get('model')!r}.",
    )
    for section, types in sections.items():
        content[section] = read_section(content.get(section), section, types, f"the recipe {path}")
    return {key: value for key, value in content.items() if key not in others or value is not None}


def read_section(
    values: Any,
    section: str,
    types: Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]],
    where: str,
) -> dict[str, Any]:
    """
    Checks the keys of a section of a recipe, and converts its values.

    Args:
        values (`Any`):
            The section as YAML, or `None` if it is empty.
        section (`str`):
            Name of the section.
        types (`Mapping[str, Any]` or `Callable`):
            Keys that the section can have, with the type of each value, or a function that returns them.
        where (`str`):
            Name of the recipe in error messages.

    Returns:
        `dict[str, Any]`: The section.

    Raises:
        ValueError: If it is not a mapping, has an unknown key, or if a value has the wrong type.
    """
    values = {} if values is None else values
    check(isinstance(values, dict), f"`{section}` of {where} must be a mapping, got {values!r}.")
    known = types(values) if callable(types) else types
    unknown = [key for key in values if key not in known]
    check(
        not unknown,
        f"`{section}` of {where} has keys {unknown}, which a recipe cannot set: correct or remove them."
        + (f" It can have {', '.join(known)}." if len(known) <= MANY_KEYS else ""),
    )
    return {key: _of_type(value, known[key], f"`{section}.{key}`", f"in {where}") for key, value in values.items()}


def check_stages(stages: Any, data: Mapping[str, Any], path: str | Path) -> list[dict[str, Any]]:
    """
    Checks the stages of a recipe, and converts their values.

    Args:
        stages (`Any`):
            The value of `stages`.
        data (`Mapping[str, Any]`):
            The section `data` of the recipe.
        path (`str` or `Path`):
            The file, for error messages.

    Returns:
        `list[dict[str, Any]]`: The stages. They have a `name`, and the sections that they override.

    Raises:
        ValueError: If a stage has no name, the name of another stage, an unknown key or a value of a wrong type.
    """
    form = "a list such as [{name: connector, parts: {...}}, {name: all}]"
    check(isinstance(stages, list), f"`stages` of the recipe {path} must be {form}, got {stages!r}.")
    checked: list[dict[str, Any]] = []
    for number, stage in enumerate(stages):
        check(isinstance(stage, dict), f"`stages` of the recipe {path} must be {form}, got {stage!r}.")
        name = stage.get("name")
        check(
            isinstance(name, str) and re.fullmatch(r"[A-Za-z][\w-]*", name) is not None,
            f"`stages[{number}].name` must start with a letter and have only letters, digits, - and _, got {name!r} "
            f"(in the recipe {path}).",
        )
        check(name not in [other["name"] for other in checked], f"`stages` of the recipe {path} has {name!r} twice.")
        sections: dict[str, Any] = {
            "training": training_arguments(),
            "data": lambda values: keys_of_data(dict(data) | values),
            "parts": dict.fromkeys(PARTS, Any),
        }
        unknown = [key for key in stage if key not in ("name", *sections)]
        check(
            not unknown,
            f"the stage {name!r} of the recipe {path} has keys {unknown}; known ones are name, {', '.join(sections)}.",
        )
        check(
            is_own(data) or not is_own(stage.get("data") or {}),
            f"`stages.{name}.data` of the recipe {path} has own data (`train`), but `data` of the recipe has not: set "
            "`data.train` too.",
        )
        values = {
            section: read_section(stage[section], f"stages.{name}.{section}", sections[section], f"the recipe {path}")
            for section in sections
            if section in stage
        }
        if "parts" in values:
            try:
                values["parts"] = check_parts(values["parts"])
            except ValueError as error:
                raise ValueError(f"{error} (in the stage {name!r} of the recipe {path})") from error
        checked.append({"name": name, **values})
    return checked


def keys_of_data(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    Returns the keys that the section `data` of a recipe can have, with their types.

    Args:
        values (`Mapping[str, Any]`):
            The section. With the key `train`, it describes own data; otherwise, the built-in scenes.
    """
    return own_data_arguments() if is_own(values) else data_arguments()


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
    model = os.path.expanduser(model)
    places = list(dict.fromkeys([Path.cwd() / model, (root or shipped_root()) / model]))
    for place in places:
        if place.exists():
            return str(place)
    if model in (presets := shipped_presets("models")):
        return str(presets[model])
    if model.endswith(".json") or is_local(model):
        raise FileNotFoundError(
            f"there is no model {' or '.join(map(str, places))}: name a configuration file, a checkpoint's folder, "
            f"a model on the Hub, or one of {', '.join(presets)}."
        )
    return model


def data_arguments() -> dict[str, Any]:
    """Returns the keys that the section `data` of a recipe can have for the built-in data, with their types."""
    types = get_type_hints(load_scenes) | get_type_hints(scenes)
    return _without(types, {"kwargs", "return", "split", "num_examples"})


def tokenizer_arguments() -> dict[str, Any]:
    """Returns the keys that the section `tokenizer` of a recipe can have, with their types."""
    # `from_scratch` sets `videos` from the configuration of the model.
    return _without(get_type_hints(train_tokenizer), {"return", "texts", "videos"})


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
        content = _inside(content, section, override)
    if isinstance(content, list):
        content[_number_of(content, last, override)] = _read_yaml(value, f"the value of override {override!r}")
        return
    content[last] = _read_yaml(value, f"the value of override {override!r}")


def _kept_data(before: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of `data` that stay when other data are given: limits and policies, but no files."""
    if not isinstance(before, dict):
        return {}
    known = keys_of_data(given).keys() - {"train", "eval", "split", "eval_split", "subset", "format"}
    known -= {"image_root", "eval_image_root"}
    return {key: value for key, value in before.items() if key in known}


def _inside(content: dict[str, Any] | list[Any], section: str, override: str) -> Any:
    """Returns a section, which is created if it is empty, or an item of a list."""
    if isinstance(content, list):
        inside = content[_number_of(content, section, override)]
    else:
        if content.get(section) is None:
            content[section] = {}
        inside = content[section]
    check(isinstance(inside, dict | list), f"override {override!r}: {section!r} is a value, not a section.")
    return inside


def _number_of(items: list[Any], name: str, override: str) -> int:
    """Returns the number of an item, which is named by its number or by its `name`."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if name in names:
        return names.index(name)
    check(
        name.isdecimal() and int(name) < len(items),
        f"override {override!r}: there is no {name!r} among {', '.join(map(str, names))}.",
    )
    return int(name)


def _of_type(value: Any, hint: Any, name: str, where: str) -> Any:
    """
    Checks and converts the value of a key whose type is a number or a boolean. (In YAML 1.1, a number such as `1e-3` is
    a string.) Values of other types are returned unchanged; the function that receives them as arguments checks them.
    """
    # In YAML 1.1, `no` is a boolean, but it is also the name of a strategy, such as that of saving.
    if value is False and name.endswith("_strategy`"):
        return "no"
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
