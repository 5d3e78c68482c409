"""Scores on the built-in data by kind of question, next to those of guesses made without the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from datasets import Dataset

from .baseline import BlindBaseline, blind_baseline
from .scores import exact_match

SPLIT_TITLES = {"test": "held-out arrangements", "test_style": "held-out drawing style (never seen in training)"}
# For each kind of question and for "overall": the exact match in percent of the model and of the two baselines.
Scores = dict[str, dict[str, float]]


def score_by_kind(train: Dataset, test: Dataset, answers: Sequence[str]) -> Scores:
    """
    Scores answers by kind of question and overall.

    Args:
        train (`datasets.Dataset`):
            Rows to learn the blind guesses from, with the columns `question`, `answer` and `kind`.
        test (`datasets.Dataset`):
            Rows that the model answered, with the same columns.
        answers (`Sequence[str]`):
            Answers of the model, one per row of `test`.

    Returns:
        `dict[str, dict[str, float]]`: For `"overall"` and for each kind of question, the exact match in percent of the
        `model` and of the two baselines `blind` and `most_frequent_answer` (see
        [`~toolbox.evaluation.blind_baseline`]).

    Raises:
        ValueError: If the number of answers differs from the number of rows of `test`, or if `train` has no rows.
    """
    references, kinds = test["answer"][:], test["kind"][:]
    scores = blind_baseline(train, test)
    scores["overall"]["model"] = exact_match(answers, references)
    for kind in scores.keys() - {"overall"}:
        chosen = [number for number, other in enumerate(kinds) if other == kind]
        scores[kind]["model"] = exact_match([answers[n] for n in chosen], [references[n] for n in chosen])
    return scores


def score_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """
    Formats scores as a table.

    Args:
        scores (`Mapping[str, Mapping[str, float]]`):
            Scores as [`score_by_kind`] returns them.

    Returns:
        `str`: A table with a header and one line per kind of question. The last line is `overall`.
    """
    lines = [f"{'kind of question':<20}{'model':>8}{'blind':>8}{'most frequent answer':>22}"]
    for kind in [*(kind for kind in scores if kind != "overall"), "overall"]:
        row = scores[kind]
        lines.append(f"{kind:<20}{row['model']:>8.1f}{row['blind']:>8.1f}{row['most_frequent_answer']:>22.1f}")
    return "\n".join(lines)


def example_answers(train: Dataset, test: Dataset, answers: Sequence[str], count: int = 12) -> str:
    """
    Formats the first questions as a table with the right answer, the answer of the model and the guesses.

    Args:
        train (`datasets.Dataset`):
            Rows to learn the blind guesses from, with the columns `question`, `answer` and `kind`.
        test (`datasets.Dataset`):
            Rows that the model answered, with the same columns.
        answers (`Sequence[str]`):
            Answers of the model, one per row of `test`.
        count (`int`, *optional*, defaults to 12):
            Number of questions to show.

    Returns:
        `str`: A table with a header and one line per question. Texts that are too long for their column are cut off.
    """
    blind = BlindBaseline(train)
    lines = [f"{'question':<56}{'right answer':<28}{'model':<28}{'blind':<20}{'most frequent'}"]
    for row, answer in zip(test.select_columns(["question", "answer", "kind"]).take(count), answers, strict=False):
        guess = blind.answer(row["question"], row["kind"])
        lines.append(
            f"{row['question']:<56.55}{row['answer']:<28.27}{answer:<28.27}{guess:<20.19}{blind.most_frequent:.19}"
        )
    return "\n".join(lines)
