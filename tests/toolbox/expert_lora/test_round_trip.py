"""Training, saving, loading, merging and quantising keep the logits. Adapters of older versions of PEFT."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from modeling_sparse_moe_vlm.toolbox.expert_lora import factor_expert_lora, load_expert_lora, upgrade_expert_adapter
from modeling_sparse_moe_vlm.toolbox.expert_lora.adapted_layer import FactoredExpertsLayer
from tests.support.in_tree_moe import (
    MODELS,
    adapt,
    adapter_tensors,
    assert_equal,
    experts_of,
    logits_and_gradients,
    make_inputs,
    make_model,
)

STACKS = ("gate_up_proj", "down_proj")


def train(adapted, inputs, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = adapted(**inputs).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits_of(model, inputs):
    return model.eval()(**inputs).logits


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, tmp_path):
    model = make_model(name)
    inputs = make_inputs(model)
    base = logits_of(model, inputs)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=list(STACKS))
    adapted = factor_expert_lora(get_peft_model(model, config))
    losses = train(adapted.train(), inputs)
    assert losses[-1] < losses[0] - 0.05
    _, gradients = logits_and_gradients(adapted, inputs)
    num_attention = sum(name.endswith("q_proj.base_layer") for name, _ in adapted.named_modules())
    assert len(gradients) == len(adapter_tensors(adapted)) == 4 * len(experts_of(adapted)) + 2 * num_attention
    assert all(gradient.any() for gradient in gradients.values())
    trained = logits_of(adapted, inputs)
    assert (trained - base).abs().max() > 0.05 * base.abs().max()
    adapted.save_pretrained(tmp_path / "adapter")

    plain = PeftModel.from_pretrained(make_model(name), tmp_path / "adapter")
    assert not any(isinstance(module, FactoredExpertsLayer) for module in plain.modules())
    assert_equal(logits_of(plain, inputs), trained)
    assert_equal(logits_of(factor_expert_lora(plain), inputs), trained)
    on_disk = type(model).from_pretrained(tmp_path / "base")
    factored = load_expert_lora(on_disk, tmp_path / "adapter")
    assert_equal(logits_of(factored, inputs), trained)

    merged_by_peft = PeftModel.from_pretrained(make_model(name), tmp_path / "adapter").merge_and_unload()
    merged = factored.merge_and_unload()
    assert not any(isinstance(module, ParamWrapper) for module in merged.modules())
    for key, weight in merged_by_peft.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], weight, rtol=0, atol=1e-6)
    original = make_model(name).state_dict()
    assert not any(torch.equal(merged.state_dict()[key], original[key]) for key in original if key.endswith(STACKS))
    assert_equal(logits_of(merged, inputs), trained, 2e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged")
    assert_equal(logits_of(again, inputs), trained, 2e-5)
    assert (logits_of(again, inputs) - base).abs().max() > 0.05 * base.abs().max(), "merged, and not its base"


def test_merged_model_with_its_code(tmp_path):
    model = make_model("isolated")
    inputs = make_inputs(model)
    adapted = factor_expert_lora(adapt(model))
    expected = logits_of(adapted, inputs)
    merged = adapted.merge_and_unload()
    merged.config.auto_map = None
    type(merged).register_for_auto_class("AutoModelForImageTextToText")
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    assert_equal(logits_of(loaded, inputs), expected, 2e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "isolated"])
def test_trained_by_peft_and_on(name, tmp_path):
    """Training that PEFT started continues factored with the same losses, and the other way round."""
    inputs = make_inputs(make_model(name))
    losses = {}
    for first, second in ((False, True), (True, False)):
        adapted = adapt(make_model(name), seed=3)
        before = train(factor_expert_lora(adapted) if first else adapted, inputs, steps=2)
        adapted.save_pretrained(tmp_path / str(first))
        again = PeftModel.from_pretrained(make_model(name), tmp_path / str(first), is_trainable=True)
        losses[first] = before + train(factor_expert_lora(again) if second else again, inputs, steps=2)
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    files = [load_file(tmp_path / str(first) / "adapter_model.safetensors") for first in (True, False)]
    assert files[0].keys() == files[1].keys()
    assert {key: tensor.shape for key, tensor in files[0].items()} == {k: t.shape for k, t in files[1].items()}


@pytest.mark.parametrize("name", ["qwen3_moe", "aria", "ernie4_5_vl_moe"])
@torch.no_grad()
def test_layout_on_disk(name, tmp_path):
    """The expert is the slow index of `lora_A (E·r, in)` and the fast index of `lora_B (out, r·E)`."""
    adapted = adapt(make_model(name))
    adapted.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    merged, original = adapted.merge_and_unload(), make_model(name)
    seen = set()
    for module_name, experts in experts_of(original).items():
        for stack, inner in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
            keys = [f"base_model.model.{module_name}{inner}.lora_{side}.weight" for side in "AB"]
            seen.update(keys)
            a, b = (tensors[key] for key in keys)
            new, old = merged.get_parameter(f"{module_name}.{stack}"), getattr(experts, stack)
            for expert in range(8):
                update = torch.zeros(b.shape[0], a.shape[1])
                for row in range(3):
                    update += 2.0 * torch.outer(b[:, row * 8 + expert], a[expert * 3 + row])
                wanted = old[expert] + (update.T if experts.is_transposed else update)
                torch.testing.assert_close(new[expert], wanted, rtol=1e-5, atol=1e-5)
    assert seen == tensors.keys()


def make_old(folder, model, num_experts: int = 8, version: str | None = "0.18.1"):
    """Writes an adapter as PEFT 0.18 did, and returns the merged weights of the stacks."""
    generator = torch.Generator().manual_seed(5)
    rank, scaling, tensors, merged = 3, 2.0, {}, {}
    for module_name, experts in experts_of(model).items():
        for stack, inner in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
            _, outputs, inputs = getattr(experts, stack).shape
            a = torch.randn(num_experts * rank, outputs, generator=generator) * 0.2
            b = torch.randn(inputs, rank * num_experts, generator=generator) * 0.2
            prefix = f"base_model.model.{module_name}{inner}"
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
            update = torch.einsum("ire,ero->eoi", b.view(inputs, rank, -1), a.view(num_experts, rank, -1))
            merged[f"{module_name}.{stack}"] = getattr(experts, stack).detach() + scaling * update
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, module.in_features) * 0.2
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(module.out_features, rank) * 0.2
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = LoraConfig(r=rank, lora_alpha=6, target_modules=["q_proj"], target_parameters=list(STACKS)).to_dict()
    config = {key: value for key, value in config.items() if key in ("peft_type", "r", "lora_alpha")} | {
        "peft_type": "LORA",
        "target_modules": ["q_proj"],
        "target_parameters": list(STACKS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | ({"peft_version": version} if version else {})))
    return merged


@pytest.mark.parametrize("name", ["qwen3_moe", "isolated"])
@pytest.mark.parametrize("width", [24, 32, 16], ids=["oblong", "square down", "square gates"])
@torch.no_grad()
def test_adapters_of_older_peft(name, width, tmp_path):
    model = make_model(name, width=width)
    num_experts = next(iter(experts_of(model).values())).num_experts
    merged = make_old(tmp_path / "old", model, num_experts)
    for load in (load_expert_lora, lambda model, path: factor_expert_lora(load_unchecked(model, path))):
        with pytest.raises(ValueError, match=r"saved by PEFT 0\.18\.1.*upgrade_expert_adapter"):
            load(make_model(name, width=width), tmp_path / "old")
    upgrade_expert_adapter(tmp_path / "old", tmp_path / "new", model)
    old, new = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("old", "new"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old if "q_proj" in key)
    loaded = PeftModel.from_pretrained(make_model(name, width=width), tmp_path / "new").merge_and_unload()
    for key, weight in merged.items():
        torch.testing.assert_close(loaded.get_parameter(key), weight, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="has today's layout"):
        upgrade_expert_adapter(tmp_path / "new", tmp_path / "newer", model)
    with pytest.raises(ValueError, match="another folder"):
        upgrade_expert_adapter(tmp_path / "old", tmp_path / "old", model)
    with pytest.raises(ValueError, match="belongs to another model"):
        upgrade_expert_adapter(tmp_path / "old", tmp_path / "newer", make_model(name, width=40))


def load_unchecked(model, path):
    """Loads an adapter with PEFT only, which does not check the layout."""
    return PeftModel.from_pretrained(model, path, ignore_mismatched_sizes=True)


def test_adapters_that_name_no_version(tmp_path):
    """The shapes determine the layout, unless the matrices are square."""
    oblong = make_model("qwen3_moe")
    make_old(tmp_path / "oblong", oblong, version=None)
    with pytest.raises(ValueError, match=r"before 0\.18.*upgrade_expert_adapter"):
        load_expert_lora(oblong, tmp_path / "oblong")
    upgrade_expert_adapter(tmp_path / "oblong", tmp_path / "new", oblong)
    load_expert_lora(make_model("qwen3_moe"), tmp_path / "new")

    square, path = make_model("qwen3_moe", width=32), tmp_path / "square"
    make_old(path, square, version=None)
    config = json.loads((path / "adapter_config.json").read_text()) | {"target_parameters": ["down_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(path / "adapter_model.safetensors")
    save_file({k: t for k, t in tensors.items() if "base_layer" not in k}, path / "adapter_model.safetensors")
    for call in (load_expert_lora, lambda model, path: upgrade_expert_adapter(path, tmp_path / "x", model)):
        with pytest.raises(ValueError, match="names no `peft_version`"):
            call(square, path)
    (path / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.18.0.dev0@abcdef"}))
    with pytest.raises(ValueError, match=r"saved by PEFT 0\.18\.0\.dev0"):
        load_expert_lora(square, path)
    (path / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.19.0"}))
    load_expert_lora(square, path)


def test_transposed_stacks_never_changed(tmp_path):
    adapt(make_model("aria")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.18.1"}))
    inputs = make_inputs(make_model("aria"))
    expected = logits_of(adapt(make_model("aria")), inputs)
    assert_equal(logits_of(load_expert_lora(make_model("aria"), tmp_path), inputs), expected)


def test_adapters_that_do_not_fit(tmp_path):
    adapt(make_model("qwen3_moe")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit the model: it lacks \['.*layers\.1"):
        load_expert_lora(make_model("qwen3_moe"), tmp_path)
    with pytest.raises(ValueError, match="no expert of the model has an adapter"):
        factor_expert_lora(make_model("qwen3_moe"))
    attention = get_peft_model(make_model("qwen3_moe"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no expert of the model has an adapter"):
        factor_expert_lora(attention)


@pytest.mark.parametrize(
    "bits",
    ["qint8", pytest.param("qint4", marks=pytest.mark.extensive)],  # the kernel of 4 bits takes a minute to compile
)
def test_quantised_attention_beside_factored_experts(bits):
    """Quanto quantises the linear layers, and the adapters of experts are trained."""
    quanto = pytest.importorskip("optimum.quanto")
    model = make_model("qwen3_moe")
    inputs = make_inputs(model)
    exact = logits_of(model, inputs)
    quanto.quantize(model, weights=getattr(quanto, bits), exclude=["lm_head"])
    quanto.freeze(model)
    quantised = logits_of(model, inputs)
    assert 0 < (quantised - exact).norm() < (0.1 if bits == "qint8" else 0.6) * exact.norm()
    adapted = adapt(model)
    expected = logits_and_gradients(adapted, inputs)
    assert (expected[0] - quantised).abs().max() > 0.1 * quantised.abs().max()
    for got, wanted in zip(logits_and_gradients(factor_expert_lora(adapted), inputs), expected):
        assert_equal(got, wanted, 2e-5)
    losses = train(adapted, inputs)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("name", ["qwen3_moe", "isolated"])
def test_experts_in_eight_bits(name, config, tmp_path):
    """A merged model with quantised experts gets a second adapter, which PEFT itself cannot run."""
    quantization = pytest.importorskip("torchao.quantization")
    config = getattr(quantization, config)()
    adapted = adapt(make_model(name))
    inputs = make_inputs(adapted.get_base_model())
    exact = logits_of(adapted, inputs)
    adapted.merge_and_unload().save_pretrained(tmp_path)
    model = type(adapted.get_base_model()).from_pretrained(tmp_path, experts_implementation="eager")
    stacks = quantization.FqnToConfig({r"re:.*experts.*\.(gate_up|down)_proj": config})
    quantization.quantize_(model, stacks, filter_fn=None)
    assert {type(experts.down_proj) is nn.Parameter for experts in experts_of(model).values()} == {False}
    quantised = logits_of(model, inputs)
    # The numbers differ, and for some tokens also the chosen experts.
    assert 0 < (quantised - exact).norm() < 0.4 * exact.norm()

    adapted = adapt(model, seed=5)
    with pytest.raises(NotImplementedError, match="Tensor dispatch"):
        adapted(**inputs)
    # The same adapter on dequantised experts.
    plain = type(model).from_pretrained(tmp_path, experts_implementation="eager")
    for experts, low in zip(experts_of(plain).values(), experts_of(model).values(), strict=True):
        for stack in STACKS:
            getattr(experts, stack).data.copy_(getattr(low, stack).dequantize())
    expected = logits_and_gradients(adapt(plain, seed=5), inputs)
    got = logits_and_gradients(factor_expert_lora(adapted), inputs)
    assert (got[0] - quantised).abs().max() > 0.1 * quantised.abs().max()
    assert len(got[1]) == 4 * len(experts_of(model))
    for one, other in zip(got, expected):
        assert_equal(one, other, 1e-3)
