"""The metric BLEU-4, as an `evaluate` module that is loaded from this folder without a download."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from sacrebleu.metrics import BLEU

from modeling_sparse_moe_vlm.toolbox.evaluation import metric_modules


class Bleu(metric_modules.AnswerMetric):
    """BLEU-4, see the summary."""

    summary = """
BLEU-4 of all predictions together, from 0 to 100, computed by sacreBLEU with its defaults (tokenizer `13a`, case
matters, exponential smoothing). Rows can have different numbers of references. It is not defined for single rows.
"""
    further_arguments = """
    tokenized (`bool`, defaults to `False`): Whether texts are tokenized, so that they are only split at white space.
"""
    urls = ("https://github.com/mjpost/sacrebleu",)

    def _compute(
        self, predictions: list[str], references: list[list[str]] | list[str], **kwargs: Any
    ) -> dict[str, float]:
        return {self.name: score(predictions, metric_modules.as_lists(references), **kwargs)}


def score(predictions: Sequence[str], references: Sequence[Sequence[str]], tokenized: bool = False) -> float:
    """Returns BLEU-4 of all rows together."""
    # sacreBLEU takes the first references of all rows, then the second ones, and so on, with `None` for those that a
    # row lacks.
    streams = list(zip_longest(*references))
    metric = BLEU(tokenize="none", force=True) if tokenized else BLEU()
    return metric.corpus_score(list(predictions), streams).score
