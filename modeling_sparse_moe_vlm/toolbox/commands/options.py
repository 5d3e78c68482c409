"""Options that several verbs have, and what they stand for."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout

DEMO_MODEL = "outputs/demo/model"


def add_recipe_options(parser: argparse.ArgumentParser, recipe: str, names: str) -> None:
    """Adds `--recipe` and `--set`."""
    parser.add_argument("--recipe", default=recipe, help=f"YAML file, or the name of one that ships: {names}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--model`, by default the demo's."""
    parser.add_argument("--model", default=DEMO_MODEL, help=f"folder or name on the Hub; {DEMO_MODEL} by default")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, and all else to stderr")


def only_json(is_wanted: bool) -> AbstractContextManager:
    """Sends what is printed meanwhile to stderr, where only JSON is wanted on stdout."""
    return redirect_stdout(sys.stderr) if is_wanted else nullcontext()


def trained_model(name: str) -> str:
    """
    Finds a trained model.

    Args:
        name (`str`):
            Folder, relative to the current directory or to the root of a clone; or a name on the Hub.

    Returns:
        `str`: the path, or the name as it is.

    Raises:
        FileNotFoundError: If there is no such folder, and it cannot be a name on the Hub.
    """
    from ..training.recipes import find_model

    try:
        return find_model(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There is no trained model {name!r} yet: `make demo` (or `sparse-moe-vlm train`) trains one in some "
            "minutes. With `--model` another is taken."
        ) from error
