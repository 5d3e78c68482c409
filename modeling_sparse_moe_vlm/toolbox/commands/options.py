"""Options that several verbs share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path

DEMO_MODEL = "outputs/demo/model"
CONFIG_NAME = "config.json"


def add_recipe_options(parser: argparse.ArgumentParser, recipe: str, names: str, own_recipe: str | None = None) -> None:
    """
    Adds `--recipe`, which is `None` by default, and `--set`. The default recipe is `default_recipe`, or `own_recipe` if
    own data are given.
    """
    default = recipe if own_recipe is None else f"{recipe}, with `--data` {own_recipe}"
    parser.add_argument("--recipe", help=f"YAML file, or built-in recipe: {names} (default: {default})")
    parser.set_defaults(default_recipe=recipe, own_recipe=own_recipe)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value of the recipe, such as data.num_heldout=200; may be given several times",
    )


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--model`, by default the model of the demo."""
    parser.add_argument(
        "--model", default=DEMO_MODEL, help=f"trained model: folder or name on the Hub (default: {DEMO_MODEL})"
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON to stdout, and everything else to stderr")


def check_unused(arguments: argparse.Namespace, options: Iterable[str], needed: str) -> None:
    """
    Raises `ValueError` if one of the options is given, because it only has an effect with something else.

    Args:
        arguments (`argparse.Namespace`):
            The arguments of the command.
        options (`Iterable[str]`):
            Names of the options in `arguments`.
        needed (`str`):
            What the options need to have an effect.
    """
    for option in options:
        if is_given(arguments, option):
            raise ValueError(f"{shown_option(option)} only has an effect with {needed}.")


def is_given(arguments: argparse.Namespace, option: str) -> bool:
    """Whether an option is given. Its default is `None`, `False` or an empty list."""
    value = getattr(arguments, option)
    return value is not None and value is not False and value != []  # 0 is given


def shown_option(option: str) -> str:
    """Returns an option as it is written in the command, between backticks."""
    return f"`--{option.replace('_', '-')}`"


def check_source_options(arguments: argparse.Namespace, data: str) -> None:
    """
    Checks that `--split` and `--subset` have an effect on the data.

    Args:
        arguments (`argparse.Namespace`):
            The arguments of the command.
        data (`str`):
            File, folder or dataset of the Hub.

    Raises:
        ValueError: If the data is a file, which has no splits, or if a subset is chosen from local data.
    """
    if Path(data).is_file():
        check_unused(arguments, ("split",), f"a folder or a dataset of the Hub, but {data} is a file")
    if Path(data).exists():
        check_unused(arguments, ("subset",), f"a dataset of the Hub, but {data} is local")


def check_output(path: str | Path, option: str, is_folder: bool = False) -> None:
    """
    Checks that a file or folder can be written, before the work whose results it is for. Creates nothing.

    Args:
        path (`str` or `Path`):
            The file or folder.
        option (`str`):
            The option that names it, such as `"output"`.
        is_folder (`bool`, *optional*, defaults to `False`):
            Whether it is a folder.

    Raises:
        ValueError: If it is a folder instead of a file, if one of its parents (or the folder itself) is a file, or if
            there is no permission to write.
    """
    given = Path(path).absolute()
    if given.is_dir() and not is_folder:
        raise ValueError(f"{shown_option(option)} must be a file, but {path} is a folder.")
    existing = next(place for place in (given, *given.parents) if place.exists())
    if not existing.is_dir() and (is_folder or existing != given):
        raise ValueError(f"{shown_option(option)} cannot be {path}, because {existing} is a file and not a folder.")
    if not os.access(existing, os.W_OK):
        raise ValueError(
            f"{shown_option(option)} cannot be {path}, because there is no permission to write to {existing}."
        )


def only_json(is_wanted: bool) -> AbstractContextManager:
    """Returns a context manager that redirects stdout to stderr if only JSON is wanted on stdout."""
    return redirect_stdout(sys.stderr) if is_wanted else nullcontext()


def trained_model(name: str) -> str:
    """
    Finds a trained model.

    Args:
        name (`str`):
            Folder, relative to the current directory or to the root of a clone, or name on the Hub.

    Returns:
        `str`: The path of the folder, or the name on the Hub, unchanged.

    Raises:
        FileNotFoundError: If there is no such folder and `name` cannot be a name on the Hub.
        ValueError: If it is the output folder of a training, and not the folder of its model.
    """
    from ..training.recipes import find_model

    try:
        path = find_model(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There is no trained model {name!r} yet: `make demo` (or `sparse-moe-vlm train`) trains one in a few "
            "minutes. Any other model is named by its folder, or by its name on the Hub."
        ) from error
    if not (Path(path) / CONFIG_NAME).exists() and (Path(path) / "model" / CONFIG_NAME).exists():
        raise ValueError(f"{name} is the output folder of a training: pass its model, {Path(name) / 'model'}.")
    return path
