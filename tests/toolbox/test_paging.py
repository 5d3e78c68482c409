"""Paging of experts, on models of Transformers and on ours, against the same models with all experts resident."""

import copy
import math
import os
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from safetensors.torch import load_file
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from modeling_sparse_moe_vlm.toolbox.paging import PagingCounts, page_experts, unpage_experts
from tests.conftest import make_inputs, make_model
from tests.in_tree_models import TEXT, make_qwen3_vl_moe

SIZES = TEXT | {"intermediate_size": 24, "num_experts_per_tok": 2, "num_hidden_layers": 2}
MANY = 12


def make_qwen3_moe(**kwargs):
    config = Qwen3MoeConfig(**SIZES | {"moe_intermediate_size": 24, "num_experts": MANY} | kwargs)
    return Qwen3MoeForCausalLM(config)


def make_gpt_oss():
    model = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=MANY, sliding_window=6))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:  # zero at first
                parameter.normal_(std=0.2)
    return model


MODELS = {
    "qwen3_moe": make_qwen3_moe,
    "qwen3_vl_moe": make_qwen3_vl_moe,
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=MANY)),
    "gpt_oss": make_gpt_oss,
    "joint": lambda: make_model(expert_groups="joint", num_experts=8),
    "isolated": lambda: make_model(expert_groups="isolated", num_experts=8),
    "pool": lambda: make_model(expert_pool=[0, 0], num_experts=8),
}


def build(name: str):
    torch.manual_seed(0)
    return MODELS[name]().eval().requires_grad_(False)


def inputs_of(model) -> dict[str, torch.Tensor]:
    if model.config.model_type == "sparse_moe_vlm":
        return make_inputs()
    return {"input_ids": torch.randint(7, 99, (2, 9), generator=torch.Generator().manual_seed(1))}


def experts_of(model) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "is_transposed")}


def device_map(model) -> dict[str, str]:
    """Experts on disk, and all else in memory. Accelerate wants entries that do not contain each other."""
    experts, places = experts_of(model), {}
    for name, module in model.named_modules():
        inside = [other for other in experts if f"{other}.".startswith(f"{name}." if name else "")]
        if not inside or name in experts:
            if not any(f"{name}.".startswith(f"{place}.") for place in places):
                places[name] = "disk" if name in experts else "cpu"
    return places


def from_disk(model, folder: Path):
    """The model with its experts on disk and all else in memory."""
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder, device_map=device_map(model), offload_folder=folder / "offload")
    return loaded.requires_grad_(False)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_paged_is_resident(name, implementation, tmp_path):
    """In memory and from disk, with as few slots as can be (several passes for a prompt): logits and tokens."""
    model = build(name)
    inputs = inputs_of(model)
    model.set_experts_implementation(implementation)
    expected = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    silenced = copy.deepcopy(model)
    for experts in experts_of(silenced).values():
        experts.down_proj.zero_()
    assert (silenced(**inputs).logits - expected).abs().max() > 1e-2, "experts matter"
    for paged in (copy.deepcopy(model), from_disk(model, tmp_path)):
        paged.set_experts_implementation(implementation)
        for slots in (2, 3):
            with page_experts(paged, slots) as pager:
                torch.testing.assert_close(paged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
                assert torch.equal(paged.generate(**inputs, max_new_tokens=6, do_sample=False), tokens)
            assert set(pager.slots.values()) == {slots}
            assert pager.total("prefill").misses > slots
            assert pager.total("decode").misses > 0
        torch.testing.assert_close(paged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_same_arithmetic_where_the_slots_suffice():
    model = build("qwen3_moe")
    paged = copy.deepcopy(model)
    page_experts(paged, MANY)
    for length in (1, 7, 1):
        tokens = torch.randint(7, 99, (2, length))
        assert torch.equal(paged(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "isolated", "pool"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
def test_gradients_are_those_of_the_resident_model(name, implementation, checkpointing):
    """Of everything but the experts, which are frozen, over two calls before backward; slots are overwritten often."""
    resident, gradients = build(name), []
    inputs = inputs_of(resident)
    paged = copy.deepcopy(resident)
    pager = page_experts(paged, 2)
    for model in (resident, paged):
        model.set_experts_implementation(implementation)
        model.train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        trained = {
            name: parameter.requires_grad_()
            for name, parameter in model.named_parameters()
            if "expert" not in name and "gate_up" not in name
        }
        loss = model(**inputs).logits.square().mean()
        loss = loss + model(**inputs | {"input_ids": inputs["input_ids"].flip(0)}).logits.sin().mean()
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trained.items()})
    expected, ours = gradients
    routers = [name for name in expected if "gate.weight" in name or "router.weight" in name]
    assert routers
    assert all(expected[name].abs().max() > 1e-6 for name in routers)
    for name, gradient in expected.items():
        if gradient is None:
            assert ours[name] is None
        else:
            torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    if implementation != "batched_mm" and checkpointing is None:
        assert pager.total("backward").misses > 0
