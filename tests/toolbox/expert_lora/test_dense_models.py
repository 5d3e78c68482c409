"""Adapters on the language model of models without experts."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_sparse_moe_vlm.toolbox.expert_lora import decoder_lora_config
from modeling_sparse_moe_vlm.toolbox.expert_lora.dense_models import lora_config_of
from modeling_sparse_moe_vlm.toolbox.training import model_parts
from tests.support import upcycled
from tests.support.in_tree_models import MODELS
from tests.support.models import make_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
LAYERS = {
    "llava": "model.language_model.layers",
    "qwen3_vl": "model.language_model.layers",
    "gemma3": "model.language_model.layers",
    "idefics3": "model.text_model.layers",
    "llama": "model.layers",
}

pytestmark = pytest.mark.newest


def make_dense(name: str):
    return upcycled.make_dense("llama") if name == "llama" else MODELS[name]()


def targets(prefix: str, attention=True, feed_forward=True, layers=(0, 1)) -> set[str]:
    names = [f"self_attn.{name}" for name in ATTENTION] if attention else []
    names += [f"mlp.{name}" for name in FEED_FORWARD] if feed_forward else []
    return {f"{prefix}.{layer}.{name}" for layer in layers for name in names}


@pytest.mark.parametrize("name", LAYERS)
def test_only_the_layers_of_the_language_model_get_adapters(name):
    model, prefix = make_dense(name), LAYERS[name]
    config = decoder_lora_config(model, r=3, lora_alpha=5, lora_dropout=0.5)
    assert config.target_modules == targets(prefix)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5, 0.5)
    assert decoder_lora_config(model).r == 8
    assert decoder_lora_config(model, attention=False).target_modules == targets(prefix, attention=False)
    assert decoder_lora_config(model, feed_forward=False).target_modules == targets(prefix, feed_forward=False)
    assert decoder_lora_config(model, layers=[1]).target_modules == targets(prefix, layers=[1])
    adapted = get_peft_model(model, config)
    trained = {
        name.removeprefix("base_model.model.").partition(".lora_")[0]
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    assert trained == targets(prefix)
    assert decoder_lora_config(adapted).target_modules == targets(prefix)


CONNECTORS = {
    "llava": ["model.multi_modal_projector"],
    "qwen3_vl": ["model.visual.merger", "model.visual.deepstack_merger_list.0", "model.visual.deepstack_merger_list.1"],
    "idefics3": ["model.connector"],
}


@pytest.mark.parametrize("name", CONNECTORS)
def test_the_connector_trains_in_full(name):
    """Lists of modules are replaced by what they contain, because PEFT cannot wrap them."""
    model = make_dense(name)
    assert decoder_lora_config(model).modules_to_save is None
    config = decoder_lora_config(model, connector=True)
    assert config.modules_to_save == CONNECTORS[name]
    adapted = get_peft_model(model, config)
    full = {key for key, own in adapted.named_parameters() if own.requires_grad and "lora_" not in key}
    assert {key.partition(".modules_to_save.default.")[0] for key in full} == {
        f"base_model.model.{module}" for module in CONNECTORS[name]
    }
    parts = model_parts(adapted)
    assert full == {key for key, own in parts["connector"].items() if own.requires_grad}
    assert decoder_lora_config(adapted, connector=True).modules_to_save == CONNECTORS[name]


def test_without_a_connector_none_can_train():
    with pytest.raises(ValueError, match="`connector=True`: LlamaForCausalLM has no connector"):
        decoder_lora_config(make_dense("llama"), connector=True)
    model = make_dense("llava")
    model.model.image_newline = nn.Parameter(torch.zeros(4))
    with pytest.raises(
        ValueError, match=r"`connector=True`: \['model.image_newline'\] of the connector cannot train in full"
    ):
        decoder_lora_config(model, connector=True)


def test_layers_of_gpt_2():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    names = {f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert decoder_lora_config(model, fan_in_fan_out=True).target_modules == names


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"layers": [0, 2]}, r"`layers` names \[2\], but the model has layers 0 to 1"),
        ({"layers": [-1]}, r"`layers` names \[-1\]"),
        ({"layers": []}, "`layers` is empty"),
        ({"attention": False, "feed_forward": False}, "nothing gets an adapter: set `attention` or `feed_forward`"),
    ],
)
def test_mistakes_are_named(selection, message):
    with pytest.raises(ValueError, match=message):
        decoder_lora_config(make_dense("llava"), **selection)


def test_models_with_experts_are_refused():
    for model in (make_model(), MODELS["qwen3_vl_moe"](), upcycled.make_few_experts()):
        with pytest.raises(ValueError, match=f"{type(model).__name__} has experts: use `expert_lora_config`"):
            decoder_lora_config(model)


def test_recipes_for_models_with_and_without_experts():
    model, prefix = make_dense("llava"), LAYERS["llava"]
    for lora, expected in (
        ({}, targets(prefix, attention=False)),
        ({"attention": True}, targets(prefix)),
        ({"attention": True, "experts": [], "routers": False}, targets(prefix, feed_forward=False)),
        ({"layers": [0], "r": 2}, targets(prefix, attention=False, layers=[0])),
    ):
        config = lora_config_of(model, lora)
        assert config.target_modules == expected
        assert config.r == lora.get("r", 8)
    for name, value in (
        ("experts", [0]),
        ("groups", ["image"]),
        ("modalities", ["image"]),
        ("projections", ["down"]),
        ("expert_ranks", [1]),
        ("routers", True),
    ):
        with pytest.raises(ValueError, match=f"`lora.{name}` chooses experts, but LlavaForConditionalGeneration has"):
            lora_config_of(model, {name: value})
    sparse = make_model()
    torch.manual_seed(0)
    assert lora_config_of(sparse, {"r": 2}).target_parameters
