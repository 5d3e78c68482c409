"""Continuous batching (`generate_batch`) answers texts as `generate` does, and refuses images."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmTextConfig
from modeling_sparse_moe_vlm.cache_name import is_paged
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
    ],
    ids=["hybrid", "text", "learned priors", "isolated, unequal priors"],
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


def test_prompts_with_images_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match=rf"prompt 1 has placeholder tokens \[{IMAGE_TOKEN_ID}\].*use `generate`"):
        model.generate_batch([[5, 6], [5, IMAGE_TOKEN_ID, 6]], greedy(), SMALL_CACHE)
    manager = model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=SMALL_CACHE)
    with pytest.raises(ValueError, match="continuous batching does not support images"):
        manager.add_request([IMAGE_TOKEN_ID])


def test_only_caches_without_a_length_count_as_paged():
    class Paged:
        pass

    class Cache:
        def get_seq_length(self):
            return 0

    assert [is_paged(cache) for cache in (None, Cache(), Paged())] == [False, False, True]
