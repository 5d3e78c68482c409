"""Experts as separate linear layers: the same function and the same checkpoints as stacked experts."""

import copy
import json
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration, experts
from modeling_sparse_moe_vlm.experts import SparseMoeVlmExperts, SparseMoeVlmUnfusedExperts
from modeling_sparse_moe_vlm.experts_config import experts_config_of
from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config
from modeling_sparse_moe_vlm.toolbox.paging import page_experts
from modeling_sparse_moe_vlm.toolbox.placement import plan_expert_placement
from modeling_sparse_moe_vlm.toolbox.quantization import unfuse_experts
from modeling_sparse_moe_vlm.toolbox.training import model_parts
from modeling_sparse_moe_vlm.toolbox.upcycling import to_native, upcycle
from tests.support import upcycled
from tests.support.in_tree_models import make_qwen3_vl_moe
from tests.support.models import make_inputs, make_model
from tests.support.oracles import MANY_GROUPS
from tests.test_loading import tensors_on_disk

pytestmark = pytest.mark.newest

KINDS = {
    "hybrid": {"num_experts": 6},
    "groups": {"expert_groups": MANY_GROUPS, "num_experts": None},
    "pools of groups": {"num_hidden_layers": 3, "expert_pool": [0, None, 0], "expert_groups": "isolated"},
    "top_p": {"router": "top_p", "num_experts_per_tok": 3},
    "capacity": {"expert_capacity_factor": 0.5},
}
LAYERS = "model.language_model.layers"


def load(folder, **kwargs):
    return SparseMoeVlmForConditionalGeneration.from_pretrained(folder, **kwargs)


def unfused_modules(model) -> dict[str, SparseMoeVlmUnfusedExperts]:
    return {name: each for name, each in model.named_modules() if isinstance(each, SparseMoeVlmUnfusedExperts)}


def stacked_modules(model) -> dict[str, SparseMoeVlmExperts]:
    return {name: each for name, each in model.named_modules() if isinstance(each, SparseMoeVlmExperts)}


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if "groups" in kind else pytest.mark.extensive) for kind in KINDS]
)
def test_the_same_function_and_the_same_checkpoints(kind, tmp_path):
    model, inputs = make_model(**KINDS[kind]), make_inputs()
    model.save_pretrained(tmp_path / "model")
    unfused = load(tmp_path / "model", unfused_experts=True)
    assert unfused_modules(unfused).keys() == stacked_modules(model).keys()
    assert not stacked_modules(unfused)
    assert unfused.config.text_config.unfused_experts
    expected = logits_of(model, inputs)
    torch.testing.assert_close(logits_of(unfused, inputs), expected)
    for name in unfused_modules(unfused):
        silenced = copy.deepcopy(unfused)
        with torch.no_grad():
            for parameter in silenced.get_submodule(name).parameters():
                parameter.zero_()
        assert (logits_of(silenced, inputs) - expected).abs().max() > 1e-3, f"{name} matters"

    unfused.save_pretrained(tmp_path / "again")
    before, after = tensors_on_disk(tmp_path / "model"), tensors_on_disk(tmp_path / "again")
    assert after.keys() == before.keys() >= {name for name in unfused.state_dict() if ".experts." in name}
    assert all(torch.equal(after[name], before[name]) for name in before)
    # The setting is saved, and can be changed when loading.
    assert unfused_modules(load(tmp_path / "again"))
    stacked = load(tmp_path / "again", unfused_experts=False)
    assert stacked_modules(stacked).keys() == stacked_modules(model).keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(stacked.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_gradients(kind):
    model, inputs = make_model(**KINDS[kind]), make_inputs()
    unfused = unfuse_experts(copy.deepcopy(model))
    for each in (model, unfused):
        each.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, stack in stacked_modules(model).items():
        if stack.gate_up_proj.grad is None:  # no token of its modality
            continue
        for i, expert in enumerate(unfused.get_submodule(name)):
            ours = [expert.gate_proj.weight.grad, expert.up_proj.weight.grad, expert.down_proj.weight.grad]
            expected = [*stack.gate_up_proj.grad[i].chunk(2), stack.down_proj.grad[i]]
            for gradient, of_stack in zip(ours, expected, strict=True):
                gradient = torch.zeros_like(of_stack) if gradient is None else gradient
                torch.testing.assert_close(gradient, of_stack, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llava", pytest.param("llama", marks=pytest.mark.extensive)])
def test_upcycled_models(kind, tmp_path):
    model, inputs = upcycled.make_upcycled(kind), upcycled.make_inputs(kind)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, unfused_experts=True)
    for unfused in (loaded, unfuse_experts(copy.deepcopy(model))):
        assert unfused_modules(unfused).keys() == stacked_modules(model).keys()
        assert unfused.config.experts_config.unfused_experts
        torch.testing.assert_close(logits_of(unfused, inputs), logits_of(model, inputs))


@pytest.mark.parametrize("start", ["copy", "drop", "split"])
def test_upcycling_to_unfused_experts(start):
    arguments = {"start": start, "num_experts": 4, "num_experts_per_tok": 2}
    stacked = upcycle(upcycled.make_dense("llama"), "joint", **arguments)
    unfused = upcycle(upcycled.make_dense("llama"), "joint", **arguments, unfused_experts=True)
    assert unfused_modules(unfused)
    unfuse_experts(stacked)
    for name, tensor in stacked.state_dict().items():
        assert torch.equal(unfused.state_dict()[name], tensor), name


def test_generation_and_the_auto_class(tmp_path):
    model, inputs = make_model(), make_inputs()
    model.save_pretrained(tmp_path)
    unfused = AutoModelForImageTextToText.from_pretrained(tmp_path, unfused_experts=True)
    arguments = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(unfused.generate(**inputs, **arguments), model.generate(**inputs, **arguments))


# ------------------------------------------------------------------------------------------------ in memory


def test_models_in_memory(tmp_path):
    model, inputs = make_model(num_experts=3).train(), make_inputs()
    stack = model.get_submodule(f"{LAYERS}.1.mlp.experts")
    stack.down_proj.requires_grad_(False)
    original = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "stacked")  # which keeps conversions for stacks if the model was loaded
    loaded = load(tmp_path / "stacked")
    for each in (model, loaded):
        assert unfuse_experts(each) is each
        assert unfuse_experts(each) is each, "twice does no harm"
        each.save_pretrained(tmp_path / "unfused")
        saved = tensors_on_disk(tmp_path / "unfused")
        for name, tensor in tensors_on_disk(tmp_path / "stacked").items():
            assert torch.equal(saved.pop(name), tensor)
        assert saved == {}
    torch.testing.assert_close(logits_of(model, inputs), logits_of(original, inputs))
    unfused = model.get_submodule(f"{LAYERS}.1.mlp.experts")
    assert unfused.training
    assert all(expert.training for expert in unfused)
    assert not loaded.get_submodule(f"{LAYERS}.1.mlp.experts.0").training
    assert unfused.num_experts == 3
    assert [name for name, each in unfused[2].named_parameters() if each.requires_grad] == [
        "gate_proj.weight",
        "up_proj.weight",
    ]
    of_stack = stack.gate_up_proj.untyped_storage().data_ptr()
    assert unfused[0].gate_proj.weight.untyped_storage().data_ptr() != of_stack


def test_models_that_cannot_be_unfused(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts of this package"):
        unfuse_experts(upcycled.make_dense("llama"))
    with pytest.raises(ValueError, match="Qwen3VLMoeForConditionalGeneration has no experts of this package"):
        unfuse_experts(make_qwen3_vl_moe())
    model = make_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.experts'\] is split into shards: .* without `num_expert_shards`"
    ):
        unfuse_experts(load(tmp_path, num_expert_shards=2))
    get_peft_model(model, expert_lora_config(model, layers=[0], r=2))
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.* has an adapter: merge or unload"):
        unfuse_experts(model)
    quantised = make_model()
    of_class = type("Quantised", (torch.nn.Parameter,), {})
    stack = quantised.get_submodule(f"{LAYERS}.1.mlp.experts")
    stack.down_proj = of_class(stack.down_proj.data)
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.\['down_proj'\] is already quantised"):
        unfuse_experts(quantised)


# ------------------------------------------------------------------------------------------------ errors when loading


def test_checkpoints_whose_experts_do_not_fit(tmp_path):
    model = make_model(num_experts=3, expert_groups="joint")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = f"{LAYERS}.1.mlp.experts.2.up_proj.weight"

    def refuses(changed: dict[str, torch.Tensor], message: str) -> None:
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load(tmp_path, unfused_experts=True)

    refuses({key: value for key, value in tensors.items() if key != name}, f"it lacks {name}")
    more = name.replace("experts.2.", "experts.3.")
    refuses(tensors | {more: tensors[name].clone()}, f"the model has no place for {more}")
    model.save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(ValueError, match=r"0.mlp.experts.\w+'\] is a stack of experts, .* `unfused_experts=True`"):
        load(tmp_path, unfused_experts=True)


def test_layers_without_any_expert_in_the_checkpoint_are_new(tmp_path):
    model = make_model(num_experts=3, expert_groups="joint")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if ".layers.1.mlp.experts." not in key}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    logging.set_verbosity_error()
    loaded, _ = load(tmp_path, unfused_experts=True, output_loading_info=True)
    weight = loaded.get_parameter(f"{LAYERS}.1.mlp.experts.0.up_proj.weight")
    assert weight.std().item() == pytest.approx(0.2, rel=0.1)  # `initializer_range`
    kept = loaded.get_parameter(f"{LAYERS}.0.mlp.experts.0.up_proj.weight")
    assert torch.equal(kept, tensors[f"{LAYERS}.0.mlp.experts.0.up_proj.weight"])


def test_settings_that_cannot_be_combined(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`num_expert_shards` and `unfused_experts` cannot be combined"):
        load(tmp_path, unfused_experts=True, num_expert_shards=2)
    with pytest.raises(ValueError, match="`unfused_experts` must be True or False"):
        load(tmp_path, unfused_experts="yes")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_config"]["unfused_experts"] is False


def test_with_several_processes_every_expert_runs(monkeypatch):
    """Otherwise, processes would wait for gradients of experts that another process has no token for."""
    model, inputs = unfuse_experts(make_model(num_experts=8, num_experts_per_tok=1)), make_inputs(length=8)
    expected = logits_of(model, inputs)
    model(**inputs).logits.sum().backward()
    assert any(weight.grad is None for name, weight in model.named_parameters() if ".experts." in name)
    model.zero_grad()
    monkeypatch.setattr(experts, "is_one_of_several_processes", lambda: True)
    logits = model(**inputs).logits
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if ".experts." in name)


# ------------------------------------------------------------------------------------------------ adapters and parts


def test_adapters():
    model = unfuse_experts(make_model(num_experts=4, expert_groups="isolated"))
    names = {"gate_proj", "up_proj", "down_proj"}

    def targets(**selection) -> set[str]:
        config = expert_lora_config(model, r=2, **selection)
        assert not config.target_parameters
        return {name.removeprefix(f"{LAYERS}.") for name in config.target_modules}

    assert targets() == {
        f"{layer}.mlp.experts.{group}.{i}.{name}"
        for layer in (0, 1)
        for group in ("text", "image")
        for i in (0, 1)
        for name in names
    }
    of_images = {f"1.mlp.experts.image.{i}.{name}" for i in (0, 1) for name in names}
    assert targets(layers=[1], modalities=["image"]) == of_images
    chosen = {"1.mlp.experts.text": [1]}
    assert targets(experts=chosen, projections=["up"]) == {"1.mlp.experts.text.1.up_proj"}
    with pytest.raises(ValueError, match="`expert_ranks` is for stacked experts"):
        targets(expert_ranks={"1.mlp.experts.text": [1, 2]})

    torch.manual_seed(0)
    adapted = get_peft_model(
        model, expert_lora_config(model, r=2, modalities=["image"], init_lora_weights=False)
    ).eval()
    inputs, text = make_inputs(), make_inputs(images_per_row=0)
    with adapted.disable_adapter():
        plain, plain_text = logits_of(adapted, inputs), logits_of(adapted, text)
    outputs = logits_of(adapted, inputs)
    assert (outputs - plain).abs().max() > 1e-2
    assert torch.equal(logits_of(adapted, text), plain_text), "experts for images do not run"
    torch.testing.assert_close(logits_of(adapted.merge_and_unload(), inputs), outputs, rtol=1e-4, atol=1e-5)


def test_usual_target_modules_reach_the_experts(caplog):
    model = unfuse_experts(make_model(num_experts=3))
    adapted = get_peft_model(model, LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"]))
    names = {name for name, _ in adapted.named_parameters() if "lora_A" in name and ".experts." in name}
    assert len(names) == 2 * 3 * 3
    assert "experts" not in caplog.text


def test_parts_of_training():
    model = make_model(num_experts=4, expert_groups="isolated")
    stacked = model_parts(model)
    unfused = model_parts(unfuse_experts(model))
    assert unfused.keys() == stacked.keys()
    for part in ("experts.text", "experts.image"):
        assert sum(weight.numel() for weight in unfused[part].values()) == sum(
            weight.numel() for weight in stacked[part].values()
        )
    assert unfused["routers"].keys() == stacked["routers"].keys()
    assert experts_config_of(model.config).unfused_experts


def test_export_to_a_class_of_transformers():
    model = upcycled.make_upcycled("llama", "joint", num_experts=3, modalities=["text"])
    expected = to_native(copy.deepcopy(model)).state_dict()
    exported = to_native(unfuse_experts(model)).state_dict()
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())


def test_paging_and_placement_need_stacks():
    model = unfuse_experts(make_model())
    for refuse in (partial(page_experts, model), partial(plan_expert_placement, model, {"cpu": "1GB"})):
        with pytest.raises(ValueError, match="load the model with `unfused_experts=False`"):
            refuse()
