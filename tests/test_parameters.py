"""Numbers of parameters from the configuration equal those of the model, and those counted by hand."""

import time

import pytest
import torch

from modeling_sparse_moe_vlm import (
    SparseMoeVlmConfig,
    SparseMoeVlmForCausalLM,
    SparseMoeVlmForConditionalGeneration,
    SparseMoeVlmTextConfig,
)
from tests.support.models import make_config
from tests.test_configuration import CONFIGURATIONS, TOWERS

VIDEO = {"modalities": ["text", "image", "video"], "num_experts": 6}
CASES = CONFIGURATIONS | {
    "video": VIDEO,
    "isolated video": VIDEO | {"expert_groups": "isolated"},
    "biases, no QK-norm": {"attention_bias": True, "use_qk_norm": False, "head_dim": 6},
}


def count_by_hand(config, modality: str) -> int:
    """Counts the parameters that a token of the modality uses in the decoder and the language head."""
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    attention = hidden * queries + 2 * hidden * keys + queries * hidden
    attention += (queries + 2 * keys + hidden) if config.attention_bias else 0
    attention += 2 * head if config.use_qk_norm else 0
    total = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2) + hidden
    for layer in range(config.num_hidden_layers):
        total += attention + 2 * hidden
        groups = config.layer_expert_groups(layer)
        if not groups:
            total += 3 * hidden * config.intermediate_size
            continue
        total += hidden * sum(group.num_experts for group in groups if not group.always_on)  # router
        widths = []
        for group in groups:
            if modality in group.modalities and group.always_on:
                total += group.num_experts * 3 * hidden * group.intermediate_size
            elif modality in group.modalities:
                widths += [group.intermediate_size] * group.num_experts
        k = config.experts_per_token(modality)
        total += 3 * hidden * sum(sorted(widths)[-k:])
    return total


@pytest.mark.parametrize("name", CASES)
def test_total_is_that_of_the_model(name):
    config = make_config(**CASES[name])
    model = SparseMoeVlmForConditionalGeneration(config)
    assert config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    decoder = SparseMoeVlmForCausalLM(config.text_config)
    assert config.text_config.num_parameters() == sum(parameter.numel() for parameter in decoder.parameters())


@pytest.mark.parametrize("name", CASES)
def test_active_parameters_are_those_counted_by_hand(name):
    config = make_config(**CASES[name])
    text = config.text_config
    model = SparseMoeVlmForConditionalGeneration(config).model
    vision = sum(
        parameter.numel()
        for module in (model.vision_tower, model.multi_modal_projector)
        for parameter in module.parameters()
    )
    for modality in text.modalities:
        expected = count_by_hand(text, modality)
        assert text.num_active_parameters(modality) == expected
        assert config.num_active_parameters(modality) == expected + (vision if modality != "text" else 0)
    assert config.num_active_parameters() == config.num_active_parameters("text")


@pytest.mark.parametrize("model_type", TOWERS)
def test_any_vision_tower_is_counted(model_type):
    config = make_config({"model_type": model_type, "image_size": 32, "patch_size": 8, "num_hidden_layers": 1})
    model = SparseMoeVlmForConditionalGeneration(config)
    assert config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_a_known_large_model():
    """The sizes of Qwen3-235B-A22B (arXiv 2505.09388): 235 billion parameters, of which 22 are active."""
    text = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1536,
        "expert_groups": "joint",
    }
    start = time.perf_counter()
    config = SparseMoeVlmTextConfig(**text)
    assert config.num_parameters() == 235_093_634_560
    assert config.num_active_parameters() == count_by_hand(config, "text") == 22_190_763_520
    assert SparseMoeVlmConfig(text_config=text | {"expert_groups": "hybrid"}).num_active_parameters("image") > 22e9
    assert time.perf_counter() - start < 5


def test_counting_changes_no_state():
    config = make_config(**CONFIGURATIONS["many"])
    before, state = config.to_dict(), torch.get_rng_state()
    config.num_parameters()
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_device() == torch.device("cpu")


def test_unknown_modality():
    for config in (make_config(), make_config().text_config):
        with pytest.raises(ValueError, match=r"'smell'.*\['text', 'image'\]"):
            config.num_active_parameters("smell")
