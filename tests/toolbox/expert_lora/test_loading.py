"""Compares factored LoRA on experts with PEFT itself, which computes the sum W + B·A."""

import copy

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.expert_lora import factor_expert_lora, load_expert_lora
from modeling_sparse_moe_vlm.toolbox.paging import page_experts
from tests.support.in_tree_moe import (
    MODELS,
    adapt,
    adapter_tensors,
    assert_equal,
    device_map_of,
    experts_of,
    logits_and_gradients,
    make_inputs,
    make_model,
)

IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
SIZES = {
    "square gates": {"width": 16},  # 2 · 16 gates and ups of 32 inputs
    "square": {"width": 32},
    "E = r": {"num_experts": 4},
    "small": {"hidden_size": 20, "head_dim": 8, "width": 12, "num_experts": 6},
}


@torch.no_grad()
def without_adapter(model, inputs):
    with model.disable_adapter():
        return model(**inputs).logits


def assert_matters(model, inputs, logits):
    """Checks that disabling the adapter changes the output. Otherwise, comparisons could not fail."""
    assert (without_adapter(model, inputs) - logits).abs().max() > 0.1 * logits.abs().max()


def num_expected_tensors(model) -> int:
    """Returns the number of tensors: A and B of both stacks of every experts module."""
    return 4 * len(experts_of(model))


def one_layer(name: str, implementation: str, **config):
    """Returns PEFT's outermost layer of the experts of a model, with an adapter that matters, and its inputs."""
    model = make_model(name, num_hidden_layers=1)
    model.set_experts_implementation(implementation)
    (name,) = experts_of(model)
    layer = adapt(model, **config).base_model.model.get_submodule(name)
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(12)])
    call = torch.randn(12, 32, generator=generator), index, torch.rand(12, 2, generator=generator)
    with torch.no_grad():
        output, silent = layer(*call), layer.get_base_layer()(*call)
    assert (output - silent).norm() > 0.1 * output.norm()
    return layer, call


def run_layer(layer, *call) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the output, and the gradients of the adapter."""
    layer.zero_grad()
    output = layer(*call)
    (output.float() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    gradients = {key.removeprefix("_orig_mod."): tensor.grad.clone() for key, tensor in adapter_tensors(layer).items()}
    return output.detach(), gradients


def relative_error(got, expected) -> float:
    return ((got.float() - expected).norm() / expected.norm()).item()


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
        for _ in range(2):  # the second call uses the cached values of the first
            assert_equal(adapted(**inputs).logits, logits)
    assert_matters(adapted, inputs, logits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", ["qwen3_moe", "aria", "gpt_oss", "isolated"])
def test_sizes_that_do_not_distinguish_inputs_from_outputs(name, sizes, implementation):
    """Square matrices, as many experts as the rank, and sizes that are not powers of two."""
    model = make_model(name, **sizes)
    model.set_experts_implementation(implementation)
    rank = {"r": 4} if sizes.get("num_experts") == 4 else {"r": 5, "use_rslora": True}
    adapted, inputs = adapt(model, **rank), make_inputs(model)
    expected = logits_and_gradients(adapted, inputs)
    assert_matters(adapted, inputs, expected[0])
    for got, wanted in zip(logits_and_gradients(factor_expert_lora(adapted), inputs), expected):
        assert_equal(got, wanted, 2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "gpt_oss", "isolated"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant, implementation):
    model = make_model(name)
    model.set_experts_implementation(implementation)
    adapted, inputs = adapt(model).train(), make_inputs(model)
    logits, gradients = logits_and_gradients(adapted, inputs)
    assert_matters(adapted, inputs, logits)
    adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
    adapted.enable_input_require_grads()
    for got, wanted in zip(logits_and_gradients(factor_expert_lora(adapted), inputs), (logits, gradients)):
        assert_equal(got, wanted, 2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["qwen3_moe", "aria", "gpt_oss"])
@pytest.mark.parametrize("mode", ["bfloat16", "autocast", "bfloat16 with float32 adapters"])
def test_precisions(name, mode, implementation):
    """With given routing, the errors of outputs and gradients against float32 are about those of PEFT."""
    layer, call = one_layer(name, implementation)
    expected = run_layer(layer, *call)
    errors = []
    for make in (lambda layer: layer, factor_expert_lora):
        reduced = make(copy.deepcopy(layer))
        inputs = call
        if mode.startswith("bfloat16"):
            reduced = reduced.bfloat16()
            inputs = [each.bfloat16() if each.is_floating_point() else each for each in call]
            if "float32" in mode:
                for tensor in adapter_tensors(reduced).values():
                    tensor.data = tensor.data.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            output, gradients = run_layer(reduced, *inputs)
        assert len(gradients) == 4
        errors.append({"output": relative_error(output, expected[0])})
        errors[-1] |= {key: relative_error(gradients[key], expected[1][key]) for key in gradients}
    for key, error in errors[1].items():
        assert error < max(2 * errors[0][key], 0.02), (key, error, errors[0][key])


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "joint"])
def test_compiled(name, implementation):
    """The layer compiles as one graph, in generation and in training."""
    layer, call = one_layer(name, implementation)
    factor_expert_lora(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_equal(compiled(*call), layer(*call))
    if implementation == "grouped_mm" and not hasattr(torch.ops.transformers, "grouped_mm_fallback_backward"):
        pytest.skip("this version of Transformers compiles no backward of grouped products, with adapters or without")
    for got, wanted in zip(run_layer(compiled, *call), run_layer(layer, *call)):
        assert_equal(got, wanted, 2e-5)


@torch.no_grad()
def test_compiled_model():
    model = make_model("qwen3_moe", num_hidden_layers=1)
    model.set_experts_implementation("grouped_mm")
    adapted, inputs = factor_expert_lora(adapt(model)), make_inputs(model)
    expected = adapted(**inputs).logits
    assert_matters(adapted, inputs, expected)
    assert_equal(torch.compile(adapted, backend="aot_eager", fullgraph=True)(**inputs).logits, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["qwen3_moe", "isolated"])
@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_offloaded_by_accelerate(name, implementation, place, tmp_path):
    """Only the experts are on disk, or the whole model is offloaded."""
    model = make_model(name)
    inputs = make_inputs(model)
    model.save_pretrained(tmp_path / "model")
    device_map = device_map_of(model, experts="disk") if place == "disk" else {"": "cpu"}
    adapted = adapt(model)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted(**inputs).logits
    assert_matters(adapted, inputs, expected)
    loaded = type(model).from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    loaded.set_experts_implementation(implementation)
    factored = load_expert_lora(loaded, tmp_path / "adapter")
    with torch.no_grad():
        for _ in range(2):
            assert_equal(factored(**inputs).logits, expected)
        assert_matters(factored, inputs, expected)
        assert_equal(factored(**inputs).logits, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "isolated"])
def test_paged(name, implementation):
    """Experts are loaded on demand, and each is used with its own factors."""
    model = make_model(name)
    model.set_experts_implementation(implementation)
    model.requires_grad_(False)
    adapted, inputs = factor_expert_lora(adapt(model)), make_inputs(model)
    logits, gradients = logits_and_gradients(adapted, inputs)
    assert_matters(adapted, inputs, logits)
    for slots in (2, 3):
        with page_experts(adapted, slots):
            paged_logits, paged_gradients = logits_and_gradients(adapted, inputs)
            assert_equal(paged_logits, logits)
            assert_equal(paged_gradients, gradients, 2e-5)
            with torch.no_grad():
                for _ in range(2):
                    assert_equal(adapted(**inputs).logits, logits)
            assert_matters(adapted, inputs, logits)
