"""Scores of the built-in data by kind of question, beside those of guessing without looking at the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from datasets import Dataset

from .baseline import BlindBaseline, blind_baseline
from .scores import exact_match

SPLIT_TITLES = {"test": "held-out arrangements", "test_style": "held-out drawing style (never seen in training)"}
# By kind of question, and overall: the exact match in percent of the model and of the two baselines.
Scores = dict[str, dict[str, float]]


def score_by_kind(train: Dataset, test: Dataset, answers: Sequence[str]) -> Scores:
    """
    Scores answers by kind of question and overall.

    Args:
        train (`datasets.Dataset`):
            What the blind guesses are learned from: rows with `question`, `answer` and `kind`.
        test (`datasets.Dataset`):
            The questions that were answered.
        answers (`Sequence[str]`):
            The model's answers, one per row of `test`.

    Returns:
        `dict[str, dict[str, float]]`: For `"overall"` and for each kind the exact match in percent of the `model`, and
        of `blind` and `most_frequent_answer` (see [`~toolbox.evaluation.blind_baseline`]).

    Raises:
        ValueError: If there are not as many answers as rows.
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
    Scores as a table for people.

    Args:
        scores (`Mapping[str, Mapping[str, float]]`):
            What [`score_by_kind`] returns.

    Returns:
        `str`: a line per kind of question; the last one is `overall`.
    """
    lines = [f"{'kind of question':<20}{'model':>8}{'blind':>8}{'most frequent answer':>22}"]
    for kind in [*(kind for kind in scores if kind != "overall"), "overall"]:
        row = scores[kind]
        lines.append(f"{kind:<20}{row['model']:>8.1f}{row['blind']:>8.1f}{row['most_frequent_answer']:>22.1f}")
    return "\n".join(lines)


def example_answers(train: Dataset, test: Dataset, answers: Sequence[str], count: int = 12) -> str:
    """
    The first questions as a table: right answer, the model's, and what guessing gives.

    Args:
        train (`datasets.Dataset`):
            What the blind guesses are learned from.
        test (`datasets.Dataset`):
            The questions.
        answers (`Sequence[str]`):
            The model's answers.
        count (`int`, defaults to 12):
            Number of questions.

    Returns:
        `str`: a line per question. What is too long for its column is cut.
    """
    blind = BlindBaseline(train)
    lines = [f"{'question':<56}{'right answer':<28}{'model':<28}{'blind':<20}{'most frequent'}"]
    for row, answer in zip(test.select_columns(["question", "answer", "kind"]).take(count), answers, strict=False):
        guess = blind.answer(row["question"], row["kind"])
        lines.append(
            f"{row['question']:<56.55}{row['answer']:<28.27}{answer:<28.27}{guess:<20.19}{blind.most_frequent:.19}"
        )
    return "\n".join(lines)
