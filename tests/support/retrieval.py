"""Small retrieval models, and rows of images with captions for them."""

import torch

from modeling_sparse_moe_vlm import SparseMoeVlmForImageTextRetrieval, SparseMoeVlmRetrievalConfig
from tests.support.models import IMAGE_TOKEN_ID, TEXT_CONFIG, VISION_CONFIG
from tests.support.processors import VOCAB_SIZE, make_image


def make_retrieval_config(text_config: dict | None = None, **fields) -> SparseMoeVlmRetrievalConfig:
    """Returns a configuration with the vocabulary of [`~tests.support.processors.make_tokenizer`]."""
    return SparseMoeVlmRetrievalConfig(
        text_config=TEXT_CONFIG | {"vocab_size": VOCAB_SIZE} | (text_config or {}),
        vision_config=VISION_CONFIG,
        image_token_id=IMAGE_TOKEN_ID,
        **fields,
    )


def make_retrieval_model(text_config: dict | None = None, **fields) -> SparseMoeVlmForImageTextRetrieval:
    torch.manual_seed(0)
    return SparseMoeVlmForImageTextRetrieval(make_retrieval_config(text_config, **fields)).eval()


def make_pairs(number: int = 4, captions: int = 1) -> list[dict]:
    """Returns rows of images with captions of unequal length."""
    return [
        {
            "image": make_image(seed),
            "captions": [f"the cat {'sat ' * (seed + i)}on mat {seed} {i}" for i in range(captions)],
        }
        for seed in range(number)
    ]
