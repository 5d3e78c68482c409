"""LoRA on experts, run factored, over paged experts: outputs and gradients are those over resident ones."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_sparse_moe_vlm.toolbox.expert_lora import factor_expert_lora
from modeling_sparse_moe_vlm.toolbox.paging import page_experts
from tests.toolbox.test_paging import build, experts_of, from_disk, inputs_of


def adapt(model):
    targets = [f"{name}.{stack}" for name in experts_of(model) for stack in ("gate_up_proj", "down_proj")]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=targets))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return factor_expert_lora(model)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "pool"])
def test_gradients_of_adapters(name, implementation, tmp_path):
    model = build(name)
    inputs, results = inputs_of(model), []
    for base in (copy.deepcopy(model), copy.deepcopy(model), from_disk(model, tmp_path)):
        base.set_experts_implementation(implementation)
        if results:
            page_experts(base, 3)
        adapted = adapt(base)
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
