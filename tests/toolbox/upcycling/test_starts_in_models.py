"""Models that start from dense ones: every start gives the logits of the dense model in every arrangement."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_sparse_moe_vlm.experts import SparseMoeVlmSparseMoeBlock
from modeling_sparse_moe_vlm.toolbox.upcycling import upcycle
from tests.support.in_tree_models import IMAGE, make_inputs, make_model
from tests.support.models import TINY_DECODER

pytestmark = pytest.mark.newest

BY_LAYER = [
    {"name": "text", "num_experts": 2, "modalities": ["text"], "layers": [0]},
    {"name": "image", "num_experts": 4, "modalities": ["image"], "layers": [0]},
    {"name": "joint", "num_experts": 4, "layers": [1]},
]
SHARED = [
    {"name": "joint", "num_experts": 4},
    {"name": "everyone", "num_experts": 2, "always_on": True},
    {"name": "vision", "num_experts": 1, "modalities": ["image"], "always_on": True},
]
# Requests for models with images and for language models.
REQUESTS = {
    "hybrid": {},
    "hybrid-fine": {"granularity": 6, "num_experts_per_tok": 3},
    "hybrid-copy": {"start": "copy"},
    "hybrid-split": {"start": "split"},
    "hybrid-top_p": {"router": "top_p"},
    "hybrid-capacity": {"expert_capacity_factor": 0.5, "norm_topk_prob": False},
    "hybrid-pool": {"expert_pool": [0, 0]},
    "joint": {"expert_groups": "joint"},
    "joint-sigmoid": {"expert_groups": "joint", "router": "sigmoid"},
    "joint-top_p": {"expert_groups": "joint", "router": "top_p", "num_experts_per_tok": 4},
    "joint-split": {"expert_groups": "joint", "granularity": 2, "num_experts_per_tok": 4},
    "joint-drop-0": {"expert_groups": "joint", "start": "drop", "drop_ratio": 0.0},
}
MULTIMODAL_REQUESTS = REQUESTS | {
    "isolated": {"expert_groups": "isolated"},
    "isolated-split": {"expert_groups": "isolated", "start": "split"},
    "joint-by_modality": {"expert_groups": "joint", "num_experts_per_tok_by_modality": {"image": 1}},
    "by_layer": {"expert_groups": BY_LAYER, "num_experts": None},
    "by_layer-split": {"expert_groups": BY_LAYER, "num_experts": None, "start": "split"},
    "shared": {"expert_groups": SHARED, "num_experts": None},
    "shared-copy": {"expert_groups": SHARED, "num_experts": None, "start": "copy"},
}


def make_dense(name: str) -> torch.nn.Module:
    if name != "llama":
        return make_model(name)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY_DECODER)).eval()


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    if name != "llama":
        return make_inputs(name)
    inputs = make_inputs()
    return {
        "input_ids": inputs["input_ids"].where(inputs["input_ids"] != IMAGE, 7),
        "attention_mask": inputs["attention_mask"],
    }


@torch.no_grad()
def logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the logits of all tokens that are not padding."""
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


CASES = [
    *(("llama", name) for name in REQUESTS),
    *((model, name) for model in ("llava", "qwen3_vl") for name in MULTIMODAL_REQUESTS),
]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_logits_equal_those_of_the_dense_model(model, name):
    dense, inputs = make_dense(model), inputs_of(model)
    expected = logits(dense, inputs)
    sparse = upcycle(dense, **MULTIMODAL_REQUESTS[name])
    blocks = [module for module in sparse.modules() if isinstance(module, SparseMoeVlmSparseMoeBlock)]
    assert len(blocks) == 2
    assert difference(logits(sparse, inputs), expected) < 1e-5
    # Comparisons could not fail if the blocks did not matter.
    for block in blocks:
        block.forward = lambda hidden_states, *_, **__: torch.zeros_like(hidden_states)
        assert difference(logits(sparse, inputs), expected) > 0.02
        del block.forward


@pytest.mark.parametrize("name", ["hybrid", "joint-split", "isolated", "by_layer"])
def test_rows_from_data_change_only_routers(name):
    dense, inputs = make_dense("qwen3_vl"), inputs_of("qwen3_vl")
    plain = upcycle(dense, **MULTIMODAL_REQUESTS[name]).state_dict()
    sparse = upcycle(dense, **MULTIMODAL_REQUESTS[name], router_init="data", batch=inputs)
    assert difference(logits(sparse, inputs), logits(dense, inputs)) < 1e-5
    changed = {key for key, tensor in sparse.state_dict().items() if not torch.equal(tensor, plain[key])}
    assert changed == {f"model.language_model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["hybrid", "joint"])
def test_dense_blocks_of_any_width_can_be_upcycled(name, dtype):
    """Kernels for grouped products accept only rows with a multiple of 16 bytes."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**TINY_DECODER | {"intermediate_size": 37})).eval().to(dtype)
    inputs = inputs_of("llama")
    sparse = upcycle(dense, **REQUESTS[name])
    assert difference(logits(sparse, inputs), logits(dense, inputs)) < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(("model", "name"), [case for case in CASES if case[0] != "qwen3_vl"])
def test_bfloat16_rounds_like_the_dense_model(model, name):
    """Compares errors (root mean square) against the dense model in float32: dense and sparse model in bfloat16."""
    inputs = inputs_of(model)
    expected = logits(make_dense(model), inputs)
    dense = make_dense(model).bfloat16()
    rounding = (logits(dense, inputs).float() - expected).square().mean().sqrt()
    sparse = upcycle(dense, **MULTIMODAL_REQUESTS[name])
    assert {parameter.dtype for parameter in sparse.parameters()} == {torch.bfloat16}
    assert (logits(sparse, inputs).float() - expected).square().mean().sqrt() < 1.5 * rounding


@pytest.mark.parametrize("pool_start", ["first", "mean"])
def test_pools_of_copies_are_not_exact(pool_start):
    dense, inputs = make_dense("llava"), inputs_of("llava")
    expected = logits(dense, inputs)
    blocks = [copy.deepcopy(layer.mlp) for layer in dense.model.language_model.layers]
    sparse = upcycle(dense, expert_groups="joint", expert_pool=[3, 3], pool_start=pool_start)
    assert difference(logits(sparse, inputs), expected) > 1e-2
    down = blocks[0].down_proj.weight
    if pool_start == "mean":
        down = (down + blocks[1].down_proj.weight) / 2
    experts = sparse.model.language_model.expert_pools["3"]
    assert torch.allclose(experts.down_proj, down.expand_as(experts.down_proj), atol=1e-6)


@pytest.mark.parametrize("name", ["hybrid", "isolated", "joint-split", "shared"])
@pytest.mark.parametrize("model", ["llava", "qwen3_vl"])
def test_training_reaches_every_parameter(model, name):
    inputs = inputs_of(model)
    sparse = upcycle(make_dense(model), **MULTIMODAL_REQUESTS[name]).train()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sparse(**inputs, labels=labels).loss.backward()
        optimizer.step()
    silent = [
        parameter_name
        for block_name, block in sparse.named_modules()
        if isinstance(block, SparseMoeVlmSparseMoeBlock)
        for parameter_name, parameter in block.named_parameters(prefix=block_name)
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert not silent


def test_same_seed_gives_the_same_model():
    weights = [upcycle(make_dense("llava"), start="drop", seed=seed).state_dict() for seed in (5, 5, 6)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    differing = [name for name in weights[0] if not torch.equal(weights[0][name], weights[2][name])]
    assert any("gate.weight" in name for name in differing)
    assert all(".mlp." in name for name in differing)
