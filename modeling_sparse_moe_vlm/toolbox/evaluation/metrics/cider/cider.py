"""The metric CIDEr-D, as an `evaluate` module that is loaded from this folder without a download."""

import math
from collections import Counter
from collections.abc import Sequence

from modeling_sparse_moe_vlm.toolbox.evaluation import caption_tokens, metric_modules

LONGEST = 4  # words of an n-gram
SIGMA = 6.0
SCALE = 10.0


class Cider(metric_modules.AnswerMetric):
    """CIDEr-D, see the summary."""

    summary = """
CIDEr-D of captions, from 0 to 10: for n-grams of one to four words, the cosine similarity of their counts, weighted by
the logarithm of how rare an n-gram is among the references of all rows. Counts are clipped to those of the reference,
and a Gaussian (sigma = 6) of the difference in length lowers the score. The score of a row is the mean over its
references and over the four lengths of n-grams, times 10. Since rareness is measured over the rows, a single row scores
0. Publications often report the value times 100.
"""
    further_arguments = caption_tokens.TOKENIZED
    urls = ("https://arxiv.org/abs/1411.5726",)

    @staticmethod
    def score_rows(
        predictions: Sequence[str], references: Sequence[Sequence[str]], tokenized: bool = False
    ) -> list[float]:
        """Returns CIDEr-D of each row."""
        words, words_of_references = caption_tokens.split_captions(predictions, references, tokenized)
        counts_of_references = [[_count(one) for one in given] for given in words_of_references]
        # In how many rows an n-gram occurs in a reference.
        frequencies = Counter(ngram for given in counts_of_references for ngram in set().union(*given))
        num_rows = len(words)
        scores = []
        for prediction, given, counts in zip(words, words_of_references, counts_of_references, strict=True):
            vectors = _weighted(_count(prediction), frequencies, num_rows)
            total = sum(
                _similarity(vectors, _weighted(one, frequencies, num_rows), len(prediction) - len(reference))
                for reference, one in zip(given, counts, strict=True)
            )
            scores.append(SCALE * total / len(given))
        return scores


_NGram = tuple[str, ...]


def _count(words: list[str]) -> Counter[_NGram]:
    return Counter(
        tuple(words[start : start + length])
        for length in range(1, LONGEST + 1)
        for start in range(len(words) - length + 1)
    )


def _weighted(counts: Counter[_NGram], frequencies: Counter[_NGram], num_rows: int) -> list[dict[_NGram, float]]:
    """Returns the weighted counts of n-grams, by the length of the n-gram."""
    vectors: list[dict[_NGram, float]] = [{} for _ in range(LONGEST)]
    for ngram, count in counts.items():
        rareness = math.log(num_rows) - math.log(max(1, frequencies[ngram]))
        vectors[len(ngram) - 1][ngram] = count * rareness
    return vectors


def _similarity(vectors: list[dict[_NGram, float]], of_reference: list[dict[_NGram, float]], difference: int) -> float:
    """Returns the mean similarity over the lengths of n-grams. `difference` is that of the numbers of words."""
    total = 0.0
    for vector, other in zip(vectors, of_reference, strict=True):
        product = sum(min(weight, other[ngram]) * other[ngram] for ngram, weight in vector.items() if ngram in other)
        norms = math.hypot(*vector.values()) * math.hypot(*other.values())
        total += product / norms if norms else 0.0
    return total / LONGEST * math.exp(-(difference**2) / (2 * SIGMA**2))
