"""LoRA on experts on the device that `--device` names: factored equals PEFT's path there and on the CPU."""

import copy

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.expert_lora import factor_expert_lora
from tests.support.in_tree_moe import adapt, assert_equal, logits_and_gradients, make_inputs, make_model

IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "isolated"])
def test_factored_equals_peft(name, implementation, device):
    """Logits, gradients of every factor, and tokens."""
    model = make_model(name)
    model.set_experts_implementation(implementation)
    adapted, inputs = adapt(model), make_inputs(model)
    on_cpu = logits_and_gradients(adapted, inputs)
    adapted = adapted.to(device)
    inputs = {key: value.to(device) for key, value in inputs.items()}
    by_peft = logits_and_gradients(adapted, inputs)
    tokens = adapted.generate(**inputs, **GREEDY)
    factor_expert_lora(adapted)
    factored = logits_and_gradients(adapted, inputs)
    assert torch.equal(adapted.generate(**inputs, **GREEDY), tokens)
    assert_equal(factored[0], by_peft[0], 1e-4)
    assert_equal(factored[1], by_peft[1], 1e-3)
    assert_equal(factored[0].cpu(), on_cpu[0], 1e-4)
    assert_equal({name: gradient.cpu() for name, gradient in factored[1].items()}, on_cpu[1], 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision(implementation, dtype, device):
    # Every token uses every expert: otherwise rounding could change the choice. The reference has the rounded weights.
    model = make_model("qwen3_moe", num_experts=4, num_experts_per_tok=4)
    adapted, inputs = adapt(model), make_inputs(model)
    factor_expert_lora(adapted)
    exact = copy.deepcopy(adapted).to(dtype).double()
    exact.get_base_model().set_experts_implementation("eager")
    expected, expected_gradients = logits_and_gradients(exact, inputs)
    adapted = adapted.to(device, dtype)
    adapted.get_base_model().set_experts_implementation(implementation)
    logits, gradients = logits_and_gradients(adapted, {key: value.to(device) for key, value in inputs.items()})
    assert logits.dtype == dtype
    bound = 6.5 * torch.finfo(dtype).eps  # through two layers whose weights are large
    assert (logits.cpu().double() - expected).norm() / expected.norm() < bound
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        difference = (gradients[name].cpu().double() - gradient).norm() / gradient.norm()
        assert difference < 2 * bound, name
