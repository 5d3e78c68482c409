"""Features of the factored layer that PEFT's lacks: adapters by row, dropout, DoRA, ranks by expert, gate or up."""

import math
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from modeling_sparse_moe_vlm.toolbox.expert_lora import (
    ExpertLoraConfig,
    factor_expert_lora,
    load_expert_lora,
    num_adapter_parameters,
)
from modeling_sparse_moe_vlm.toolbox.expert_lora.adapted_layer import FactoredExpertsLayer, run_factored
from modeling_sparse_moe_vlm.toolbox.expert_modules import is_experts
from modeling_sparse_moe_vlm.toolbox.paging import page_experts
from tests.support.in_tree_moe import (
    adapt,
    adapter_tensors,
    assert_equal,
    experts_of,
    logits_and_gradients,
    make_inputs,
    make_model,
    randomise,
)

pytestmark = pytest.mark.newest

IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
STACKS = ["gate_up_proj", "down_proj"]


def expert_config(model, config_class=LoraConfig, **values):
    """Returns a configuration whose adapters run factored from the start."""
    defaults = {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": STACKS}
    config = config_class(**defaults | values)
    run_factored(config, [module for module in model.modules() if is_experts(module)])
    return config


def two_adapters(name: str, implementation: str = "grouped_mm", **config):
    model = make_model(name)
    model.set_experts_implementation(implementation)
    adapted = adapt(model, **config)
    values = {"r": 2, "lora_alpha": 8, "target_modules": [], "target_parameters": STACKS}
    adapted.add_adapter("other", LoraConfig(**values | config))
    return randomise(adapted, seed=1, adapter="other").eval(), make_inputs(model)


def layers_of(model) -> list[FactoredExpertsLayer]:
    return [module for module in model.modules() if isinstance(module, FactoredExpertsLayer)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "isolated"])
@torch.no_grad()
def test_switching_and_several_at_once(name, implementation):
    adapted, inputs = two_adapters(name, implementation)

    def outputs():
        logits = {}
        for active in (["default"], ["other"], ["default", "other"], ["default"]):
            adapted.base_model.set_adapter(active)
            logits["+".join(active)] = adapted(**inputs).logits
        with adapted.disable_adapter():
            logits["none"] = adapted(**inputs).logits
        return logits

    expected = outputs()
    factor_expert_lora(adapted)
    got = outputs()
    for case, logits in expected.items():
        assert_equal(got[case], logits, 2e-5)
        for other in expected:
            assert other == case or (logits - expected[other]).abs().max() > 0.05 * logits.abs().max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["qwen3_moe", "aria", "gpt_oss", "ernie4_5_vl_moe", "joint", "isolated"])
@torch.no_grad()
def test_an_adapter_for_each_row(name, implementation):
    adapted, _ = two_adapters(name, implementation)
    factor_expert_lora(adapted)
    inputs = make_inputs(adapted.get_base_model(), batch_size=4)
    names = ["other", "__base__", "default", "other"]
    expected = {}
    for adapter in ("default", "other"):
        adapted.set_adapter(adapter)
        expected[adapter] = adapted(**inputs).logits
    with adapted.disable_adapter():
        expected["__base__"] = adapted(**inputs).logits
    mixed = adapted(**inputs, adapter_names=names).logits
    for row, adapter in enumerate(names):
        assert_equal(mixed[row], expected[adapter][row], 2e-5)
    assert (expected["default"] - expected["other"]).abs().max() > 0.1
    assert_equal(adapted(**inputs, adapter_names=["default"] * 4).logits, expected["default"])
    with pytest.raises(ValueError, match="has 3 names, but the batch has 4 rows"):
        adapted(**inputs, adapter_names=names[:3])


@pytest.mark.parametrize("name", ["qwen3_moe", "isolated"])
@torch.no_grad()
def test_generation_with_an_adapter_for_each_row(name):
    adapted, _ = two_adapters(name)
    factor_expert_lora(adapted)
    inputs = make_inputs(adapted.get_base_model(), batch_size=3)
    names = ["default", "__base__", "other"]
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    mixed = adapted.generate(**inputs, adapter_names=names, **greedy)
    rows = []
    for row, adapter in enumerate(names):
        adapted.set_adapter("default" if adapter == "__base__" else adapter)
        if adapter == "__base__":
            with adapted.disable_adapter():
                rows.append(adapted.generate(**inputs, **greedy)[row])
        else:
            rows.append(adapted.generate(**inputs, **greedy)[row])
    assert torch.equal(mixed, torch.stack(rows))
    assert len({tuple(row[-5:].tolist()) for row in mixed}) == 3


@torch.no_grad()
def test_rows_need_adapters_that_are_not_merged():
    adapted, inputs = two_adapters("qwen3_moe")
    factor_expert_lora(adapted)
    adapted.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        adapted(**inputs, adapter_names=["default", "other"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["qwen3_moe", "aria"])
def test_dropout(name, implementation):
    """Dropout is random in training, off in evaluation, and saved as 0."""
    model = make_model(name, num_hidden_layers=1)
    model.set_experts_implementation(implementation)
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        adapt(make_model(name), lora_dropout=0.3)
    adapted = randomise(get_peft_model(model, expert_config(model, lora_dropout=0.3)))
    plain = factor_expert_lora(adapt(make_model(name, num_hidden_layers=1)))
    inputs = make_inputs(model)
    assert_equal(adapted.eval()(**inputs).logits, plain(**inputs).logits)
    adapted.train()
    assert not torch.equal(adapted(**inputs).logits, adapted(**inputs).logits)
    assert len(logits_and_gradients(adapted, inputs)[1]) == 4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_keeps_the_mean(implementation):
    """Tested on the down projection, where the output is linear. The inputs of W are not dropped."""
    model = make_model("qwen3_moe", num_hidden_layers=1)
    model.set_experts_implementation(implementation)
    config = expert_config(model, lora_dropout=0.5, target_parameters=["down_proj"])
    adapted = randomise(get_peft_model(model, config))
    (layer,) = layers_of(adapted)
    tokens, index, weights = torch.randn(1, 32), torch.tensor([[1, 4]]), torch.tensor([[0.7, 0.3]])
    with torch.no_grad():
        exact, silent = layer.eval()(tokens, index, weights), layer.get_base_layer()(tokens, index, weights)
        layer.train()
        draws = torch.stack([layer(tokens, index, weights) for _ in range(600)])
    assert draws.std(0).max() > 0.1
    error, update = (draws.mean(0) - exact).norm(), (exact - silent).norm()
    assert error < 0.15 * update


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["qwen3_moe", "aria"])
def test_dropout_is_of_the_update_only(name, implementation):
    """If all inputs of the update are dropped, the inputs of W are still complete."""
    model = make_model(name, num_hidden_layers=1)
    model.set_experts_implementation(implementation)
    adapted = factor_expert_lora(adapt(model))
    inputs = make_inputs(model)
    with adapted.disable_adapter():
        expected = adapted(**inputs).logits
    for layer in layers_of(adapted):
        layer.lora_dropout["default"] = nn.Dropout(1.0)
    assert_equal(adapted.train()(**inputs).logits, expected)
    assert (adapted.eval()(**inputs).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ["qwen3_moe", "aria"])
def test_another_scaling_counts_at_once(name, grad):
    """As in PEFT's layer, the scaling can be set, multiplied and divided, also between two decoding steps."""
    plain, adapted = adapt(make_model(name)), factor_expert_lora(adapt(make_model(name)))
    one_token = {key: value[:1, :1] for key, value in make_inputs(plain.get_base_model()).items()}
    changes = [("set_scale", "default", 0.5), ("scale_layer", 3.0), ("unscale_layer", 4.0), ("unscale_layer", None)]
    seen = []
    with torch.set_grad_enabled(grad):
        for method, *values in [("set_scale", "default", 1.0), *changes]:
            for model in (plain, adapted):
                for layer in model.modules():
                    if isinstance(layer, ParamWrapper):
                        getattr(layer, method)(*values)
            expected = plain(**one_token).logits
            assert_equal(adapted(**one_token).logits, expected, 2e-5)
            assert_equal(adapted(**one_token).logits, expected, 2e-5)
            seen.append(expected)
    for first, second in pairwise(seen):
        assert (first - second).abs().max() > 0.02


@pytest.mark.parametrize("use_dora", [False, True])
@torch.no_grad()
def test_after_merging_and_unmerging_all_is_as_before(use_dora):
    """Compares weights, outputs and the result of a second merge, also with another scaling in between."""
    model = make_model("qwen3_moe")
    stacks = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = randomise(get_peft_model(model, expert_config(model, use_dora=use_dora))).eval()
    if use_dora:
        for layer in layers_of(adapted):
            layer.lora_magnitude_vector["default"].weight.abs_().add_(0.5)
    inputs = make_inputs(model)
    for scale in (1.0, 0.25):
        for layer in layers_of(adapted):
            layer.set_scale("default", scale)
        expected = adapted(**inputs).logits
        adapted.merge_adapter()
        assert all(layer.merged_adapters == ["default"] for layer in layers_of(adapted))
        assert_equal(adapted(**inputs).logits, expected, 3e-5)
        assert_equal(adapted.get_base_model()(**inputs).logits, expected, 3e-5)
        adapted.unmerge_adapter()
        assert all(layer.merged_adapters == [] and not layer.merged for layer in layers_of(adapted))
        assert_equal(adapted(**inputs).logits, expected, 3e-5)
        for name, value in adapted.get_base_model().state_dict().items():
            if "lora_" not in name:
                torch.testing.assert_close(value, stacks[name.replace(".base_layer", "")], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_random", [False, True])
def test_rows_beyond_the_rank_of_an_expert(is_random):
    """These rows are zero in both factors from the start, and all other rows keep their initial values."""
    ranks = [3, 0, 1, 2, 3, 3, 0, 1]
    adapters = []
    for config in ({"expert_ranks": {"experts.down_proj": ranks}}, {}):
        model = make_model("qwen3_moe", num_hidden_layers=1)
        torch.manual_seed(0)
        values = {"init_lora_weights": not is_random} | config
        adapted = get_peft_model(model, expert_config(model, ExpertLoraConfig, **values))
        adapters.append({layer.parameter_name: layer for layer in layers_of(adapted)})
    limited, whole = adapters
    used = torch.tensor([[row < rank for row in range(3)] for rank in ranks])[:, :, None]
    for stack in STACKS:
        for got, made in zip(limited[stack].factors("default"), whole[stack].factors("default"), strict=True):
            assert torch.equal(got, made * used if stack == "down_proj" else made)


def literal_dora(layer, adapter: str = "default") -> torch.Tensor:
    """Returns m · (W + s·B·A) / ‖W + s·B·A‖ of each output, in the orientation of the stack."""
    stack = layer.get_param().detach().double()
    a, b = (layer.lora_A[adapter].weight.double(), layer.lora_B[adapter].weight.double())
    num_experts = stack.shape[0]
    a, b = a.reshape(num_experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, num_experts)
    update = torch.einsum("ore,eri->eoi", b, a) * layer.scaling[adapter]
    is_transposed = layer.get_base_layer().is_transposed
    weight = (stack.transpose(1, 2) if is_transposed else stack) + update
    weight = (
        weight / weight.norm(dim=-1, keepdim=True) * layer.lora_magnitude_vector[adapter].weight.double()[..., None]
    )
    return weight.transpose(1, 2) if is_transposed else weight


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["qwen3_moe", "aria", "gpt_oss", "isolated"])
def test_dora(name, implementation, tmp_path):
    model = make_model(name)
    model.set_experts_implementation(implementation)
    inputs = make_inputs(model)
    original = model(**inputs).logits.detach()
    model.save_pretrained(tmp_path / "model")
    adapted = get_peft_model(model, expert_config(model, use_dora=True))
    assert_equal(adapted(**inputs).logits, original, 2e-5)
    randomise(adapted)
    with torch.no_grad():
        for layer in layers_of(adapted):
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude.copy_(magnitude.abs() + 0.5)
    logits, gradients = logits_and_gradients(adapted, inputs)
    assert len(gradients) == len(adapter_tensors(adapted)) == 6 * len(experts_of(adapted))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())
    assert (logits - original).abs().max() > 0.1 * original.abs().max()

    literal = make_model(name)
    literal.set_experts_implementation(implementation)
    with torch.no_grad():
        for layer in layers_of(adapted):
            literal.get_parameter(experts_name(adapted, layer)).copy_(literal_dora(layer))
        assert_equal(literal(**inputs).logits, logits, 3e-5)
        before = {n: p.clone() for n, p in adapted.named_parameters()}
        adapted.merge_adapter()
        assert_equal(adapted(**inputs).logits, logits, 3e-5)
        adapted.unmerge_adapter()
        for n, parameter in adapted.named_parameters():
            torch.testing.assert_close(parameter, before[n], rtol=1e-4, atol=1e-5)
        assert_equal(adapted(**inputs).logits, logits, 3e-5)

    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_expert_lora(make_model(name), tmp_path / "adapter")
    assert_equal(loaded(**inputs).logits, logits, 3e-5)
    config = LoraConfig.from_pretrained(tmp_path / "adapter")
    fresh = make_model(name)
    run_factored(config, [module for module in fresh.modules() if is_experts(module)])
    assert_equal(PeftModel.from_pretrained(fresh, tmp_path / "adapter", config=config)(**inputs).logits, logits, 3e-5)
    merged = loaded.merge_and_unload()
    assert_equal(merged(**inputs).logits, logits, 3e-5)
    with pytest.raises(ValueError, match="use_dora"):
        PeftModel.from_pretrained(make_model(name), tmp_path / "adapter")


def experts_name(model, layer) -> str:
    """Returns the name of the stack of a layer in the model without adapters."""
    name = next(name for name, module in model.named_modules() if module is layer)
    return f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{layer.parameter_name}"


def test_dora_treats_the_norm_as_a_constant_in_backward():
    """The gradients equal those of the literal formula with a detached norm."""
    model = make_model("qwen3_moe", num_hidden_layers=1)
    adapted = randomise(get_peft_model(model, expert_config(model, use_dora=True)))
    inputs = make_inputs(model)
    _, gradients = logits_and_gradients(adapted, inputs)
    tensors = adapter_tensors(adapted)
    weights = {}
    for layer in layers_of(adapted):
        a, b = layer.factors("default")
        weight = layer.get_param().detach() + layer.scaling["default"] * torch.einsum("ero,eri->eoi", b, a)
        magnitude = layer.lora_magnitude_vector["default"].weight
        weights[experts_name(adapted, layer)] = (
            weight / weight.detach().norm(dim=-1, keepdim=True) * magnitude[..., None]
        )
    logits = torch.func.functional_call(make_model("qwen3_moe", num_hidden_layers=1), weights, kwargs=inputs).logits
    expected = torch.autograd.grad((logits.sin() * 3).sum(), list(tensors.values()))
    assert_equal(gradients, dict(zip(tensors, expected)), 5e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_dora_of_paged_and_of_compiled_experts(name, implementation):
    model = make_model(name, num_hidden_layers=1).requires_grad_(False)
    model.set_experts_implementation(implementation)
    adapted = randomise(get_peft_model(model, expert_config(model, use_dora=True)))
    with torch.no_grad():
        for layer in layers_of(adapted):
            layer.lora_magnitude_vector["default"].weight.abs_().add_(0.5)
    inputs = make_inputs(model)
    expected = logits_and_gradients(adapted, inputs)
    with page_experts(adapted, 3):
        for got, wanted in zip(logits_and_gradients(adapted, inputs), expected):
            assert_equal(got, wanted, 3e-5)
    if implementation == "eager":
        return
    layer, call = layers_of(adapted)[0], (torch.randn(5, 32), torch.randint(8, (5, 2)), torch.rand(5, 2))
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert_equal(compiled(*call), layer(*call))


def test_dora_must_be_the_only_active_adapter():
    model = make_model("qwen3_moe")
    adapted = randomise(get_peft_model(model, expert_config(model, use_dora=True)))
    adapted.add_adapter("other", expert_config(model))
    adapted.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="activate an adapter with `use_dora` only by itself"):
        adapted(**make_inputs(model))
    adapted.set_adapter("other")
    adapted(**make_inputs(model))


def test_rank_pattern_by_group():
    """The experts of one modality have a different rank and alpha."""
    model = make_model("isolated")
    targets = [f"experts.{group}.{stack}" for group in ("text", "image") for stack in STACKS]
    patterns = {"rank_pattern": {r".*\.image\..*": 5}, "alpha_pattern": {r".*\.image\..*": 20}}
    adapted = adapt(model, target_parameters=targets, **patterns)
    inputs = make_inputs(model)
    expected = logits_and_gradients(adapted, inputs)
    for got, wanted in zip(logits_and_gradients(factor_expert_lora(adapted), inputs), expected):
        assert_equal(got, wanted, 2e-5)
    ranks = {(layer.stack_name.split(".experts.")[1].split(".")[0], layer.r["default"]) for layer in layers_of(adapted)}
    assert ranks == {("text", 3), ("image", 5)}


def train(adapted, inputs, steps: int = 5):
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = adapted(**inputs).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()).backward()
        optimizer.step()
    return adapted.eval()


def test_ranks_that_differ_by_expert(tmp_path):
    """Rows beyond the rank of an expert stay zero in training. On disk, the adapter is a plain LoRA adapter."""
    model = make_model("qwen3_moe")
    inputs = make_inputs(model)
    ranks = [3, 0, 1, 2, 3, 3, 0, 1]
    config = expert_config(model, ExpertLoraConfig, expert_ranks={"experts.gate_up_proj": ranks})
    adapted = get_peft_model(model, config)
    base = model(**inputs).logits.detach()
    train(adapted, inputs)
    changed = num_adapter_parameters(adapted)
    for layer in layers_of(adapted):
        a, b = layer.factors("default")
        used = torch.tensor([[row < rank for row in range(3)] for rank in ranks])
        if layer.parameter_name == "down_proj":
            used = torch.ones_like(used)
        assert torch.equal(a.any(-1), used)
        assert not b[~used].any()
    assert changed == 2 * (sum(ranks) * (32 + 48) + 8 * 3 * (24 + 32))
    logits = adapted(**inputs).logits
    assert (logits - base).abs().max() > 0.1
    adapted.save_pretrained(tmp_path)
    assert_equal(PeftModel.from_pretrained(make_model("qwen3_moe"), tmp_path)(**inputs).logits, logits)
    with pytest.raises(ValueError, match="must be 8 numbers from 0 to r = 3"):
        get_peft_model(
            make_model("qwen3_moe"),
            expert_config(model, ExpertLoraConfig, expert_ranks={"experts.gate_up_proj": [4] * 8}),
        )


@pytest.mark.parametrize("half", ["gate", "up"])
@pytest.mark.parametrize("name", ["qwen3_moe", "aria", "gpt_oss"])
def test_one_half_of_the_gate(name, half, tmp_path):
    """The other half stays unchanged in training, also after saving and loading."""
    model = make_model(name)
    original = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = make_inputs(model)
    adapted = train(get_peft_model(model, expert_config(model, ExpertLoraConfig, gate_up=half)), inputs)
    logits = adapted(**inputs).logits.detach()
    adapted.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(make_model(name), tmp_path, is_trainable=True)
    assert_equal(plain(**inputs).logits, logits)
    for again in (factor_expert_lora(plain), load_expert_lora(make_model(name), tmp_path, is_trainable=True)):
        merged = train(again.train(), inputs).merge_and_unload()
        for key, stack in merged.state_dict().items():
            if not key.endswith("experts.gate_up_proj"):
                continue
            changed = (stack - original[key]).abs().amax(0).amax(0 if merged_is_transposed(merged) else 1) > 0
            index = torch.arange(48)
            is_gate = index % 2 == 0 if name == "gpt_oss" else index < 24
            assert torch.equal(changed, is_gate if half == "gate" else ~is_gate)


def merged_is_transposed(model) -> bool:
    return next(iter(experts_of(model).values())).is_transposed


def test_rslora_scales_by_the_root():
    model = make_model("qwen3_moe")
    adapted = get_peft_model(model, expert_config(model, ExpertLoraConfig, r=4, use_rslora=True))
    assert {layer.scaling["default"] for layer in layers_of(adapted)} == {6 / math.sqrt(4)}


def test_adapters_in_groups_without_tokens():
    """With padding and text-only rows, groups get few tokens or none. Magnitudes still get finite gradients."""
    model = make_model("isolated")
    adapted = randomise(get_peft_model(model, expert_config(model, use_dora=True))).train()
    inputs = make_inputs(model)
    inputs.pop("pixel_values")
    inputs["input_ids"] = inputs["input_ids"].clamp(min=4)
    inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        _, gradients = logits_and_gradients(adapted, inputs)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
