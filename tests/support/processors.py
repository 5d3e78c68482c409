"""A tokenizer, images and a processor for the small models of `models.py`."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, SiglipImageProcessorPil

from modeling_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmForConditionalGeneration, SparseMoeVlmProcessor
from tests.support.models import make_config

# Ids 0 to 3, as in `models.TEXT_CONFIG`.
SPECIAL_TOKENS = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>"]
VOCAB_SIZE = 280
IMAGE_SEQ_LENGTH = 4


def make_tokenizer(image_token: str = "<image>", normalizer=None) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer with a few merges, for which no text is unknown."""
    special_tokens = [*SPECIAL_TOKENS[:3], image_token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the image of the cat sat on the mat"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>", padding_side="left"
    )


def make_image_processor(size: int = 16, **kwargs) -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(size={"height": size, "width": size}, **kwargs)


def make_processor(**kwargs) -> SparseMoeVlmProcessor:
    image_token = kwargs.get("image_token", "<image>")
    tokenizer = make_tokenizer(image_token, kwargs.pop("normalizer", None))
    return SparseMoeVlmProcessor(make_image_processor(), tokenizer, image_seq_length=IMAGE_SEQ_LENGTH, **kwargs)


def make_image(seed: int = 0, width: int = 20, height: int = 24) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_speaking_config(**text_config) -> SparseMoeVlmConfig:
    """Returns a configuration with the vocabulary of [`make_tokenizer`]."""
    return make_config(vocab_size=VOCAB_SIZE, **text_config)


def make_speaking_model(**text_config) -> SparseMoeVlmForConditionalGeneration:
    torch.manual_seed(0)
    return SparseMoeVlmForConditionalGeneration(make_speaking_config(**text_config)).eval()


def speak_printably(model):
    """Makes the model generate up to the maximum length, and only printable text. Returns it."""
    tokenizer = make_tokenizer()
    texts = [tokenizer.decode([token]) for token in range(VOCAB_SIZE)]
    model.generation_config.suppress_tokens = [
        token
        for token, text in enumerate(texts)
        if token < len(SPECIAL_TOKENS) or not (text.isascii() and text.isprintable())
    ]
    return model


def user(*parts) -> dict:
    """Returns a message of a user: strings are texts, anything else is an image."""
    return {"role": "user", "content": [_part(part) for part in parts]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _part(part) -> dict:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
