"""Tokenizers for models that are trained from scratch: byte-level BPE, trained on the texts of the data."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MAX_VOCAB_SIZE = 1_000_000
PAD, IMAGE, START, END = "<pad>", "<image>", "<|im_start|>", "<|im_end|>"
VIDEO = "<video>"


def check_vocab_size(vocab_size: int) -> None:
    """Raises `ValueError` unless [`train_tokenizer`] accepts this size of the vocabulary."""
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len([PAD, IMAGE, START, END])
    if vocab_size < smallest:
        raise ValueError(f"`vocab_size` must be at least {smallest}, got {vocab_size}.")
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(f"`vocab_size` must be at most {MAX_VOCAB_SIZE}, got {vocab_size}.")


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024, videos: bool = False) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer (Sennrich et al., arXiv 1508.07909; on bytes as in GPT-2). It can encode any text.

    Args:
        texts (`Iterable[str]`):
            Texts to train the tokenizer on.
        vocab_size (`int`, *optional*, defaults to 1024):
            Largest size of the vocabulary, from 260 (256 bytes and 4 special tokens) to 1,000,000. It may be smaller if
            the texts do not contain enough different pairs of tokens.
        videos (`bool`, *optional*, defaults to `False`):
            Whether to add the special token `<video>` at the end of the vocabulary.

    Returns:
        `PreTrainedTokenizerFast`: A tokenizer with the special tokens `<pad>`, `<image>`, `<|im_start|>` and
        `<|im_end|>` (ids 0 to 3). `<|im_end|>` marks the end of a turn. The padding side is left.

    Raises:
        ValueError: If `vocab_size` is less than 260 or more than 1,000,000.
    """
    check_vocab_size(vocab_size)
    special_tokens = [PAD, IMAGE, START, END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - videos, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[IMAGE, START],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    if videos:
        trained.add_special_tokens({"extra_special_tokens": [VIDEO]}, replace_extra_special_tokens=False)
    return trained
