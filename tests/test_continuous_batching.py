"""Continuous batching (`generate_batch`) answers texts as `generate` does, and refuses images."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmTextConfig
from modeling_sparse_moe_vlm.cache_name import is_paged
from tests.support import upcycled
from tests.support.in_tree_models import VIDEO
from tests.support.models import IMAGE_TOKEN_ID, TEXT_CONFIG, make_model

# By default, the cache uses most of the free memory.
SMALL_CACHE = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [40, 41]]


def make_text_model(**text_config) -> SparseMoeVlmForCausalLM:
    torch.manual_seed(0)
    return SparseMoeVlmForCausalLM(SparseMoeVlmTextConfig(**TEXT_CONFIG | text_config)).eval()


def make_with_priors() -> torch.nn.Module:
    """Returns a model with unequal learned priors, so that attention would be distributed if there were images."""
    model = make_model(learned_modality_priors=True)
    for layer in model.model.language_model.layers:
        torch.nn.init.normal_(layer.self_attn.modality_log_priors)
    return model


def greedy(**options) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=98, pad_token_id=0, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "make",
    [
        make_model,
        make_text_model,
        make_with_priors,
        lambda: make_model(expert_groups="isolated", alpha_init=0.9, num_experts_per_tok_by_modality={"image": 1}),
        upcycled.make_upcycled,
    ],
    ids=["hybrid", "text", "learned priors", "isolated, unequal priors", "upcycled"],
)
def test_texts_are_answered_as_by_generate(make, attention):
    model = make()
    model.set_attn_implementation(attention)
    expected = [
        model.generate(torch.tensor([prompt]), generation_config=greedy())[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    outputs = model.generate_batch(PROMPTS, greedy(), SMALL_CACHE)
    assert [output.error for output in outputs.values()] == [None] * 3
    assert [output.generated_tokens for output in outputs.values()] == expected


@pytest.mark.parametrize(
    ("make", "placeholders"),
    [
        (make_model, {IMAGE_TOKEN_ID}),
        (lambda: upcycled.make_few_experts("llava", "joint"), {upcycled.IMAGE}),
        (lambda: upcycled.make_few_experts("qwen3_vl", "isolated"), {upcycled.IMAGE, VIDEO}),
    ],
    ids=["ours", "upcycled LLaVA", "upcycled Qwen3-VL"],
)
def test_prompts_with_images_are_refused(make, placeholders):
    model = make()
    assert model.placeholder_tokens() == placeholders
    for token in placeholders:
        message = rf"prompt 1 has placeholder tokens \[{token}\].*does not support images: use `generate`"
        with pytest.raises(ValueError, match=message):
            model.generate_batch([[5, 6], [5, token, 6]], greedy(), SMALL_CACHE)
    manager = model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=SMALL_CACHE)
    with pytest.raises(ValueError, match="continuous batching does not support images"):
        manager.add_request([token])
    with pytest.raises(ValueError, match=rf"placeholder tokens \[{token}\]"):
        manager.add_requests([[5], [torch.tensor(token)]])


def test_models_without_placeholders_accept_every_token():
    assert upcycled.make_few_experts("llama").placeholder_tokens() == set()


def test_only_caches_without_a_length_count_as_paged():
    class Paged:
        pass

    class Cache:
        def get_seq_length(self):
            return 0

    assert [is_paged(cache) for cache in (None, Cache(), Paged())] == [False, False, True]
