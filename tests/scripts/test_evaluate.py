"""`evaluate` returns the same scores as training."""

import json

from modeling_sparse_moe_vlm.toolbox.evaluation.by_kind import score_table
from tests.support.small_run import SMALL_RUN

DATA = [f"--set={key}={value}" for key, value in SMALL_RUN.items() if key.startswith("data.")]


def test_scores_are_those_of_the_training_run(trained, run_verb):
    metrics = json.loads((trained[0] / "metrics.json").read_text())
    metrics.pop("training_seconds")
    printed = run_verb("evaluate", "--model", trained[0] / "model", *DATA, "--json")
    assert json.loads(printed) == metrics

    printed = run_verb("evaluate", "--model", trained[0] / "model", *DATA)
    assert printed == (
        f"Exact match in percent, held-out arrangements:\n{score_table(metrics['test'])}\n\n"
        "Exact match in percent, held-out drawing style (never seen in training):\n"
        f"{score_table(metrics['test_style'])}\n"
    )


def test_without_a_held_out_style_there_is_one_split(trained, run_verb):
    arguments = [*DATA, "--set=data.held_out_style=null", "--json"]
    assert json.loads(run_verb("evaluate", "--model", trained[0] / "model", *arguments)).keys() == {"test"}


def test_the_saved_recipe_of_a_run_gives_its_scores(trained, run_verb):
    metrics = json.loads((trained[0] / "metrics.json").read_text())
    metrics.pop("training_seconds")
    arguments = ["--model", trained[0] / "model", "--recipe", trained[0] / "recipe.yaml", "--json"]
    assert json.loads(run_verb("evaluate", *arguments)) == metrics
