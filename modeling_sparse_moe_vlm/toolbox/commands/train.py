"""
Trains a model from a recipe, saves it, evaluates it and draws its answers.

    sparse-moe-vlm train                                        # the demo: a tiny model of scenes of emoji
    sparse-moe-vlm train --recipe quickstart                    # fewer emoji and steps: two to three minutes
    sparse-moe-vlm train --set training.max_steps=200           # change a value of the recipe
    sparse-moe-vlm train --set parts.vision_encoder=freeze      # freeze a part, or give it a learning rate
    sparse-moe-vlm train --resume                               # resume an interrupted run
    sparse-moe-vlm train --check data.jsonl                     # read and validate your own data, without a model
    sparse-moe-vlm train --model MODEL --data train.jsonl --eval-data test.jsonl --output-dir outputs/mine
    sparse-moe-vlm train --data pairs.jsonl --task retrieval    # a retrieval model, from images and captions

The demo takes a few minutes on two CPU cores. To use several processes (the second line in a clone of the repository):

    torchrun --nproc-per-node 8 --no-python sparse-moe-vlm train
    accelerate launch --config_file configuration/accelerate/ddp.yaml --num_processes 8 scripts/train.py

The command writes to the output folder: the recipe with all overrides (`recipe.yaml`), the model with its model card
(folder `model`), `metrics.json`, `scene.png`, `answers.png` and `expert_load.png`. Models without experts of this
package get no `expert_load.png`.

`--data` trains on your own data, with the recipe `finetune`: the model of `--model` (a preset, a folder, or a name on
the Hub) or of the recipe learns from the rows and is scored on those of `--eval-data` with the metrics of `--task`.
Instead of figures, the command writes `predictions.jsonl` and `example.png`, and lists skipped rows in
`skipped_rows.jsonl`. `--task retrieval` trains a model that embeds images and their captions, with the recipe
`retrieval`, whose hyperparameters are for a small model from scratch.

The recipe `captioning` trains a model that describes the scenes. `easy_vqa`, `stamps_captioning` and `stamps_retrieval`
train on public data: the recipes say how to get the data, and which figures to expect.

`--check` reads all data once and prints the format, the number of rows, images and turns, the sizes of the images, and
the bad rows with file, row number (from 0) and reason. The exit code is 2 if there are bad rows, unless `--on-bad-row
skip` says that they can be skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..shipped_files import find_preset, shipped_presets, working_root
from .data_options import FORMAT_NAMES as FORMAT_NAMES
from .data_options import RETRIEVAL, TASK_NAMES, add_data_options, check_data_options, given_values, recipe_name
from .mistakes import mistakes_in_one_line
from .options import (
    add_json_option,
    add_recipe_options,
    check_source_options,
    check_unused,
    is_given,
    only_json,
    shown_option,
)

# Options that `--check` would ignore.
_ONLY_FOR_TRAINING = (
    *("data", "eval_data", "eval_image_root", "eval_split", "task", "model", "recipe", "set", "output_dir", "resume"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_options(parser, "demo", ", ".join(shipped_presets("training")), "finetune")
    parser.add_argument("--output-dir", help="folder to write to (default: outputs/RECIPE, such as outputs/demo)")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in the output folder")
    parser.add_argument("--model", help="model to train: preset, folder or name on the Hub (default: of the recipe)")
    add_json_option(parser)
    add_data_options(parser, (*TASK_NAMES, RETRIEVAL))
    parser.add_argument("--check", metavar="DATA", help="data to check: file, folder or dataset of the Hub")
    parser.add_argument("--bad-rows", metavar="FILE", help="JSONL file to which `--check` writes all bad rows")


def run(arguments: argparse.Namespace) -> None:
    if arguments.check is not None:
        with mistakes_in_one_line():
            for option in _ONLY_FOR_TRAINING:
                if is_given(arguments, option):
                    raise ValueError(
                        f"`--check` and {shown_option(option)} cannot be combined: `--check` trains nothing."
                    )
            check_source_options(arguments, arguments.check)
        _check(arguments)
        return
    with mistakes_in_one_line():
        check_data_options(arguments, "`--check DATA`")
        check_unused(arguments, ("bad_rows",), "`--check DATA`")
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
    from ..training.recipes import find_model, load_recipe
    from ..training.retrieval_run import RetrievalRun

    name = recipe_name(arguments)
    output_dir = Path(arguments.output_dir or working_root() / "outputs" / Path(name).stem)
    with only_json(arguments.json):
        with mistakes_in_one_line():
            recipe = load_recipe(find_preset(name, "training"), arguments.set, given_values(arguments))
            if not find_model(recipe.model).endswith(".json"):
                for value in arguments.set:
                    if value.startswith("tokenizer."):
                        raise ValueError(
                            f"`--set {value}`: the section `tokenizer` is for a model from scratch, but `model` is the "
                            f"checkpoint {recipe.model}."
                        )
            kind = RetrievalRun if recipe.task == RETRIEVAL else TrainingRun
            training = kind(recipe, output_dir, resume=arguments.resume)
        training.print_model()
        if not training.train():
            return  # the main process does the rest
        metrics = training.evaluate()
        training.draw()
        training.print_how_to_load()
    if arguments.json:
        print(json.dumps(metrics))
