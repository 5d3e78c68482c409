"""
Trains a model from a recipe, saves it, evaluates it and draws its answers.

    sparse-moe-vlm train                                        # the demo: a tiny model of scenes of emoji
    sparse-moe-vlm train --recipe quickstart                    # fewer emoji and steps: about two minutes
    sparse-moe-vlm train --set training.max_steps=200           # change a value of the recipe
    sparse-moe-vlm train --resume                               # resume an interrupted run

The demo takes a few minutes on two CPU cores. To use several processes (the second line in a clone of the repository):

    torchrun --nproc-per-node 8 --no-python sparse-moe-vlm train
    accelerate launch --config_file configuration/accelerate/ddp.yaml --num_processes 8 scripts/train.py

The command writes to the output folder: the model with its model card (folder `model`), `metrics.json`, `scene.png`,
`answers.png` and `expert_load.png`. Models without experts of this package get no `expert_load.png`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..shipped_files import find_preset, working_root
from .mistakes import mistakes_in_one_line
from .options import add_json_option, add_recipe_options, only_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_options(parser, "demo", "demo, quickstart")
    parser.add_argument("--output-dir", help="folder to write to (default: outputs/RECIPE, such as outputs/demo)")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in the output folder")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> None:
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
