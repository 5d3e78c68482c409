"""`upcycle`: its arguments, results and errors, and the parity receipt."""

import copy
import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from modeling_sparse_moe_vlm.toolbox.upcycling import ParityReceipt, UpcyclingError, upcycle
from modeling_sparse_moe_vlm.toolbox.upcycling.receipt import default_bound, parity
from tests.support.in_tree_models import GREEDY, make_mllama
from tests.support.upcycled import make_dense, make_dense_inputs

# The module: in the package, the function of the same name hides it.
upcycle_file = sys.modules[upcycle.__module__]


def receipt_of(model) -> dict:
    return model.experts_config.start["parity"]


# ------------------------------------------------------------------------------------------------ results


@torch.no_grad()
@pytest.mark.parametrize("expert_groups", ["joint", "isolated", "hybrid"])
@pytest.mark.parametrize("name", ["llama", "llava", "qwen3_vl", "gemma3", "paligemma2", "idefics3", "smolvlm"])
def test_the_outputs_equal_those_of_the_dense_model(name, expert_groups):
    if name == "llama" and expert_groups == "isolated":
        pytest.skip("one modality")
    dense, inputs = make_dense(name), make_dense_inputs(name)
    sparse = upcycle(dense, expert_groups, num_experts=4)
    expected, found = dense(**inputs).logits, sparse(**inputs).logits
    if expert_groups == "hybrid":
        assert torch.equal(found, expected)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert torch.equal(sparse.generate(**inputs, **GREEDY), dense.generate(**inputs, **GREEDY))
    assert type(sparse).__name__ == f"Upcycled{type(dense).__name__}"
    assert sparse.experts_config.num_experts == 4
    assert sparse.experts_config.start["name"] == ("residual" if expert_groups == "hybrid" else "copy")


def test_the_dense_model_does_not_change():
    dense, inputs = make_dense(), make_dense_inputs()
    before = copy.deepcopy(dense.state_dict())
    config = dense.config.to_dict()
    random_state = torch.get_rng_state()
    sparse = upcycle(dense, "joint", num_experts=2)
    assert torch.equal(torch.get_rng_state(), random_state)
    with torch.no_grad():
        expected = dense(**inputs).logits
        for parameter in sparse.parameters():
            parameter.add_(1.0)
        assert torch.equal(dense(**inputs).logits, expected)
    assert type(dense).__name__ == "LlavaForConditionalGeneration"
    assert dense.config.to_dict() == config
    torch.testing.assert_close(dense.state_dict(), before, rtol=0, atol=0)


def test_the_seed_determines_all_random_weights():
    dense = make_dense()
    one, same, other = (upcycle(dense, "hybrid", num_experts=4, seed=seed).state_dict() for seed in (1, 1, 2))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(
        *(state["model.language_model.layers.0.mlp.gate.weight"] for state in (one, other)),
    )


@pytest.mark.parametrize("mode", [True, False])
def test_mode_dtype_and_settings_are_kept(mode):
    dense = make_dense().train(mode).to(torch.bfloat16)
    dense.generation_config.max_new_tokens = 3
    sparse = upcycle(dense, "joint", num_experts=2)
    assert sparse.training is dense.training is mode
    assert sparse.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in sparse.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in sparse.parameters())
    assert sparse.generation_config.max_new_tokens == 3
    assert receipt_of(sparse)["dtype"] == "bfloat16"
    assert receipt_of(sparse)["bound"] == 4 * torch.finfo(torch.bfloat16).eps


def test_only_the_chosen_layers_become_sparse():
    dense, inputs = make_dense(), make_dense_inputs()
    sparse = upcycle(dense, "joint", num_experts=2, layers=[1])
    assert sparse.experts_config.blocks == ["language_model.layers.1.mlp"]
    assert sparse.experts_config.sparse_layers == [1]
    layers = sparse.model.language_model.layers
    assert type(layers[0].mlp).__name__ == "LlamaMLP"
    assert len(sparse(**inputs, output_router_logits=True).router_logits) == 1
    torch.testing.assert_close(sparse(**inputs).logits, dense(**inputs).logits)


def test_further_fields_reach_the_experts():
    sparse = upcycle(
        make_dense(), "joint", num_experts=4, router="sigmoid", router_z_loss_coef=0.5, router_bias_update_rate=0.1
    )
    config = sparse.experts_config
    assert (config.router, config.router_z_loss_coef, config.initializer_range) == ("sigmoid", 0.5, 0.2)
    bias = sparse.model.language_model.layers[0].mlp.gate.e_score_correction_bias
    assert bias.shape == (2, 4)
    assert not bias.any()


def test_modalities():
    assert upcycle(make_dense("llama"), "joint").experts_config.modalities == ["text"]
    assert upcycle(make_dense(), "joint").experts_config.modalities == ["text", "image"]
    sparse = upcycle(make_dense("qwen3_vl"), "isolated", num_experts=6, modalities=["text", "image", "video"])
    assert [group["name"] for group in sparse.experts_config.expert_groups] == ["text", "image", "video"]
    assert sparse.experts_config.placeholder_ids == {"image": [3], "video": [4]}
    sparse = upcycle(make_dense(), "isolated", num_experts=4, placeholders={"image": [7]})
    assert sparse.experts_config.placeholders == {1: [7]}


def test_router_rows_from_data():
    dense, inputs = make_dense(), make_dense_inputs()
    sparse = upcycle(dense, "isolated", num_experts=4, router_init="data", batch=inputs)
    assert sparse.experts_config.start["router_init"] == "data"
    random = upcycle(dense, "isolated", num_experts=4)
    rows, others = (model.model.language_model.layers[0].mlp.gate.weight for model in (sparse, random))
    assert not torch.allclose(rows, others)
    with torch.no_grad():
        torch.testing.assert_close(sparse(**inputs).logits, dense(**inputs).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(UpcyclingError, match='`router_init="data"` needs a `batch`'):
        upcycle(dense, router_init="data")
    with pytest.raises(UpcyclingError, match=r"`router_init` must be one of \('random', 'data'\), got 'zeros'"):
        upcycle(dense, router_init="zeros")


# ------------------------------------------------------------------------------------------------ errors


def test_models_that_are_not_of_transformers():
    dense = make_dense("llama")
    with pytest.raises(UpcyclingError, match="takes a model of Transformers, got Linear"):
        upcycle(torch.nn.Linear(2, 2))
    with pytest.raises(UpcyclingError, match=r"got PeftModelForCausalLM. Merge its adapters first"):
        upcycle(get_peft_model(copy.deepcopy(dense), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")))
    with pytest.raises(UpcyclingError, match="UpcycledLlamaForCausalLM is upcycled already"):
        upcycle(upcycle(dense, "joint"))

    class OwnModel(LlamaForCausalLM):
        pass

    with pytest.raises(UpcyclingError, match="OwnModel is not a class that Transformers exports"):
        upcycle(OwnModel(dense.config))


def test_isolated_experts_for_images_that_are_not_tokens():
    torch.manual_seed(0)
    dense = make_mllama().eval()
    with pytest.raises(UpcyclingError, match="its images enter by cross-attention or an encoder"):
        upcycle(dense, "isolated")


def test_a_broken_start_is_not_returned(monkeypatch):
    """A start that swaps the projections gives other outputs, and no model is returned."""
    start_block = upcycle_file.start_block

    def broken(block, config, weights, *args, **kwargs):
        start_block(block, config, weights._replace(gate=weights.up, up=weights.gate), *args, **kwargs)

    monkeypatch.setattr(upcycle_file, "start_block", broken)
    with pytest.raises(UpcyclingError, match=r"not those of the dense model: parity on 32 tokens .*bound 1.0e-05"):
        upcycle(make_dense(), "joint")
    for bound in (float("inf"), 10.0):
        sparse = upcycle(make_dense(), "joint", parity_bound=bound)
        assert 0.05 < receipt_of(sparse)["relative_difference"] < 10


def test_experts_of_images_are_compared_without_images(monkeypatch):
    """The generated batch has tokens of every modality, so an error in the image experts is detected."""
    start_block = upcycle_file.start_block

    def broken(block, *args, **kwargs):
        start_block(block, *args, **kwargs)
        block.experts["image"].down_proj.data.mul_(1.01)

    monkeypatch.setattr(upcycle_file, "start_block", broken)
    with pytest.raises(UpcyclingError, match="not those of the dense model"):
        upcycle(make_dense(), "isolated")


def test_starts_that_are_not_exact_have_no_bound():
    sparse = upcycle(make_dense(), "joint", start="drop", drop_ratio=0.5)
    receipt = receipt_of(sparse)
    assert receipt["bound"] is None
    assert receipt["relative_difference"] > 0.01
    assert sparse.experts_config.start["drop_ratio"] == 0.5
    with pytest.raises(UpcyclingError, match=r"bound 1\.0e-03"):
        upcycle(make_dense(), "joint", start="drop", drop_ratio=0.5, parity_bound=1e-3)


# ------------------------------------------------------------------------------------------------ receipts


def test_receipts_are_saved_with_the_model(tmp_path):
    dense, inputs = make_dense(), make_dense_inputs()
    inputs["attention_mask"][1, :3] = 0
    sparse = upcycle(dense, "joint", batch=inputs)
    sparse.save_pretrained(tmp_path)
    start = json.loads((tmp_path / "config.json").read_text())["experts_config"]["start"]
    receipt = ParityReceipt(**start["parity"])
    assert receipt.holds
    assert (receipt.batch, receipt.num_tokens, receipt.dtype, receipt.bound) == ("given", 25, "float32", 1e-5)
    assert receipt.same_tokens == 1.0
    assert 0 < receipt.relative_difference < 1e-6
    assert start["seed"] == 0
    assert "the same token at 100.0% of the positions" in str(receipt)
    assert type(sparse).from_pretrained(tmp_path).experts_config.start == start


@torch.no_grad()
def test_contents_of_a_receipt():
    dense, inputs = make_dense("llama"), make_dense_inputs("llama")
    sparse = upcycle(dense, "joint", start="drop", batch=inputs)
    expected, found = dense(**inputs).logits, sparse(**inputs).logits
    receipt = receipt_of(sparse)
    assert receipt["relative_difference"] == pytest.approx(((found - expected).norm() / expected.norm()).item())
    assert receipt["max_difference"] == pytest.approx((found - expected).abs().max().item())
    assert receipt["same_tokens"] == pytest.approx((found.argmax(-1) == expected.argmax(-1)).float().mean().item())
    assert receipt["num_tokens"] == 28


def test_bounds():
    assert default_bound(torch.float32) == default_bound(torch.float64) == 1e-5
    assert default_bound(torch.float16) == 4 * 2**-10
    values = {"max_difference": 0.0, "same_tokens": 1.0, "dtype": "float32", "num_tokens": 1, "batch": "made"}
    assert ParityReceipt(relative_difference=1e-5, bound=1e-5, **values).holds
    assert not ParityReceipt(relative_difference=1.1e-5, bound=1e-5, **values).holds
    assert ParityReceipt(relative_difference=9.0, bound=None, **values).holds
    assert "not exact by design" in str(ParityReceipt(relative_difference=9.0, bound=None, **values))


def test_outputs_that_are_not_finite_are_above_the_bound():
    sparse = upcycle(make_dense("llama"), "joint")
    batch = {"input_ids": torch.arange(5, 15)[None]}
    found = parity(torch.full((1, 10, 99), float("nan")), sparse, batch, is_given=True, bound=float("inf"))
    assert found.relative_difference == float("inf")
    assert not ParityReceipt(**found.to_dict() | {"bound": 1e9}).holds


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "hidden_act", "widths"])
def test_fields_that_follow_from_the_dense_model_are_refused(field):
    with pytest.raises(UpcyclingError, match=f"`{field}` is taken from the dense model"):
        upcycle(make_dense("llama"), "joint", **{field: 64})


@pytest.mark.parametrize(
    "placeholders", [{"image": 7}, {"image": "a"}, {"image": ["a"]}, {"foo": [7]}, {"text": [7]}, 3]
)
def test_placeholders_that_are_not_lists_of_ids(placeholders):
    with pytest.raises(UpcyclingError, match="`placeholders` must be a dict of lists of token ids"):
        upcycle(make_dense(), "joint", placeholders=placeholders)


def test_models_with_other_heads():
    dense = LlamaForSequenceClassification(make_dense("llama").config)
    with pytest.raises(
        UpcyclingError, match="LlamaForSequenceClassification has a head that upcycling does not support"
    ):
        upcycle(dense)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 1}, "`layers` must be a list, got 1"),
        ({"modalities": "text"}, "`modalities` must be a list, got 'text'"),
        ({"parity_bound": -1}, "`parity_bound` must be a number of at least 0, got -1"),
        ({"parity_bound": float("nan")}, "`parity_bound` must be a number of at least 0, got nan"),
        ({"parity_bound": "x"}, "`parity_bound` must be a number of at least 0, got 'x'"),
        ({"batch": torch.zeros(1, 2)}, r"`batch` must be inputs .* got Tensor"),
        ({"batch": 3}, r"`batch` must be inputs .* got int"),
        ({"seed": None}, "`seed` must be an integer, got None"),
        ({"seed": True}, "`seed` must be an integer, got True"),
        ({"seed": 0.5}, r"`seed` must be an integer, got 0\.5"),
    ],
)
def test_arguments_of_a_wrong_type(arguments, message):
    with pytest.raises(UpcyclingError, match=message):
        upcycle(make_dense("llama"), "joint", **arguments)


def test_parts_keep_their_own_mode():
    dense = make_dense().train()
    dense.model.vision_tower.eval()
    for model in (dense, upcycle(dense, "joint")):
        assert model.training
        assert model.model.language_model.training
        assert not any(module.training for module in model.model.vision_tower.modules())
