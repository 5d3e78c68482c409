"""The metric VQA accuracy, as an `evaluate` module that is loaded from this folder without a download."""

import re
from collections.abc import Sequence

from modeling_sparse_moe_vlm.toolbox.evaluation import metric_modules

# So many annotators must give an answer for full accuracy.
ENOUGH = 3
_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The official table restores one missing apostrophe of these words. It has no entry for words such as "i'm", "let's",
# "she's" and "we'd".
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_APOSTROPHES = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


class VqaAccuracy(metric_modules.AnswerMetric):
    """The accuracy of VQA v2, see the summary."""

    summary = """
The accuracy of VQA v2, in percent: an answer is right if at least three of ten annotators gave it. For each annotator,
the answer is compared with those of the others, and is worth min(n / 3, 1) if n of them gave it; the accuracy is the
mean. Answers and references are normalised as in the official evaluation: case, articles, number words, missing
apostrophes and punctuation.

The official evaluation is only defined for ten answers. With three or fewer, all other annotators must have given the
answer for full accuracy (min(n / 2, 1) with three answers, n with two). A single reference is right or wrong.
"""
    urls = ("https://visualqa.org/evaluation.html",)

    @staticmethod
    def score_rows(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Returns the accuracy of each row in percent."""
        return [100.0 * accuracy(prediction, given) for prediction, given in zip(predictions, references, strict=True)]


def accuracy(prediction: str, references: Sequence[str]) -> float:
    """Returns the accuracy of an answer, from 0 to 1."""
    answer = normalise(prediction)
    same = [normalise(reference) == answer for reference in references]
    if len(same) == 1:
        return float(same[0])
    enough = min(ENOUGH, len(same) - 1)
    return sum(min((sum(same) - this) / enough, 1.0) for this in same) / len(same)


def normalise(answer: str) -> str:
    """Returns an answer in the normal form of the official evaluation."""
    return _normal_words(_without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))


def _without_punctuation(text: str) -> str:
    """
    Removes punctuation that stands next to a space, and all punctuation if there is a number such as 1,000. Otherwise,
    punctuation becomes a space. Periods are removed unless a digit follows.
    """
    result = text
    for mark in _PUNCTUATION:
        removed = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text) is not None
        result = result.replace(mark, "" if removed else " ")
    return _PERIOD.sub("", result)


def _normal_words(text: str) -> str:
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)
