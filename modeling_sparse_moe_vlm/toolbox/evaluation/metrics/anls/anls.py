"""The metric ANLS, as an `evaluate` module that is loaded from this folder without a download."""

from collections.abc import Sequence

from modeling_sparse_moe_vlm.toolbox.evaluation import metric_modules

# Answers that are less similar than this are wrong.
THRESHOLD = 0.5


class Anls(metric_modules.AnswerMetric):
    """The average normalised Levenshtein similarity, see the summary."""

    summary = """
The average normalised Levenshtein similarity of DocVQA, in percent: 1 minus the edit distance divided by the length of
the longer text, for the most similar reference. A similarity below 0.5 counts as 0. Case and the amount of white space
are ignored.
"""
    urls = ("https://rrc.cvc.uab.es/?ch=17&com=tasks",)

    @staticmethod
    def score_rows(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Returns the similarity of each row in percent."""
        return [
            100.0 * max(similarity(prediction, reference) for reference in given)
            for prediction, given in zip(predictions, references, strict=True)
        ]


def similarity(answer: str, reference: str) -> float:
    """Returns the normalised Levenshtein similarity, or 0 if it is below the threshold."""
    first, second = (" ".join(text.lower().split()) for text in (answer, reference))
    longest = max(len(first), len(second))
    if longest == 0:
        return 1.0
    value = 1 - edit_distance(first, second) / longest
    return value if value >= THRESHOLD else 0.0


def edit_distance(first: str, second: str) -> int:
    """Returns the number of insertions, deletions and replacements of characters that turn one text into the other."""
    distances = list(range(len(second) + 1))
    for i, character in enumerate(first):
        diagonal, distances[0] = distances[0], i + 1
        for j, other in enumerate(second):
            replaced = diagonal + (character != other)
            diagonal = distances[j + 1]
            distances[j + 1] = min(replaced, diagonal + 1, distances[j] + 1)
    return distances[-1]
