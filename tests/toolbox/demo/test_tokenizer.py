"""The tokenizer of models that are trained from scratch: special tokens, and lossless encoding of any text."""

import pytest

from modeling_sparse_moe_vlm.toolbox.demo import train_tokenizer

SPECIAL_TOKENS = ["<pad>", "<image>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat and the dog"] * 3, vocab_size=270)


def test_special_tokens(tokenizer):
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == [0, 1, 2, 3]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<|im_end|>")
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert tokenizer.tokenize("a<image>b<|im_start|><|im_end|><pad>") == [
        "a",
        "<image>",
        "b",
        *SPECIAL_TOKENS[2:],
        "<pad>",
    ]
    assert tokenizer.padding_side == "left"
    assert tokenizer(["a", "aa a"], padding=True)["input_ids"][0][0] == 0


def test_merges_what_is_frequent(tokenizer):
    assert len(tokenizer) == 270
    assert len(train_tokenizer(["ab"], vocab_size=1000)) == 4 + 256 + 1, "there are no more pairs to merge"
    assert train_tokenizer(["ab"] * 2, vocab_size=261).tokenize("abab") == ["ab", "ab"]


@pytest.mark.parametrize("text", ["a cat", " a  cat .", "it 's , n't !", "größer 猫 🐈\n\ttab", "\x00\x7f", ""])
def test_any_text_is_decoded_as_it_was(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(4 <= token < 270 for token in ids)


def test_size_of_the_vocabulary():
    assert len(train_tokenizer(["abc abc"], vocab_size=260)) == 260
    assert len(train_tokenizer(["abc abc abcabc " * 200], vocab_size=262)) == 262
    with pytest.raises(ValueError, match="`vocab_size` must be at least 260, got 259"):
        train_tokenizer(["abc"], vocab_size=259)
