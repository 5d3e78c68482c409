"""Tokens of captions for CIDEr-D and ROUGE-L."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# Describes the argument `tokenized` of metrics that call `split_captions`.
TOKENIZED = """
    tokenized (`bool`, defaults to `False`): Whether texts are tokenized, so that they are only split at white space. By
        default, they are put in lower case and split into words without punctuation, with rules close to those of the
        Penn Treebank tokenizer of the COCO caption evaluation.
"""

_CLITICS = "s|m|d|re|ve|ll"
_TOKEN = re.compile(
    rf"""
    \d+(?:[.,:]\d+)+        # numbers and times: 1,000 or 3.5 or 10:30
    | '(?:{_CLITICS})\b     # clitics, which are separated from their word
    | \w+(?:[-']\w+)*       # words, also with hyphens or apostrophes: t-shirt, o'clock, n't
    | [^\w\s]               # symbols, and punctuation, which is removed
    """,
    re.VERBOSE,
)
_KEPT = "%&#@"  # Unicode counts them as punctuation


def caption_tokens(text: str) -> list[str]:
    """
    Splits a caption into tokens in lower case, without punctuation.

    The rules are those of the Penn Treebank tokenizer of the COCO caption evaluation where they matter for captions:
    clitics are tokens (`dog's` is `dog 's`, `don't` is `do n't`), words with hyphens and numbers such as `1,000` stay
    whole, and punctuation is removed. Unlike that tokenizer, which is a Java program, this function does not know
    abbreviations (`u.s.` is `u s`), and does not split words such as `cannot` and `gonna`.

    Args:
        text (`str`):
            The caption.

    Returns:
        `list[str]`: The tokens.
    """
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    text = re.sub(r"(?<=\w)n't\b", " n't", text)
    text = re.sub(rf"(?<=\w)'({_CLITICS})\b", r" '\1", text)
    return [token for token in _TOKEN.findall(text) if not _is_punctuation(token)]


def _is_punctuation(token: str) -> bool:
    return len(token) == 1 and token not in _KEPT and (token == "`" or unicodedata.category(token).startswith("P"))


def split_captions(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenized: bool
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Returns the tokens of predictions and references. With `tokenized`, the texts are only split at white space."""
    split = str.split if tokenized else caption_tokens
    return [split(text) for text in predictions], [[split(text) for text in texts] for texts in references]
