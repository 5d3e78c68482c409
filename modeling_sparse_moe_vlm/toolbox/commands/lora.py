"""
Fine-tunes a trained model with LoRA on its experts, on scenes in a drawing style that is new to the model.

    sparse-moe-vlm lora                                               # LoRA on all experts
    sparse-moe-vlm lora --recipe attention                            # other recipes: image_experts, all
    sparse-moe-vlm lora --set lora.r=4 --set training.max_steps=50    # change values of the recipe
    sparse-moe-vlm lora --resume                                      # resume an interrupted run
    sparse-moe-vlm lora --model MODEL --data train.jsonl --eval-data test.jsonl --output-dir outputs/mine

The recipes start from the model that `sparse-moe-vlm train` writes. To use several processes, in a clone of the
repository:

    accelerate launch --config_file configuration/accelerate/ddp.yaml --num_processes 8 scripts/finetune_lora.py

The command writes to the output folder: the adapter (folder `adapter`), which PEFT can load, `metrics.json`, and the
recipe with all overrides (`recipe.yaml`).

The model can have experts or not. In models without experts, such as LLaVA, the feed-forward blocks of the language
model get adapters instead of experts.

`--data` trains on your own data, with the recipe `finetune`. The model is scored on the rows of `--eval-data` without
and with the adapter. The command then also writes `predictions.jsonl`, and lists skipped rows in `skipped_rows.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..shipped_files import find_preset, working_root
from .data_options import add_data_options, check_data_options, given_values, recipe_name
from .mistakes import mistakes_in_one_line
from .options import add_json_option, add_recipe_options, only_json, trained_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_options(parser, "experts", "experts, attention, image_experts, all, finetune", "finetune")
    parser.add_argument("--model", help="trained model: folder or name on the Hub (default: the model of the recipe)")
    parser.add_argument("--output-dir", help="folder to write to (default: outputs/lora/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in the output folder")
    add_json_option(parser)
    add_data_options(parser)


def run(arguments: argparse.Namespace) -> None:
    from ..expert_lora.recipe_run import LoraRun
    from ..expert_lora.recipes import load_lora_recipe

    with only_json(arguments.json):
        with mistakes_in_one_line():
            check_data_options(arguments)
            path = find_preset(recipe_name(arguments), "lora")
            recipe = load_lora_recipe(path, arguments.set, given_values(arguments))
            recipe.model = trained_model(recipe.model)
            output_dir = Path(arguments.output_dir or working_root() / "outputs/lora" / path.stem)
            lora = LoraRun(recipe, output_dir, resume=arguments.resume)
        lora.print_size()
        if not lora.train():
            return  # the main process does the rest
        metrics = lora.evaluate()
        lora.print_how_to_load()
    if arguments.json:
        print(json.dumps(metrics))
