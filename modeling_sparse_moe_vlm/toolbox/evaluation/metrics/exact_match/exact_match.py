"""The metric exact match, as an `evaluate` module that is loaded from this folder without a download."""

from collections.abc import Sequence

from modeling_sparse_moe_vlm.toolbox.evaluation import metric_modules


class ExactMatch(metric_modules.AnswerMetric):
    """The exact match of answers, see the summary."""

    summary = """
The share of predictions that equal one of their references, in percent. Differences in case, surrounding white space
and a final full stop are ignored.
"""

    @staticmethod
    def score_rows(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Returns 100 for each prediction that equals one of its references, and 0 for the others."""
        return [
            100.0 * any(is_right(prediction, reference) for reference in given)
            for prediction, given in zip(predictions, references, strict=True)
        ]


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer equals its reference, apart from case, surrounding white space and a final full stop."""
    return _normalise(answer) == _normalise(reference)


def _normalise(answer: str) -> str:
    return answer.strip().removesuffix(".").strip().lower()
