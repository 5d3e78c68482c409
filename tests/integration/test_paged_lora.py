"""Factored LoRA on paged experts: outputs and gradients equal those on experts in memory."""

import copy
from functools import partial

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.expert_lora import factor_expert_lora
from modeling_sparse_moe_vlm.toolbox.paging import page_experts, unpage_experts
from tests.support.in_tree_moe import adapt, assert_equal
from tests.toolbox.paging.test_paging import build, from_disk, inputs_of


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "pool"])
def test_gradients_of_adapters(name, implementation, tmp_path):
    model = build(name)
    inputs, results = inputs_of(model), []
    for base in (copy.deepcopy(model), copy.deepcopy(model), from_disk(model, tmp_path)):
        base.set_experts_implementation(implementation)
        if results:
            page_experts(base, 3)
        adapted = factor_expert_lora(adapt(base, r=4, lora_alpha=8))
        output = adapted(**inputs, labels=inputs["input_ids"])
        output.loss.backward()
        gradients = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        results.append((output.logits, gradients))
    (expected, gradients), *paged = results
    assert (expected - model(**inputs).logits).abs().max() > 1e-2
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-2
    for logits, ours in paged:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "isolated"])
def test_merged_into_paged_experts(name, safe_merge):
    """Slots that were filled before merging must not be used afterwards."""
    model = build(name)
    inputs = inputs_of(model)
    adapted = factor_expert_lora(adapt(copy.deepcopy(model)))
    expected = adapted(**inputs).logits
    page_experts(adapted, 12)  # all of them
    for merge in (partial(adapted.merge_adapter, safe_merge=safe_merge), adapted.unmerge_adapter):
        assert_equal(adapted(**inputs).logits, expected)
        merge()
    merged = adapted.merge_and_unload(safe_merge=safe_merge)
    assert_equal(merged(**inputs).logits, expected)
    unpage_experts(merged)
    assert_equal(merged(**inputs).logits, expected)
    assert (expected - model(**inputs).logits).abs().max() > 0.1


@torch.no_grad()
def test_experts_in_files_are_not_merged_into(tmp_path):
    """Changes to a privately mapped file are lost when an expert loses its slot."""
    model = build("qwen3_moe")
    loaded = from_disk(model, tmp_path)
    page_experts(loaded, 3)
    adapted = factor_expert_lora(adapt(loaded))
    with pytest.raises(ValueError, match="is offloaded, so no adapter can be merged into it"):
        adapted.merge_adapter()
