"""Options that several verbs share."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path

DEMO_MODEL = "outputs/demo/model"
CONFIG_NAME = "config.json"


def add_recipe_options(parser: argparse.ArgumentParser, recipe: str, names: str, own_recipe: str | None = None) -> None:
    """
    Adds `--recipe` and `--set`. With `own_recipe`, which is the default if own data are given, `--recipe` is `None` by
    default.
    """
    default = recipe if own_recipe is None else f"{recipe}, with `--data` {own_recipe}"
    parser.add_argument(
        "--recipe",
        default=recipe if own_recipe is None else None,
        help=f"YAML file, or built-in recipe: {names} (default: {default})",
    )
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
            "minutes. Pass `--model` to use another model."
        ) from error
    if not (Path(path) / CONFIG_NAME).exists() and (Path(path) / "model" / CONFIG_NAME).exists():
        raise ValueError(f"{name} is the output folder of a training: pass its model, {Path(name) / 'model'}.")
    return path
