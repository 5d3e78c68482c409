"""LoRA on experts, factored, against PEFT's own path, which adds W + BA up."""

import copy

import pytest
import torch
from torch import nn

from modeling_sparse_moe_vlm.toolbox.expert_lora import factor_expert_lora
from tests.in_tree_moe import (
    MODELS,
    adapt,
    adapter_tensors,
    assert_equal,
    experts_of,
    logits_and_gradients,
    make_inputs,
    make_model,
)

IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
SIZES = {
    "odd": {},
    "square": {"width": 32},  # gates: 2 · 16 = 32 below
    "E = r": {"num_experts": 4},
    "small": {"hidden_size": 20, "width": 12, "num_experts": 6},
}


@torch.no_grad()
def without_adapter(model, inputs):
    with model.disable_adapter():
        return model(**inputs).logits


def assert_matters(model, inputs, logits):
    """Silencing the adapter changes the output: without this, comparisons could not fail."""
    assert (without_adapter(model, inputs) - logits).abs().max() > 0.1 * logits.abs().max()


def num_expected_tensors(model) -> int:
    """A and B of both stacks of every experts module."""
    return 4 * len(experts_of(model))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_pefts(name, implementation):
    model = make_model(name)
    model.set_experts_implementation(implementation)
    adapted, inputs = adapt(model), make_inputs(model)
    logits, gradients = logits_and_gradients(adapted, inputs)
    assert_matters(adapted, inputs, logits)
    assert len(gradients) == len(adapter_tensors(adapted)) == num_expected_tensors(model)
    factor_expert_lora(adapted)
    factored_logits, factored_gradients = logits_and_gradients(adapted, inputs)
    assert_equal(factored_logits, logits)
    assert_equal(factored_gradients, gradients, 2e-5)
    with torch.no_grad():
        for _ in range(2):  # what was kept of the first call serves the second
            assert_equal(adapted(**inputs).logits, logits)
    assert_matters(adapted, inputs, logits)
