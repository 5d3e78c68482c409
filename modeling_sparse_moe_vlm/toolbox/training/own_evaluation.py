"""Tasks of a run on own data, with their metrics, and the keys of the section `evaluation` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...checks import check

# The task that trains a retrieval model, with metrics of its own.
RETRIEVAL = "retrieval"
# Metrics by task; the first one is the most important.
TASKS = {
    "vqa": ("vqa_accuracy", "exact_match"),
    "captioning": ("cider", "bleu", "rouge_l"),
    "document_vqa": ("anls", "exact_match"),
    "chart_vqa": ("relaxed_accuracy", "exact_match"),
    "chat": ("exact_match", "rouge_l"),
}
# Names of the tasks on the Hub.
TASKS_OF_HUB = {
    "vqa": "visual-question-answering",
    "captioning": "image-to-text",
    "document_vqa": "document-question-answering",
    "chart_vqa": "visual-question-answering",
    RETRIEVAL: "image-text-retrieval",
}
# Keys of `evaluation` about evaluation during training.
DURING_TRAINING = ("sample", "early_stopping_patience")
# Keys of `evaluation`, with their types. `batch_size` and `max_new_tokens` are arguments of
# `toolbox.evaluation.evaluate_rows`.
EVALUATION_ARGUMENTS = {"metrics": list[str], "batch_size": int, "max_new_tokens": int} | dict.fromkeys(
    DURING_TRAINING, int
)
# Tasks by format of the data.
TASK_OF_FORMAT = {"vqa": "vqa", "captions": "captioning"}


def check_task(task: Any) -> None:
    """Raises `ValueError` unless the task is known or `None`."""
    tasks = (*TASKS, RETRIEVAL)
    check(task is None or task in tasks, f"`task` must be one of {', '.join(tasks)}, but got {task!r}.")


def task_of(task: str | None, format: str) -> str:
    """Returns the task, by default that of the format of the data."""
    return task or TASK_OF_FORMAT.get(format, "chat")


def metrics_of(task: str | None, format: str, evaluation: Mapping[str, Any]) -> list[str]:
    """
    Chooses metrics.

    Args:
        task (`str`, *optional*):
            Name of a task. By default, it depends on the format: `"vqa"` for questions with answers, `"captioning"` for
            captions, and `"chat"` for conversations.
        format (`str`):
            Format of the data.
        evaluation (`Mapping[str, Any]`):
            The section `evaluation` of a recipe, whose `metrics` come first.

    Returns:
        `list[str]`: Names of metrics.

    Raises:
        ValueError: If a metric is unknown.
    """
    from ..evaluation.scores import check_metrics

    metrics = evaluation.get("metrics")
    if metrics is not None:
        check(
            isinstance(metrics, list) and bool(metrics),
            f"`evaluation.metrics` must be a list of names of metrics, but got {metrics!r}.",
        )
        return check_metrics(metrics)
    return list(TASKS[task_of(task, format)])


def score_lines(scores: Mapping[str, float]) -> str:
    """Formats scores as a table."""
    return "\n".join(f"{name:<20}{value:>8.2f}" for name, value in scores.items())
