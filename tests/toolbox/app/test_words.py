"""The words that the tokens of an answer form."""

import pytest

from modeling_sparse_moe_vlm.toolbox.app.words import words_of
from tests.support.processors import make_tokenizer


def split(pieces: list[str]) -> list[tuple[str, list[int]]]:
    """Returns the words of tokens for these pieces of text."""
    return words_of(list(range(len(pieces))), lambda ids: "".join(pieces[i] for i in ids))


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([], []),
        (["row", " 1", ",", " column", " 1"], [("row", [0]), ("1,", [1, 2]), ("column", [3]), ("1", [4])]),
        (["un", "believ", "able"], [("unbelievable", [0, 1, 2])]),
        ([" ", "cat", " ", "dog"], [("cat", [0, 1]), ("dog", [2, 3])]),
        (["cat", "\n", "\n", "dog"], [("cat", [0]), ("dog", [2, 3])]),
        (["cat ", "dog"], [("cat", [0]), ("dog", [1])]),
        (["cat", "", "s"], [("cats", [0, 2])]),
        (["猫", "と", "犬"], [("猫", [0]), ("と", [1]), ("犬", [2])]),
        (["cat", " "], [("cat", [0])]),
        ([" ", " "], []),
    ],
)
def test_words(pieces, words):
    assert split(pieces) == words


def test_bytes_of_a_character_are_one_word():
    """Byte-level tokens decode to a replacement character until the character is complete."""
    tokenizer = make_tokenizer()
    ids = tokenizer("é cat", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    words = words_of(ids, tokenizer.decode)
    assert [word for word, _ in words] == ["é", "cat"]
    assert words[0][1] == [0, 1]
    assert [token for _, tokens in words for token in tokens] == list(range(len(ids)))


def test_an_answer_that_ends_within_a_character_is_shown():
    tokenizer = make_tokenizer()
    (first, *_) = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert words_of([first], tokenizer.decode) == [("�", [0])]


def test_special_tokens_are_left_out():
    tokenizer = make_tokenizer()
    ids = [*tokenizer("cat", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    words = words_of(ids, lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True))
    assert words == [("cat", list(range(len(ids) - 1)))]
