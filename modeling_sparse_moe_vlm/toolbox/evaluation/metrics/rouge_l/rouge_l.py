"""The metric ROUGE-L, as an `evaluate` module that is loaded from this folder without a download."""

from collections.abc import Sequence

from modeling_sparse_moe_vlm.toolbox.evaluation import caption_tokens, metric_modules

BETA = 1.2  # as in the COCO caption evaluation


class RougeL(metric_modules.AnswerMetric):
    """ROUGE-L, see the summary."""

    summary = """
ROUGE-L, in percent, as in the COCO caption evaluation: the F-measure (beta = 1.2) of the longest common subsequence of
words. Precision and recall are those of the reference for which each is highest.
"""
    further_arguments = caption_tokens.TOKENIZED
    urls = ("https://aclanthology.org/W04-1013/",)

    @staticmethod
    def score_rows(
        predictions: Sequence[str], references: Sequence[Sequence[str]], tokenized: bool = False
    ) -> list[float]:
        """Returns ROUGE-L of each row in percent."""
        words, words_of_references = caption_tokens.split_captions(predictions, references, tokenized)
        return [
            100.0 * f_measure(prediction, given) for prediction, given in zip(words, words_of_references, strict=True)
        ]


def f_measure(prediction: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns the F-measure, from 0 to 1. It is 0 if there is no common word."""
    common = [longest_common_subsequence(prediction, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(prediction)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True) if reference)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Returns the number of words of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second):
            diagonal, lengths[j + 1] = (
                lengths[j + 1],
                diagonal + 1 if word == other else max(lengths[j], lengths[j + 1]),
            )
    return lengths[-1]
