"""Dense models whose weights cannot be read or are not finite."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_sparse_moe_vlm.toolbox.upcycling import UpcyclingError, upcycle, upcycle_checkpoint, upcycle_from_parts
from modeling_sparse_moe_vlm.toolbox.upcycling.dense_weights import check_finite, check_weights_at_hand
from tests.support.upcycled import make_dense

WEIGHTS = [
    "model.layers.1.mlp.down_proj.weight",  # becomes part of experts
    "model.layers.0.self_attn.q_proj.weight",  # is kept
    "lm_head.weight",
]


def spoil(model, name, value=float("nan")):
    with torch.no_grad():
        model.get_parameter(name)[0, 1] = value
    return model


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(name, value, tmp_path):
    dense = spoil(make_dense("llama"), name, value)
    message = f"`{name}` has 1 values of {dense.get_parameter(name).numel()} that are NaN or infinite"
    for function in (upcycle, upcycle_from_parts):
        with pytest.raises(UpcyclingError, match=message):
            function(dense, expert_groups="joint")
    dense.save_pretrained(tmp_path / "dense")
    for compare in (True, False):
        with pytest.raises(UpcyclingError, match=message):
            upcycle_checkpoint(tmp_path / "dense", tmp_path / "sparse", compare=compare)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_the_vision_encoder_of_parts():
    tower = spoil(make_dense("llava").model.vision_tower, "encoder.layers.0.mlp.fc1.weight")
    with pytest.raises(UpcyclingError, match=r"`encoder\.layers\.0\.mlp\.fc1\.weight` has 1 values of"):
        upcycle_from_parts(make_dense("llama"), tower, image_token_id=5)


def test_finite_values():
    largest = torch.finfo(torch.float16).max
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        check_finite([("weight", torch.tensor([largest, -largest, 0.0], dtype=dtype))])
    check_finite([("ids", torch.arange(3)), ("empty", torch.empty(0, 2))])
    with pytest.raises(UpcyclingError, match="`b` has 2 values of 3 that"):
        check_finite([("a", torch.ones(2)), ("b", torch.tensor([float("nan"), 1.0, float("inf")]))])


def test_models_on_the_meta_device():
    config = make_dense("llama").config
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(config)
    for function in (upcycle, upcycle_from_parts):
        with pytest.raises(UpcyclingError, match=r"LlamaForCausalLM are on the meta device.*`model\.embed_tokens"):
            function(dense)


def test_models_that_are_offloaded():
    dense = cpu_offload(make_dense("llama"))
    with pytest.raises(UpcyclingError, match=r"LlamaForCausalLM are offloaded .* without a `device_map`"):
        upcycle(dense)


def test_models_with_hooks():
    dense = make_dense("llama")
    dense = dispatch_model(dense, {"": "cpu"}, main_device="cpu", force_hooks=True)
    with pytest.raises(UpcyclingError, match="spread over several devices by hooks of Accelerate"):
        upcycle(dense)


def test_weights_that_are_sharded():
    model = nn.Linear(2, 2)
    model.weight.full_tensor = None
    with pytest.raises(UpcyclingError, match=r"Weights of Linear are sharded over processes \(such as `weight`\)"):
        check_weights_at_hand(model)


def test_models_with_a_device_map_of_one_device(tmp_path):
    make_dense("llama").save_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    ids = torch.arange(5, 15)[None]
    assert torch.equal(upcycle(dense)(ids).logits, dense(ids).logits)


def test_compiled_models():
    dense = make_dense("llama")
    with pytest.raises(UpcyclingError, match=r"got OptimizedModule\. Pass the model that was compiled"):
        upcycle(torch.compile(dense, backend="eager"))
    dense.compile(backend="eager")  # which does not change the class
    ids = torch.arange(5, 15)[None]
    sparse = upcycle(dense)
    assert sparse._compiled_call_impl is None
    torch.testing.assert_close(sparse(ids).logits, make_dense("llama")(ids).logits)


def test_wrapped_models():
    with pytest.raises(UpcyclingError, match=r"got DataParallel\. Pass the model that it wraps \(`model\.module`\)"):
        upcycle(nn.DataParallel(make_dense("llama")))
    with pytest.raises(UpcyclingError, match=r"got Linear\.$"):
        upcycle(nn.Linear(2, 2))
