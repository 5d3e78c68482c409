"""Evaluation of a model on a run's own data: answers, metrics of the task, and a file with the predictions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from datasets import Dataset
from transformers import PreTrainedModel

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
}
# Keys of `evaluation` about evaluation during training.
DURING_TRAINING = ("sample", "early_stopping_patience")
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


def evaluate_rows(
    model: PreTrainedModel,
    processor: Any,
    rows: Dataset,
    predictions_file: Path,
    metrics: Sequence[str],
    batch_size: int = 16,
    max_new_tokens: int = 64,
) -> dict[str, float]:
    """
    Generates an answer for each row, scores the answers, and writes them to a file.

    Args:
        model (`PreTrainedModel`):
            The model.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Its processor.
        rows (`Dataset`):
            Rows of [`~toolbox.data.load_rows`].
        predictions_file (`Path`):
            JSONL file with the `source` and `row` of each row, the `prediction` and the `references`.
        metrics (`Sequence[str]`):
            Names of metrics of [`~toolbox.evaluation.score_answers`].
        batch_size (`int`, *optional*, defaults to 16):
            Number of rows per batch.
        max_new_tokens (`int`, *optional*, defaults to 64):
            Largest number of tokens in an answer.

    Returns:
        `dict[str, float]`: The value of each metric.
    """
    from ..evaluation import generate_answers, references_of, score_answers

    answers = generate_answers(model, processor, rows, batch_size, max_new_tokens=max_new_tokens)
    without_images = rows.select_columns([name for name in rows.column_names if name != "images"])
    references = [references_of(row) for row in without_images]
    with predictions_file.open("w", encoding="utf-8") as file:
        for row, answer, right in zip(without_images, answers, references, strict=True):
            entry = {"source": row["source"], "row": row["row"], "prediction": answer, "references": right}
            file.write(f"{json.dumps(entry, ensure_ascii=False)}\n")
    return score_answers(metrics, answers, references)


def evaluation_arguments() -> dict[str, Any]:
    """Returns the keys that the section `evaluation` of a recipe can have, with their types."""
    types = get_type_hints(evaluate_rows)
    return {name: types[name] for name in ("metrics", "batch_size", "max_new_tokens")} | dict.fromkeys(
        DURING_TRAINING, int
    )


def score_lines(scores: Mapping[str, float]) -> str:
    """Formats scores as a table."""
    return "\n".join(f"{name:<20}{value:>8.2f}" for name, value in scores.items())
