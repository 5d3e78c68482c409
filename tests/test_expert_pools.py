"""Cross-layer expert pools: layers that share their routed experts, each with its own router."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration, SparseMoeVlmTextConfig
from modeling_sparse_moe_vlm.parallel_plans import plan_by_group
from tests.support.models import make_config, make_inputs, make_model
from tests.support.oracles import MANY_GROUPS

pytestmark = pytest.mark.newest

POOLS = {"num_hidden_layers": 4, "expert_pool": [0, 1, 0, None]}
KINDS = {
    "hybrid": POOLS,
    "joint": POOLS | {"expert_groups": "joint"},
    "many groups": POOLS | {"expert_groups": MANY_GROUPS, "num_experts": None},
    "top_p": POOLS | {"router": "top_p", "num_experts_per_tok": 3},
    "partly dense": {"num_hidden_layers": 3, "mlp_only_layers": [1], "expert_pool": [0, None, 0]},
}


def unpooled(model) -> SparseMoeVlmForConditionalGeneration:
    """Returns a model that computes the same, with a copy of the experts of a pool in each of its layers."""
    config = copy.deepcopy(model.config)
    config.text_config.expert_pool = None
    other = SparseMoeVlmForConditionalGeneration(config).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if "expert_pools" not in name}
    for pool, layers in model.config.text_config.pools.items():
        prefix = f"model.language_model.expert_pools.{pool}."
        for name, tensor in model.state_dict().items():
            if name.startswith(prefix):
                for layer in layers:
                    state[f"model.language_model.layers.{layer}.mlp.experts.{name.removeprefix(prefix)}"] = tensor
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("name", KINDS)
def test_a_pool_is_the_same_experts_in_every_layer(name):
    """Outputs equal those of a model with copies. The gradients of the pool are the sums of those of the copies."""
    model, inputs = make_model(**KINDS[name]), make_inputs()
    other = unpooled(model)
    labels = inputs["input_ids"]
    outputs, expected = model(**inputs, labels=labels), other(**inputs, labels=labels)
    torch.testing.assert_close(outputs.logits, expected.logits)
    with torch.no_grad():  # the experts matter
        silenced = copy.deepcopy(model)
        for experts in silenced.model.language_model.expert_pools.parameters():
            experts.zero_()
        assert (silenced(**inputs).logits - outputs.logits).abs().max() > 1e-3
    outputs.loss.backward()
    expected.loss.backward()
    copies = dict(other.model.language_model.named_parameters())
    for pool, layers in model.config.text_config.pools.items():
        for name, parameter in model.model.language_model.expert_pools[str(pool)].named_parameters():
            gradient = sum(copies[f"layers.{layer}.mlp.experts.{name}"].grad for layer in layers)
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_each_layer_keeps_its_router():
    model = make_model(**POOLS)
    routers = [layer.mlp.gate.weight for layer in model.model.language_model.layers]
    assert len({router.data_ptr() for router in routers}) == 4
    logits = model(**make_inputs(), output_router_logits=True).router_logits
    assert len(logits) == 4
    assert not torch.allclose(logits[0], logits[2])


@pytest.mark.parametrize("name", KINDS)
def test_saved_once_and_loaded(name, tmp_path):
    model, inputs = make_model(**KINDS[name]), make_inputs()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
        elements = sum(file.get_tensor(name).numel() for name in names)
    assert elements == sum(parameter.numel() for parameter in model.parameters()) == model.config.num_parameters()
    pooled = [name for name in names if "expert_pools" in name]
    assert pooled
    assert all(name.endswith("_proj.weight") for name in pooled), "one by one"
    own = [layer for layer, pool in enumerate(model.config.text_config.expert_pool) if pool is None]
    assert all(f"layers.{layer}." in name for name in names if ".mlp.experts." in name for layer in own[-1:])
    loaded = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.text_config.expert_pool == KINDS[name]["expert_pool"]
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["expert_pool"]
    for (name, ours), theirs in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)


def test_counted_once():
    shared, own = make_config(**POOLS), make_config(num_hidden_layers=4)
    text = own.text_config
    one_layer = text.num_experts * 3 * text.hidden_size * text.moe_intermediate_size
    assert own.num_parameters() - shared.num_parameters() == one_layer
    for modality in text.modalities:  # two experts per layer, of four: at most all of the pool's
        assert own.num_active_parameters(modality) == shared.num_active_parameters(modality)
    wide = {"num_experts_per_tok": 3, "num_hidden_layers": 4}
    few = make_config(**wide, expert_pool=[0] * 4).num_active_parameters("text")
    many = make_config(**wide).num_active_parameters("text")
    assert many - few == (4 * 3 - text.num_experts) * 3 * text.hidden_size * text.moe_intermediate_size


@torch.no_grad()
def test_placed_once(tmp_path):
    """A pool is a module outside of the layers, so a device map can put it on the disk without the layers."""
    model, inputs = make_model(**POOLS), make_inputs()
    model.save_pretrained(tmp_path)
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    places |= {f"model.language_model.{name}": "cpu" for name in ("embed_tokens", "layers", "norm", "rotary_emb")}
    places |= {"model.language_model.expert_pools.0": "disk", "model.language_model.expert_pools.1": "cpu"}
    loaded = SparseMoeVlmForConditionalGeneration.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.language_model.expert_pools["0"].gate_up_proj.is_meta
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_lora_on_a_pool_acts_in_all_its_layers():
    model, inputs = make_model(**POOLS), make_inputs()
    with torch.no_grad():
        before = model(**inputs, output_hidden_states=True).hidden_states
    targets = [f"model.language_model.expert_pools.0.{name}" for name in ("gate_up_proj", "down_proj")]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=targets)).eval()
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("expert_pools.0" in name for name in trainable)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        after = adapted(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1]), "layer 0"
    # Only layer 2: for the same input, the adapter changes its output.
    layer = adapted.base_model.model.model.language_model.layers[2]
    pools = adapted.base_model.model.model.language_model.expert_pools
    hidden = torch.randn(1, 5, 32)
    with torch.no_grad():
        changed = layer.mlp(hidden, None, pools["0"])
        with adapted.disable_adapter():
            original = layer.mlp(hidden, None, pools["0"])
    assert not torch.allclose(changed, original)


def test_parallel_plans_name_the_pools():
    config = make_config(**POOLS).text_config
    plan = plan_by_group(config.base_model_ep_plan, config)
    assert plan["expert_pools.*.gate_up_proj"] == "grouped_gemm"
    assert not [name for name in plan_by_group(config.base_model_ep_plan, make_config().text_config) if "pools" in name]
    several = make_config(**KINDS["many groups"]).text_config
    assert "expert_pools.*.joint.gate_up_proj" in plan_by_group(several.base_model_ep_plan, several)


@torch.no_grad()
def test_compiled_and_checkpointed():
    model, inputs = make_model(**POOLS), make_inputs()
    expected = model(**inputs, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_nothing():
    inputs, gradients = make_inputs(), []
    for checkpointing in (False, True):
        model = make_model(**POOLS).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in model.model.language_model.expert_pools.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_pool": [0, 0]}, r"`expert_pool` must be a list with a pool or None for each of the 4 layers"),
        ({"expert_pool": 2}, r"`expert_pool` must be a list"),
        ({"expert_pool": [0, -1, 0, 0]}, r"`expert_pool\[1\]` must be an integer of at least 0"),
        ({"expert_pool": [0, "a", 0, 0]}, r"`expert_pool\[1\]` must be an integer"),
        ({"expert_pool": [0, 0, 0, 0], "mlp_only_layers": [2]}, r"`expert_pool\[2\]` is 0, but layer 2 is dense"),
        (
            {
                "expert_pool": [0, 0, 1, 1],
                "expert_groups": [
                    {"name": "a", "num_experts": 2, "layers": [0]},
                    {"name": "b", "num_experts": 2, "layers": [1, 2, 3]},
                ],
            },
            r"layers \[0, 1\] share pool 0, but `expert_groups` give them different routed groups",
        ),
    ],
)
def test_wrong_pools(fields, message):
    with pytest.raises(ValueError, match=message):
        SparseMoeVlmTextConfig(num_hidden_layers=4, num_experts_per_tok=1, **fields)
