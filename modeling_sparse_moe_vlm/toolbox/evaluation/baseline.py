"""The blind baseline: how many questions can be answered without looking at the images."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from datasets import Dataset

from .metrics.exact_match.exact_match import is_right

# Minimum counts of a question to try. A question that occurs only once in training cannot be in both halves.
LEAST_COUNTS = tuple(2**power for power in range(1, 9))
# Number of standard deviations from which on a gain does not count as luck.
CLEAR = 2.0


class BlindBaseline:
    """
    Answers questions without looking at the image, from the training answers.

    The guess is the most frequent training answer to the same question. If there is none, it is the most frequent
    answer to questions of the same kind, and for an unknown kind, the most frequent answer overall.

    The most frequent of only a few answers is mostly luck. Therefore, the answers to the same question are used only if
    the question occurs often enough in training. The minimum count is chosen for each kind of question by
    cross-validation on two halves of the training rows. If the answers to the same question are not clearly better
    there, the answer of the kind is used.

    Args:
        train (`datasets.Dataset`):
            Training rows with the columns `question`, `answer` and `kind`, all strings.

    Raises:
        ValueError: If `train` has no rows.
    """

    def __init__(self, train: Dataset) -> None:
        rows = _rows(train)
        if not rows:
            raise ValueError("`train` has no rows to learn guesses from: pass at least one.")
        self.most_frequent = _mode(Counter(row.answer for row in rows))
        self.most_frequent_of_kind = _modes(_answers(rows, "kind"))
        by_question = _answers(rows, "question")
        self._of_question = _modes(by_question)
        self._seen = {question: answers.total() for question, answers in by_question.items()}
        self._least_count = _least_counts(rows)

    def answer(self, question: str, kind: str) -> str:
        """
        Guesses the answer to a question.

        Args:
            question (`str`):
                The question.
            kind (`str`):
                The kind of question, as in the column `kind` of the training rows.

        Returns:
            `str`: The guessed answer.
        """
        if kind in self._least_count and self._seen.get(question, 0) >= self._least_count[kind]:
            return self._of_question[question]
        return self.most_frequent_of_kind.get(kind, self.most_frequent)


def blind_baseline(train: Dataset, test: Dataset) -> dict[str, dict[str, float]]:
    """
    Measures how well questions can be answered without the images. A model that uses the images has to score higher.

    Args:
        train (`datasets.Dataset`):
            Rows to learn the guesses from, with the columns `question`, `answer` and `kind`, all strings.
        test (`datasets.Dataset`):
            Rows to answer, with the same columns.

    Returns:
        `dict[str, dict[str, float]]`: For `"overall"` and for each kind of question, the exact match in percent of two
        baselines: `blind` (see [`BlindBaseline`]) and `most_frequent_answer` (for `"overall"`, the same answer to all
        questions; for a kind, the most frequent answer of that kind).

    Raises:
        ValueError: If `train` has no rows.
    """
    guess = BlindBaseline(train)
    blind: dict[str, list[bool]] = defaultdict(list)
    frequent: dict[str, list[bool]] = defaultdict(list)
    for question, answer, kind in _rows(test):
        right = is_right(guess.answer(question, kind), answer)
        blind["overall"].append(right)
        blind[kind].append(right)
        frequent["overall"].append(is_right(guess.most_frequent, answer))
        frequent[kind].append(is_right(guess.most_frequent_of_kind.get(kind, guess.most_frequent), answer))
    return {
        kind: {
            "blind": 100 * sum(blind[kind]) / len(blind[kind]),
            "most_frequent_answer": 100 * sum(frequent[kind]) / len(frequent[kind]),
        }
        for kind in blind
    }


class _Row(NamedTuple):
    question: str
    answer: str
    kind: str


def _rows(examples: Dataset) -> list[_Row]:
    return [_Row(*texts) for texts in zip(*(examples[column][:] for column in _Row._fields), strict=True)]


def _answers(rows: Iterable[_Row], by: str) -> dict[str, Counter[str]]:
    """Returns the count of each answer, grouped by question or by kind."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        answers[getattr(row, by)][row.answer] += 1
    return dict(answers)


def _modes(answers: dict[str, Counter[str]]) -> dict[str, str]:
    return {key: _mode(counts) for key, counts in answers.items()}


def _mode(counts: Counter[str]) -> str:
    return counts.most_common(1)[0][0]


def _least_counts(rows: list[_Row]) -> dict[str, int]:
    """
    Returns, for each kind, the minimum count of a question from which on the answers to the same question are used. A
    kind for which these answers do not help has no entry.
    """
    halves: tuple[list[_Row], list[_Row]] = ([], [])
    seen: Counter[str] = Counter()
    for row in rows:
        halves[seen[row.question] % 2].append(row)
        seen[row.question] += 1

    # By kind, for each question: its count, and whether the answer to the same question instead of the answer of the
    # kind turns a wrong guess into a right one (1), changes nothing (0) or turns a right guess into a wrong one (-1).
    outcomes: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for known, held_back in (halves, halves[::-1]):
        of_question, of_kind = _modes(_answers(known, "question")), _modes(_answers(known, "kind"))
        for question, answer, kind in held_back:
            if question in of_question and kind in of_kind:
                won = is_right(of_question[question], answer) - is_right(of_kind[kind], answer)
                outcomes[kind].append((seen[question], won))

    chosen = {}
    for kind, pairs in outcomes.items():
        gains = {least: _clear_gain([won for count, won in pairs if count >= least]) for least in LEAST_COUNTS}
        best = max(LEAST_COUNTS, key=lambda least: gains[least])
        if gains[best] > 0:
            chosen[kind] = best
    return chosen


def _clear_gain(outcomes: list[int]) -> int:
    """
    Returns the sum of the outcomes, or 0 if it may be due to luck: the standard deviation of a sum of n outcomes is at
    most √n.
    """
    gain = sum(outcomes)
    return gain if gain > CLEAR * len(outcomes) ** 0.5 else 0
