"""Scores of answers, computed by the `evaluate` modules in the folder `metrics`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import evaluate

METRICS = Path(__file__).parent / "metrics"
# Metrics by name, and the largest value of each.
LARGEST = {
    "exact_match": 100,
    "vqa_accuracy": 100,
    "anls": 100,
    "relaxed_accuracy": 100,
    "cider": 10,
    "bleu": 100,
    "rouge_l": 100,
}
# Metrics of captions, whose texts can be tokenized.
OF_CAPTIONS = ("cider", "bleu", "rouge_l")
# Metrics that are not the mean of the scores of rows.
OF_ALL_ROWS = ("bleu",)


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """
    Computes the share of answers that equal their reference. Differences in case, surrounding white space and a final
    full stop are ignored.

    Args:
        predictions (`Sequence[str]`):
            Answers to score.
        references (`Sequence[str]`):
            The right answers, one per prediction.

    Returns:
        `float`: The exact match in percent, from 0 to 100.

    Raises:
        ValueError: If there are no predictions, or if their number differs from the number of references.
    """
    return score_answers(["exact_match"], predictions, [[reference] for reference in references])["exact_match"]


def score_answers(
    metrics: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenized: bool = False,
) -> dict[str, float]:
    """
    Scores answers with several metrics.

    Args:
        metrics (`Sequence[str]`):
            Names of metrics: `"exact_match"`, `"vqa_accuracy"` (VQA v2), `"anls"` (DocVQA), `"relaxed_accuracy"`
            (ChartQA), and for captions `"cider"` (CIDEr-D), `"bleu"` (BLEU-4 of sacreBLEU) and `"rouge_l"`.
        predictions (`Sequence[str]`):
            Answers to score.
        references (`Sequence[Sequence[str]]`):
            The right answers of each row, at least one.
        tokenized (`bool`, *optional*, defaults to `False`):
            Whether the texts are tokenized, so that the metrics of captions only split them at white space. By default,
            `"bleu"` uses the tokenizer of sacreBLEU, and `"cider"` and `"rouge_l"` use lower case, rules close to those
            of the Penn Treebank tokenizer, and no punctuation.

    Returns:
        `dict[str, float]`: The value of each metric: CIDEr-D from 0 to 10, all others in percent from 0 to 100.

    Raises:
        ValueError: If a metric is unknown, if there are no predictions, if their number differs from the number of
            references, if a row has no references, or if a value has a wrong type. The message names the row.

    Example:

    ```python
    >>> score_answers(["exact_match", "vqa_accuracy"], ["Two."], [["2", "2", "two", "two", "3"]])
    {'exact_match': 100.0, 'vqa_accuracy': 100.0}
    ```
    """
    metrics = check_metrics(metrics)
    predictions, references = _checked(predictions, references)
    values = {}
    for name in metrics:
        module = evaluate.load(str(METRICS / name), keep_in_memory=True)
        options = {"tokenized": tokenized} if name in OF_CAPTIONS else {}
        values[name] = float(module.compute(predictions=predictions, references=references, **options)[name])
    return values


def score_rows(
    metrics: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenized: bool = False,
) -> list[dict[str, float]]:
    """
    Scores each answer with several metrics.

    Args:
        metrics (`Sequence[str]`):
            Names of metrics, as [`score_answers`] takes them.
        predictions (`Sequence[str]`):
            Answers to score.
        references (`Sequence[Sequence[str]]`):
            The right answers of each row, at least one.
        tokenized (`bool`, *optional*, defaults to `False`):
            Whether the texts are tokenized, as for [`score_answers`].

    Returns:
        `list[dict[str, float]]`: For each row, the value of each metric. Their mean is the value of the metric. BLEU
        has no values, since it is not defined for a single row.

    Raises:
        ValueError: As [`score_answers`] does.
    """
    metrics = check_metrics(metrics)
    predictions, references = _checked(predictions, references)
    rows: list[dict[str, float]] = [{} for _ in predictions]
    for name in metrics:
        if name in OF_ALL_ROWS:
            continue
        options = {"tokenized": tokenized} if name in OF_CAPTIONS else {}
        scores = _class_of(name).score_rows(predictions, references, **options)
        for row, score in zip(rows, scores, strict=True):
            row[name] = score
    return rows


def check_metrics(metrics: Sequence[str]) -> list[str]:
    """
    Returns the names of metrics as a list.

    Raises:
        ValueError: If there are none, or if one is unknown.
    """
    known = ", ".join(LARGEST)
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"`metrics` must be a list with at least one of {known}, but got {metrics!r}.")
    for name in metrics:
        if name not in LARGEST:
            raise ValueError(f"there is no metric {name!r}: use one of {known}.")
    return list(metrics)


def references_of(row: Mapping[str, Any]) -> list[str]:
    """
    Returns the right answers of a row.

    Args:
        row (`Mapping`):
            Row in the form that [`~toolbox.data.VisionLanguageCollator`] takes, such as a row of
            [`~toolbox.data.load_rows`].

    Returns:
        `list[str]`: The column `references`, if the row has it. Otherwise, the text of the last assistant turn.

    Raises:
        ValueError: If the row has neither.
    """
    if row.get("references"):
        return list(row["references"])
    for message in reversed(row.get("messages") or []):
        if message["role"] == "assistant":
            return [text_of(message)]
    raise ValueError(f"the row has no references and no assistant turn: its fields are {list(row)}.")


def text_of(message: Mapping[str, Any]) -> str:
    """Returns the text of a message, whose content is a text or a list of parts."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _class_of(name: str) -> Any:
    """Returns the class of a metric, which is the only one that its module defines."""
    module = import_module(f"{__package__}.metrics.{name}.{name}")
    return next(item for item in vars(module).values() if isinstance(item, type) and issubclass(item, evaluate.Metric))


def _checked(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(
            f"got {len(predictions)} predictions for {len(references)} references: give one for each, and at least one."
        )
    for number, (prediction, given) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise ValueError(f"predictions[{number}] must be a string, but got {prediction!r}.")
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise ValueError(f"references[{number}] must be a list of strings, but got {given!r}.")
        if not given:
            raise ValueError(f"references[{number}] is empty: give at least one right answer for each row.")
        if wrong := [reference for reference in given if not isinstance(reference, str)]:
            raise ValueError(f"references[{number}] must contain only strings, but got {wrong[0]!r}.")
    return list(predictions), [list(given) for given in references]
