"""Splits an answer into words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What tokenizers decode the bytes of an incomplete character to.
_INCOMPLETE = "�"
# From this character on, scripts have no spaces between words, such as Chinese and Japanese.
_FIRST_WITHOUT_SPACES = "⺀"


def words_of(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[tuple[str, list[int]]]:
    """
    Splits an answer into words, at its spaces and line breaks. In scripts without spaces, every token is a word.

    Args:
        token_ids (`Sequence[int]`):
            Tokens of the answer.
        decode (`Callable`):
            Decodes tokens to text, without special tokens.

    Returns:
        `list[tuple[str, list[int]]]`: Every word with the numbers of its tokens. Tokens without text are left out.
    """
    words: list[tuple[str, list[int]]] = []
    text, waiting = "", []
    for number in range(len(token_ids)):
        whole = decode(token_ids[: number + 1])
        waiting.append(number)
        if whole.endswith(_INCOMPLETE) and number + 1 < len(token_ids):
            continue
        piece, tokens = whole[len(text) :], waiting
        text, waiting = whole, []
        if not piece:
            continue
        before = words[-1][0] if words else ""
        is_after_space = before[-1:].isspace() and not before.isspace()
        if not words or piece[0].isspace() or is_after_space or piece[0] >= _FIRST_WITHOUT_SPACES:
            words.append((piece, tokens))
        else:
            words[-1] = (before + piece, words[-1][1] + tokens)
    return [(word.strip(), tokens) for word, tokens in words if word.strip()]
