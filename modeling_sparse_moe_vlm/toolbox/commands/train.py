"""
Trains a model from a recipe, saves it, evaluates it and draws its answers.

    sparse-moe-vlm train                                        # the demo: a tiny model of scenes of emoji
    sparse-moe-vlm train --recipe quickstart                    # fewer emoji and steps: two to three minutes
    sparse-moe-vlm train --set training.max_steps=200           # change a value of the recipe
    sparse-moe-vlm train --set parts.vision_encoder=freeze      # freeze a part, or give it a learning rate
    sparse-moe-vlm train --resume                               # resume an interrupted run
    sparse-moe-vlm train --check data.jsonl                     # read and validate your own data, without a model

The demo takes a few minutes on two CPU cores. To use several processes (the second line in a clone of the repository):

    torchrun --nproc-per-node 8 --no-python sparse-moe-vlm train
    accelerate launch --config_file configuration/accelerate/ddp.yaml --num_processes 8 scripts/train.py

The command writes to the output folder: the recipe with all overrides (`recipe.yaml`), the model with its model card
(folder `model`), `metrics.json`, `scene.png`, `answers.png` and `expert_load.png`. Models without experts of this
package get no `expert_load.png`.

`--check` reads all data once and prints the format, the number of rows, images and turns, the sizes of the images, and
the bad rows with file, row number (from 0) and reason. The exit code is 2 if there are bad rows, unless `--on-bad-row
skip` says that they can be skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..shipped_files import find_preset, working_root
from .mistakes import mistakes_in_one_line
from .options import add_json_option, add_recipe_options, only_json

# The names of `toolbox.data.formats`, which takes seconds to import.
FORMAT_NAMES = ("messages", "prompt-completion", "llava", "texts", "vqa", "captions")
OPTIONS_OF_CHECK = ("format", "image_root", "split", "subset", "on_bad_row", "bad_rows")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_options(parser, "demo", "demo, quickstart")
    parser.add_argument("--output-dir", help="folder to write to (default: outputs/RECIPE, such as outputs/demo)")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in the output folder")
    add_json_option(parser)
    check = parser.add_argument_group("checking data")
    check.add_argument("--check", metavar="DATA", help="data to check: file, folder or dataset of the Hub")
    check.add_argument("--format", help=f"format of the data: {', '.join(FORMAT_NAMES)} (default: recognised)")
    check.add_argument("--image-root", help="folder of the images (default: the folder of the file that names them)")
    check.add_argument("--split", help="split of a folder or of a dataset of the Hub (default: train)")
    check.add_argument("--subset", help="subset of a dataset of the Hub")
    check.add_argument("--on-bad-row", choices=("error", "skip"), help="whether bad rows are an error (default: error)")
    check.add_argument("--bad-rows", metavar="FILE", help="JSONL file to which all bad rows are written")


def run(arguments: argparse.Namespace) -> None:
    if arguments.check is not None:
        _check(arguments)
        return
    with mistakes_in_one_line():
        for option in OPTIONS_OF_CHECK:
            if getattr(arguments, option) is not None:
                raise ValueError(f"`--{option.replace('_', '-')}` only has an effect with `--check DATA`.")
    _train(arguments)


def _check(arguments: argparse.Namespace) -> None:
    """Checks the data and prints a report. Ends with exit code 2 if there are bad rows, unless they can be skipped."""
    from ..data import check_data

    with only_json(arguments.json), mistakes_in_one_line():
        report = check_data(
            arguments.check,
            arguments.format,
            split=arguments.split or "train",
            subset=arguments.subset,
            image_root=arguments.image_root,
            bad_rows_file=arguments.bad_rows,
            progress=True,
        )
    print(json.dumps(report.as_dict()) if arguments.json else report)
    if report.bad_rows and arguments.on_bad_row != "skip":
        sys.exit(2)
    if report.bad_rows.total() == report.rows:
        print("error: all rows are bad.", file=sys.stderr)
        sys.exit(2)


def _train(arguments: argparse.Namespace) -> None:
    from ..training.recipe_run import TrainingRun
    from ..training.recipes import load_recipe

    output_dir = Path(arguments.output_dir or working_root() / "outputs" / Path(arguments.recipe).stem)
    with only_json(arguments.json):
        with mistakes_in_one_line():
            recipe = load_recipe(find_preset(arguments.recipe, "training"), arguments.set)
            training = TrainingRun(recipe, output_dir, resume=arguments.resume)
        training.print_model()
        if not training.train():
            return  # the main process does the rest
        metrics = training.evaluate()
        training.draw()
        training.print_how_to_load()
    if arguments.json:
        print(json.dumps(metrics))
