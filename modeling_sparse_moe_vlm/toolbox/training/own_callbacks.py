"""Callbacks of runs on own data: generated answers at every evaluation, and early stopping."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from ...checks import check
from .generation_metrics import GenerationMetrics
from .own_evaluation import DURING_TRAINING
from .retrieval_metrics import check_direction


def check_evaluation(evaluation: Mapping[str, Any], arguments: TrainingArguments, has_rows: bool) -> None:
    """
    Checks that evaluation during training is possible.

    Args:
        evaluation (`Mapping[str, Any]`):
            The section `evaluation` of a recipe.
        arguments (`TrainingArguments`):
            Arguments of the training.
        has_rows (`bool`):
            Whether there are rows for evaluation.

    Raises:
        ValueError: If the training is evaluated but there are no rows, if a value of `evaluation` is too small or has
            no effect, or if early stopping has no metric.
    """
    is_evaluated = arguments.eval_strategy != "no"
    check(
        has_rows or not is_evaluated,
        "`training.eval_strategy` needs rows for evaluation: set `data.eval` or `data.eval_split`.",
    )
    for name in ("batch_size", "max_new_tokens", *DURING_TRAINING):
        value = evaluation.get(name)
        check(value is None or value >= 1, f"`evaluation.{name}` must be at least 1, got {value}.")
    for name in DURING_TRAINING:
        value = evaluation.get(name)
        check(
            value is None or is_evaluated,
            f"`evaluation.{name}` only has an effect with evaluation during training: set `training.eval_strategy`.",
        )
    check_direction(arguments)
    check(
        evaluation.get("early_stopping_patience") is None or arguments.metric_for_best_model is not None,
        "`evaluation.early_stopping_patience` needs `training.metric_for_best_model`, such as 'loss' or 'exact_match'.",
    )


def check_questions_about_scenes(recipe: Any, arguments: TrainingArguments) -> None:
    """
    Checks that a recipe for questions about the built-in scenes has no values that are for own data.

    Args:
        recipe (`Recipe` or `LoraRecipe`):
            The recipe.
        arguments (`TrainingArguments`):
            Arguments of the training.

    Raises:
        ValueError: If the task or a value about evaluation needs own data.
    """
    check(recipe.task in (None, "vqa"), f"`task: {recipe.task}` needs your own data: set `data.train`.")
    check(
        not recipe.evaluation,
        f"`evaluation` only has an effect with your own data (`data.train`), but the recipe sets "
        f"{', '.join(recipe.evaluation)}.",
    )
    check(
        arguments.eval_strategy == "no",
        "`training.eval_strategy` needs your own data (`data.train`): questions about the scenes are only evaluated "
        "after the training.",
    )


def callbacks_of(
    evaluation: Mapping[str, Any],
    arguments: TrainingArguments,
    processor: Any,
    rows: Any | None,
    metrics: Sequence[str],
) -> list[TrainerCallback]:
    """
    Returns the callbacks of a training.

    Args:
        evaluation (`Mapping[str, Any]`):
            The section `evaluation` of a recipe: `sample` is the number of rows to generate answers for, and
            `early_stopping_patience` the number of evaluations without improvement after which training stops.
        arguments (`TrainingArguments`):
            Arguments of the training.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Processor of the model.
        rows (`Dataset`, *optional*):
            Rows for evaluation.
        metrics (`Sequence[str]`):
            Names of metrics.
    """
    if rows is None or arguments.eval_strategy == "no":
        return []
    options = {"max_new_tokens": 64} | options_of_callback(evaluation, ("sample", "batch_size", "max_new_tokens"))
    return [GenerationMetrics(processor, rows, metrics, **options), *early_stopping(evaluation)]


def options_of_callback(evaluation: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Returns the arguments of a callback that keys of the section `evaluation` set."""
    names = {"sample": "num_samples"}
    return {names.get(key, key): evaluation[key] for key in keys if evaluation.get(key) is not None}


def early_stopping(evaluation: Mapping[str, Any]) -> list[TrainerCallback]:
    """Returns the callback that stops a training early, if the section `evaluation` says so."""
    patience = evaluation.get("early_stopping_patience")
    return [] if patience is None else [EarlyStoppingCallback(patience)]
