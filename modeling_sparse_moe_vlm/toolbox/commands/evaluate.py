"""
Scores models on your own data, or a model on the held-out scenes of the demo.

    sparse-moe-vlm evaluate MODEL test.jsonl                            # metrics by format of the data
    sparse-moe-vlm evaluate MODEL my-data --metrics anls,exact_match    # a folder, with its split `test`
    sparse-moe-vlm evaluate MODEL_A MODEL_B --data test.jsonl --json    # several models side by side
    sparse-moe-vlm evaluate MODEL test.jsonl --resume                   # resume an interrupted evaluation
    sparse-moe-vlm evaluate MODEL test.jsonl --update-card              # write the scores to the model card
    sparse-moe-vlm evaluate RETRIEVAL_MODEL pairs.jsonl                 # recall of a retrieval model
    sparse-moe-vlm evaluate --model outputs/demo/model                  # the held-out scenes of the demo

On your own data, each model is also measured without the images. The command prints a table with 95 % confidence
intervals, and writes `results.json` and for each model `predictions.jsonl` to the output folder. Metrics: vqa_accuracy,
exact_match, anls, relaxed_accuracy, cider, bleu and rouge_l. Several processes (`accelerate launch`) share the rows.
For retrieval models, the data are images with captions, and the scores are recall and median rank in both directions.

The model of the last example is written by `sparse-moe-vlm train`. On its scenes, the score is the share of answers
that equal the reference (exact match), for each kind of question, next to guesses made without the images, which are
learned from the questions and answers of the training scenes of the recipe.
"""

from __future__ import annotations

import argparse
import json

from ..shipped_files import find_preset
from . import evaluate_data
from .mistakes import mistakes_in_one_line
from .options import DEMO_MODEL, add_json_option, add_recipe_options, trained_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=f"trained model: folder or name on the Hub (default: {DEMO_MODEL})")
    add_recipe_options(parser, "demo", "demo, quickstart")
    add_json_option(parser)
    evaluate_data.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    with mistakes_in_one_line():
        chosen = evaluate_data.models_and_data(arguments)
    if chosen is None:
        _run_on_scenes(arguments)
    else:
        evaluate_data.run_on_data(arguments, *chosen)


def _run_on_scenes(arguments: argparse.Namespace) -> None:
    from ..demo import conversations, load_scenes
    from ..evaluation import generate_answers
    from ..evaluation.by_kind import SPLIT_TITLES, score_by_kind, score_table
    from ..training.models import from_checkpoint
    from ..training.own_data import is_own
    from ..training.recipes import load_recipe

    with mistakes_in_one_line():
        for value in arguments.set:
            if not value.startswith("data."):
                raise ValueError(
                    f"`--set {value}`: `evaluate` only reads the section `data` of a recipe, such as "
                    "`--set data.num_heldout=200`."
                )
        name = arguments.recipe or arguments.default_recipe
        recipe = load_recipe(find_preset(name, "training"), arguments.set)
        if is_own(recipe.data):
            raise ValueError(
                f"the recipe {name} has own data: `evaluate` needs one with the built-in scenes. For your own data, "
                "run `evaluate MODEL DATA`."
            )
        model, processor = from_checkpoint(trained_model(arguments.model or DEMO_MODEL))
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
