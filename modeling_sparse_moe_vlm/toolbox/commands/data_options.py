"""Options for the user's own data, of the verbs that train."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .options import check_unused

# The names of `toolbox.data.formats` and `toolbox.training.own_evaluation`, which take seconds to import.
FORMAT_NAMES = ("messages", "prompt-completion", "llava", "texts", "vqa", "captions")
TASK_NAMES = ("vqa", "captioning", "document_vqa", "chart_vqa", "chat")
RETRIEVAL = "retrieval"
# Tasks of the built-in data that have a recipe of the same name.
TASKS_OF_SCENES = ("captioning", RETRIEVAL)
# Keys of the section `data` of a recipe, by option.
_KEYS = {
    "data": "train",
    "eval_data": "eval",
    "format": "format",
    "image_root": "image_root",
    "eval_image_root": "eval_image_root",
    "split": "split",
    "eval_split": "eval_split",
    "subset": "subset",
    "on_bad_row": "on_bad_row",
}
_WITH_DATA = ("eval_data", "eval_image_root", "eval_split", "task")  # the others also work with `--check`
_WITH_CHECK = ("format", "image_root", "split", "subset", "on_bad_row")


def add_data_options(parser: argparse.ArgumentParser, tasks: Sequence[str] = TASK_NAMES) -> None:
    """Adds `--data` and the options that describe the data. `tasks` are the values that `--task` can have."""
    group = parser.add_argument_group("your own data")
    group.add_argument("--data", help="data to train on: file, folder or dataset of the Hub")
    group.add_argument("--eval-data", help="data to evaluate on")
    group.add_argument("--task", choices=tasks, help="task, which chooses the metrics (default: by the format)")
    group.add_argument("--format", help=f"format of the data: {', '.join(FORMAT_NAMES)} (default: recognised)")
    group.add_argument("--image-root", help="folder of the images (default: the folder of the file that names them)")
    group.add_argument("--eval-image-root", help="folder of the images of `--eval-data` (default: `--image-root`)")
    group.add_argument("--split", help="split of a folder or of a dataset of the Hub (default: train)")
    group.add_argument("--eval-split", help="split to evaluate on, of `--eval-data`, by default of `--data`")
    group.add_argument("--subset", help="subset of a dataset of the Hub")
    group.add_argument("--on-bad-row", choices=("error", "skip"), help="whether bad rows are an error (default: error)")


def check_data_options(arguments: argparse.Namespace, check: str | None = None) -> None:
    """
    Checks that no option is given without the data that it describes.

    Args:
        arguments (`argparse.Namespace`):
            The arguments of the command.
        check (`str`, *optional*):
            Another option that takes data.

    Raises:
        ValueError: If an option has no effect.
    """
    if arguments.data is not None:
        return
    for option in (*_WITH_DATA, *_WITH_CHECK):
        is_scenes = option == "task" and arguments.task in TASKS_OF_SCENES
        if not is_scenes:
            has_check = check is not None and option in _WITH_CHECK
            check_unused(arguments, [option], f"{check} or `--data DATA`" if has_check else "`--data DATA`")


def given_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the values of a recipe that options set. Own data replace the data of the recipe."""
    values: dict[str, Any] = {}
    if arguments.data is not None:
        values["data"] = {
            key: getattr(arguments, option) for option, key in _KEYS.items() if getattr(arguments, option) is not None
        }
    for option in ("model", "task"):
        if getattr(arguments, option) is not None:
            values[option] = getattr(arguments, option)
    return values


def recipe_name(arguments: argparse.Namespace) -> str:
    """Returns the name of the recipe: another one by default for retrieval, and if own data are given."""
    if arguments.recipe is not None:
        return arguments.recipe
    if arguments.task == RETRIEVAL or (arguments.task in TASKS_OF_SCENES and arguments.data is None):
        return arguments.task
    return arguments.own_recipe if arguments.data is not None else arguments.default_recipe
