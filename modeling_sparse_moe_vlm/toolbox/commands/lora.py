"""
Teaches a trained model a drawing style that it has not seen, with LoRA on its experts.

    sparse-moe-vlm lora                                               # all experts
    sparse-moe-vlm lora --recipe attention                            # or image_experts, all
    sparse-moe-vlm lora --set lora.r=4 --set training.max_steps=50    # with other values
    sparse-moe-vlm lora --resume                                      # goes on with an interrupted run
    accelerate launch --config_file configuration/accelerate/ddp.yaml --num_processes 8 scripts/finetune_lora.py

Writes to the output folder: the adapter, as PEFT loads it (folder `adapter`), and `metrics.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..shipped_files import find_preset, working_root
from .mistakes import mistakes_in_one_line
from .options import add_json_option, add_recipe_options, only_json, trained_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_options(parser, "experts", "experts, attention, image_experts, all")
    parser.add_argument("--model", help="trained model: a folder or a name on the Hub, instead of the recipe's")
    parser.add_argument("--output-dir", help="where everything is written; outputs/lora/<recipe> by default")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> None:
    from ..expert_lora.recipe_run import LoraRun
    from ..expert_lora.recipes import load_lora_recipe

    with only_json(arguments.json):
        with mistakes_in_one_line():
            path = find_preset(arguments.recipe, "lora")
            recipe = load_lora_recipe(path, arguments.set)
            recipe.model = trained_model(arguments.model or recipe.model)
            output_dir = Path(arguments.output_dir or working_root() / "outputs/lora" / path.stem)
            lora = LoraRun(recipe, output_dir, resume=arguments.resume)
        lora.print_size()
        if not lora.train():
            return  # another process does the rest
        metrics = lora.evaluate()
        lora.print_how_to_load()
    if arguments.json:
        print(json.dumps(metrics))
