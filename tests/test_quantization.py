"""Quantised loading: a warning names the weights that are not quantised."""

from types import SimpleNamespace

import pytest
import torch
from transformers import QuantoConfig

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration, quantization
from modeling_sparse_moe_vlm.quantization import run_quantised_experts_eagerly, warn_of_unquantised_experts
from tests.support.models import make_model
from tests.support.upcycled import make_upcycled

# The tests' models have two layers of four experts of 3 x 24 x 32 weights in float32.
NUM_WEIGHTS = 2 * 4 * 3 * 24 * 32


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(quantization.logger, "warning_once", messages.append)
    return messages


def quantizer(**fields) -> SimpleNamespace:
    return SimpleNamespace(quantization_config=SimpleNamespace(**fields))


@pytest.mark.parametrize("num_shards", [None, 2])
def test_quantisers_of_linear_layers(num_shards, warnings, tmp_path):
    pytest.importorskip("optimum.quanto")
    make_model().save_pretrained(tmp_path)
    load = SparseMoeVlmForConditionalGeneration.from_pretrained
    load(tmp_path, num_expert_shards=num_shards)
    assert warnings == []
    loaded = load(tmp_path, num_expert_shards=num_shards, quantization_config=QuantoConfig(weights="int8"))
    (message,) = warnings
    share = NUM_WEIGHTS / sum(weight.numel() for weight in loaded.parameters())
    assert f"{4 * NUM_WEIGHTS / 1e6:.1f} MB, {share:.0%} of the model's parameters" in message
    assert "FqnToConfig" in message
    assert "Pass `unfused_experts=True` to `from_pretrained`" in message
    assert "experts_implementation='eager'" in message


def test_quantised_weights_are_not_counted(warnings):
    model = make_model()
    warn_of_unquantised_experts(model, None)
    warn_of_unquantised_experts(model, quantizer(dequantize=True))
    assert warnings == []
    layers = [layer.mlp.experts for layer in model.model.language_model.layers]

    def in_bytes(weight: torch.nn.Parameter) -> torch.nn.Parameter:
        return torch.nn.Parameter(weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    for experts in layers:
        experts.down_proj = in_bytes(experts.down_proj)
    warn_of_unquantised_experts(model, quantizer())
    assert f"as they are: {4 * NUM_WEIGHTS * 2 / 3 / 1e6:.1f} MB" in warnings.pop()
    for experts in layers:
        experts.gate_up_proj = in_bytes(experts.gate_up_proj)
    warn_of_unquantised_experts(model, quantizer(dequantize=False))
    assert warnings == []


@pytest.mark.parametrize("make", [make_model, lambda: make_upcycled("llama")])
def test_quantised_stacks_run_eagerly(make):
    model = make()
    experts = next(module for module in model.modules() if hasattr(module, "gate_up_proj"))
    assert experts.config._experts_implementation == "grouped_mm"
    run_quantised_experts_eagerly(model, quantizer())
    assert experts.config._experts_implementation == "grouped_mm", "no stack is quantised"
    experts.down_proj = torch.nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    run_quantised_experts_eagerly(model, None)
    assert experts.config._experts_implementation == "grouped_mm", "the model is not quantised"
    run_quantised_experts_eagerly(model, quantizer())
    assert experts.config._experts_implementation == "eager"


def test_unfused_experts_are_quantised(warnings, tmp_path):
    quanto = pytest.importorskip("optimum.quanto")
    make_model().save_pretrained(tmp_path)
    load = SparseMoeVlmForConditionalGeneration.from_pretrained
    loaded = load(tmp_path, quantization_config=QuantoConfig(weights="int8"), unfused_experts=True)
    assert warnings == []
    experts = [module for module in loaded.modules() if hasattr(module, "has_separate_experts")]
    linear = [layer for module in experts for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(linear) == 2 * 4 * 3
    assert {type(layer.weight) for layer in linear} == {quanto.WeightQBytesTensor}


@pytest.mark.parametrize(("make", "name"), [(make_model, "language_model"), (lambda: make_upcycled("llama"), "model")])
def test_the_linear_layers_are_named_as_the_model_has_them(make, name, warnings):
    warn_of_unquantised_experts(make(), quantizer())
    assert rf"as `r're:.*{name}.*_proj\.weight'`" in warnings.pop()
