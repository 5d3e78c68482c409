"""Recall at k and median rank, as an `evaluate` module that is loaded from this folder without a download."""

import statistics
from collections.abc import Sequence

import datasets
import evaluate

_DESCRIPTION = """
Recall at 1, 5 and 10 in percent (the share of queries that have at least one right candidate among their first k), and
the median rank of the first right candidate, counted from 1.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[str]]`): Ids of the candidates of each query, best first.
    references (`list[list[str]]`): Ids of the right candidates of each query.

Returns:
    `dict[str, float]`: `recall@1`, `recall@5` and `recall@10`, from 0 to 100, and `median_rank`, which is infinite if
    half of the queries or more have no right candidate in their list.
"""

CUTOFFS = (1, 5, 10)


class RetrievalRecall(evaluate.Metric):
    """Recall at k and median rank, see the description."""

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": ids, "references": ids}),
        )

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        ranks = [first_rank(found, right) for found, right in zip(predictions, references, strict=True)]
        return recall_of_ranks(ranks)


def first_rank(found: list[str], right: list[str]) -> float:
    """Returns the position of the first right candidate, counted from 1, or infinity if there is none."""
    return next((float(rank) for rank, item in enumerate(found, 1) if item in right), float("inf"))


def recall_of_ranks(ranks: Sequence[float]) -> dict[str, float]:
    """Returns recall at 1, 5 and 10 in percent, and the median rank, of the ranks of the first right candidates."""
    recall = {f"recall@{k}": 100.0 * sum(rank <= k for rank in ranks) / len(ranks) for k in CUTOFFS}
    return recall | {"median_rank": float(statistics.median(ranks))}
