"""Costs of models: parameters, bytes and operations per token, compared with counts by hand."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen3MoeConfig

from modeling_sparse_moe_vlm.toolbox.meta_model import model_on_meta_device
from modeling_sparse_moe_vlm.toolbox.upcycling.costs import Costs, costs_of, costs_table
from tests.support.models import make_config

DECODER = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
ATTENTION = 2 * 16 * 16 + 2 * 8 * 16
LAYER = ATTENTION + 3 * 16 * 24
NORMS = 2 * 2 * 16 + 16
EMBEDDINGS = 50 * 16


@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_language_model(tied):
    """The head is a multiplication, whether or not it is tied to the embedding, which is a lookup."""
    total = 2 * LAYER + NORMS + EMBEDDINGS * (1 if tied else 2)
    assert costs_of(LlamaConfig(**DECODER, tie_word_embeddings=tied)) == Costs(
        total=total,
        active={"text": total},
        bytes={"float32": 4 * total, "bfloat16": 2 * total},
        flops_per_token={"text": 2 * (2 * LAYER + EMBEDDINGS)},
    )


def test_a_model_without_weights():
    config = LlamaConfig(**DECODER)
    model = model_on_meta_device(config)
    assert costs_of(model) == costs_of(config)
    assert all(parameter.device == torch.device("meta") for parameter in model.parameters())


def test_encoders_are_in_the_parameters_but_not_in_the_operations():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = costs_of(LlamaConfig(**DECODER))
    costs = costs_of(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**DECODER)))
    assert costs.active == {"text": text.total, "image": costs.total}
    assert costs.total > text.total
    assert costs.flops_per_token == dict.fromkeys(["text", "image"], text.flops_per_token["text"])


def test_a_mixture_of_experts_of_the_library():
    config = Qwen3MoeConfig(**DECODER, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=3)
    layer = ATTENTION + 4 * 16 + 3 * 3 * 16 * 12
    assert costs_of(config).flops_per_token == {"text": 2 * (2 * layer + EMBEDDINGS)}


def test_by_modality():
    """Two of four experts for text, one for an image, and an always-on expert of another width for each."""
    always_on = [
        {"name": "text", "num_experts": 1, "modalities": ["text"], "intermediate_size": 40, "always_on": True},
        {"name": "image", "num_experts": 1, "modalities": ["image"], "intermediate_size": 8, "always_on": True},
    ]
    config = make_config(
        expert_groups=[{"name": "joint", "num_experts": 4, "intermediate_size": 24}, *always_on],
        num_experts_per_tok=2,
        num_experts_per_tok_by_modality={"image": 1},
    )
    rest = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 4 * 32) + 99 * 32
    costs = costs_of(config)
    assert costs.flops_per_token == {
        "text": 2 * (rest + 2 * 3 * 32 * (2 * 24 + 40)),
        "image": 2 * (rest + 2 * 3 * 32 * (24 + 8)),
    }
    assert costs.active == {name: config.num_active_parameters(name) for name in ("text", "image")}
    assert costs.bytes == {"float32": 4 * config.num_parameters(), "bfloat16": 2 * config.num_parameters()}


def test_as_a_table():
    dense = Costs(1000, {"text": 900}, {"float32": 4000, "bfloat16": 2000}, {"text": 1800})
    sparse = Costs(
        5_000_000,
        {"text": 950, "image": 1100},
        {"float32": 20_000_000, "bfloat16": 10_000_000},
        {"text": 2, "image": 3},
    )
    assert costs_table({"dense": dense, "sparse": sparse}).splitlines() == [
        "|  | dense | sparse |",
        "| --- | --- | --- |",
        "| parameters | 1.0 k | 5.0 M |",
        "| active per text token | 900 | 950 |",
        "| active per image token | – | 1.1 k |",
        "| weights in float32 | 4.0 kB | 20.0 MB |",
        "| weights in bfloat16 | 2.0 kB | 10.0 MB |",
        "| FLOPs per text token | 1.8 k | 2 |",
        "| FLOPs per image token | – | 3 |",
    ]
    assert sparse.to_dict()["flops_per_token"] == {"text": 2, "image": 3}
