"""
Scores a model on the held-out scenes of the demo, and compares it with guesses made without the images.

    sparse-moe-vlm evaluate --model outputs/demo/model
    sparse-moe-vlm evaluate --model outputs/demo/model --set data.num_heldout=200 --json

The model of the examples is written by `sparse-moe-vlm train`. The score is the share of answers that equal the
reference (exact match), for each kind of question. The recipe sets the size and the number of the scenes. The guesses
are learned from the questions and answers of its training scenes.
"""

from __future__ import annotations

import argparse
import json

from ..shipped_files import find_preset
from .mistakes import mistakes_in_one_line
from .options import add_json_option, add_model_option, add_recipe_options, trained_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_option(parser)
    add_recipe_options(parser, "demo", "demo, quickstart")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> None:
    from ..demo import conversations, load_scenes
    from ..evaluation import generate_answers
    from ..evaluation.by_kind import SPLIT_TITLES, score_by_kind, score_table
    from ..training.models import from_checkpoint
    from ..training.own_data import is_own
    from ..training.recipes import load_recipe

    with mistakes_in_one_line():
        recipe = load_recipe(find_preset(arguments.recipe, "training"), arguments.set)
        if is_own(recipe.data):
            raise ValueError(
                f"the recipe {arguments.recipe} has own data: `evaluate` needs one with the built-in scenes."
            )
        model, processor = from_checkpoint(trained_model(arguments.model))
        data = load_scenes(**recipe.data)
    scores = {}
    for split in [split for split in SPLIT_TITLES if split in data]:
        answers = generate_answers(model, processor, conversations(data[split]))
        scores[split] = score_by_kind(data["train"], data[split], answers)
    if arguments.json:
        print(json.dumps(scores))
    else:
        tables = [f"Exact match in percent, {SPLIT_TITLES[split]}:\n{score_table(scores[split])}" for split in scores]
        print("\n\n".join(tables))
