"""The dense blocks of models of Transformers, and the reasons why some have none."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mxfp4Config,
    initialization,
)

from modeling_sparse_moe_vlm.toolbox.upcycling.blocks import block_weights, find_blocks
from modeling_sparse_moe_vlm.toolbox.upcycling.errors import UpcyclingError
from tests.support.in_tree_models import TEXT, make_gemma4, make_mllama, make_model
from tests.support.models import make_model as make_own_model


def on_meta(model_type, auto_class=AutoModelForCausalLM, **settings):
    config = AutoConfig.for_model(model_type, **settings)
    with torch.device("meta"), initialization.no_init_weights():
        return auto_class.from_config(config)


def llama(**settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TEXT | settings))


def refusal(model, **options) -> str:
    with pytest.raises(UpcyclingError) as error:
        find_blocks(model, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "decoder", "act"),
    [
        ("llava", "model.language_model", "silu"),
        ("qwen3_vl", "model.language_model", "silu"),
        ("gemma3", "model.language_model", "gelu_pytorch_tanh"),
        ("paligemma2", "model.language_model", "gelu_pytorch_tanh"),
        ("idefics3", "model.text_model", "silu"),
        ("smolvlm", "model.text_model", "silu"),
    ],
)
def test_blocks_of_vision_language_models(name, decoder, act):
    found = find_blocks(make_model(name))
    assert (found.decoder, found.num_layers, found.hidden_size, found.hidden_act) == (decoder, 2, 32, act)
    assert [(block.name, block.layer) for block in found.blocks] == [(f"{decoder}.layers.{i}.mlp", i) for i in (0, 1)]
    assert [block.intermediate_size for block in found.blocks] == [48, 48]
    assert found.blocks[0].parameters == {
        "gate": ("gate_proj.weight", None),
        "up": ("up_proj.weight", None),
        "down": ("down_proj.weight", None),
    }


@pytest.mark.parametrize(("head", "decoder"), [(True, "model"), (False, "")])
def test_models_with_and_without_a_language_head(head, decoder):
    found = find_blocks(llama() if head else llama().model)
    assert found.decoder == decoder
    assert [block.name for block in found.blocks] == [f"{decoder}.layers.{i}.mlp".lstrip(".") for i in (0, 1)]


def test_fused_projections():
    model = on_meta("glm4", **TEXT)
    (block, _) = find_blocks(model).blocks
    assert block.parameters == {
        "gate": ("gate_up_proj.weight", slice(0, 48)),
        "up": ("gate_up_proj.weight", slice(48, 96)),
        "down": ("down_proj.weight", None),
    }


def test_other_names():
    settings = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    found = find_blocks(on_meta("lfm2", **TEXT | settings))
    assert [block.name for block in found.blocks] == ["model.layers.0.feed_forward", "model.layers.1.feed_forward"]
    assert found.blocks[0].parameters == {
        "gate": ("w1.weight", None),
        "up": ("w3.weight", None),
        "down": ("w2.weight", None),
    }


def test_widths_that_differ_by_layer():
    model = make_gemma4()
    for layer, width in zip(model.model.language_model.layers, (48, 48, 96, 24)):
        for name, shape in (("gate_proj", (32, width)), ("up_proj", (32, width)), ("down_proj", (width, 32))):
            setattr(layer.mlp, name, nn.Linear(*shape, bias=False))
    assert [block.intermediate_size for block in find_blocks(model).blocks] == [48, 48, 96, 24]


def test_cross_attention_layers_have_blocks_too():
    assert [block.layer for block in find_blocks(make_mllama()).blocks] == [0, 1]


def test_encoder_decoder_models_have_the_blocks_of_the_decoder():
    text = TEXT | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    model = on_meta("t5gemma", AutoModelForSeq2SeqLM, encoder=text, decoder=text)
    assert [block.name for block in find_blocks(model).blocks] == [f"model.decoder.layers.{i}.mlp" for i in (0, 1)]


@pytest.mark.parametrize("fused", [False, True])
def test_weights_of_a_block(fused):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4", **TEXT)) if fused else llama()
    block = find_blocks(model).blocks[1]
    module = model.get_submodule(block.name)
    weights = block_weights(module, block)
    x = torch.randn(3, 32)
    expected = (nn.functional.silu(x @ weights.gate.T) * (x @ weights.up.T)) @ weights.down.T
    assert torch.equal(module(x), expected)
    assert not weights.gate.requires_grad
    owner = module.gate_up_proj if fused else module.up_proj
    assert weights.up.untyped_storage().data_ptr() == owner.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_not_changed(dtype):
    model = make_model("llava").to(dtype)
    before = copy.deepcopy(model.state_dict())
    find_blocks(model)
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_models_without_weights_have_the_same_blocks():
    settings = TEXT | {"hidden_act": "gelu"}
    assert find_blocks(on_meta("llama", **settings)) == find_blocks(llama(hidden_act="gelu"))


def test_chosen_layers():
    model = llama(num_hidden_layers=4)
    assert [block.layer for block in find_blocks(model, layers=[3, 1, 1]).blocks] == [1, 3]
    assert find_blocks(model, layers=[3, 1]).num_layers == 4
    assert refusal(model, layers=[1, 4]) == "`layers` must be decoder layers, 0 to 3, got [4]."
    assert refusal(model, layers=[-1]) == "`layers` must be decoder layers, 0 to 3, got [-1]."
    assert refusal(model, layers=[]) == "`layers` must name at least one decoder layer."


def test_mixtures_of_experts():
    assert refusal(make_model("qwen3_vl_moe")) == (
        "Qwen3VLMoeForConditionalGeneration is already a mixture of experts, in layers 0-1."
    )
    assert "SparseMoeVlmForConditionalGeneration is already a mixture of experts" in refusal(make_own_model())


def test_dense_layers_of_mixtures_of_experts_are_found_on_request():
    model = on_meta("qwen2_moe", **TEXT | {"num_hidden_layers": 6, "mlp_only_layers": [0, 2], "num_experts": 4})
    assert refusal(model) == (
        "Qwen2MoeForCausalLM is already a mixture of experts, in layers 1, 3-5. `include_dense_layers_of_moe=True` "
        "takes its dense ones, layers 0, 2."
    )
    found = find_blocks(model, include_dense_layers_of_moe=True)
    assert [block.layer for block in found.blocks] == [0, 2]
    assert found.num_layers == 6
    assert [block.layer for block in find_blocks(model, layers=[2]).blocks] == [2]
    assert refusal(model, layers=[2, 3]) == "`layers`: Qwen2MoeForCausalLM is already a mixture of experts in layer 3."


def test_layers_without_a_feed_forward_block_are_left_out():
    model = llama(num_hidden_layers=3)
    model.model.layers[1].mlp = nn.Identity()
    assert [block.layer for block in find_blocks(model).blocks] == [0, 2]


def test_layers_with_another_feed_forward_block_are_refused():
    model = llama(num_hidden_layers=4)
    for index in (1, 2):
        model.model.layers[index].mlp.up_proj = nn.Linear(32, 48, bias=True)
    assert refusal(model) == (
        "LlamaForCausalLM has feed-forward blocks that experts cannot replace, in layers 1-2. Layer 1, `mlp`: linear "
        "layers with biases (up_proj). `layers=[0, 3]` leaves those dense."
    )
    assert [block.layer for block in find_blocks(model, layers=[0, 3]).blocks] == [0, 3]
    assert refusal(model, layers=[0, 1]).endswith("`mlp`: linear layers with biases (up_proj).")


def test_every_instance_is_run():
    model = llama()
    clamped = model.model.layers[1].mlp
    forward = clamped.forward
    clamped.forward = lambda x: forward(x).clamp(-100, 100)
    assert "in layer 1. Layer 1, `mlp`: it computes something other than" in refusal(model)


def test_two_blocks_in_one_layer():
    model = llama()
    model.model.layers[1].second_mlp = copy.deepcopy(model.model.layers[1].mlp)
    assert "Layer 1, it has 2 gated blocks (mlp, second_mlp)." in refusal(model)


def test_the_innermost_block_is_found():
    model = llama()
    model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp)
    assert [block.name for block in find_blocks(model).blocks] == ["model.layers.0.mlp", "model.layers.1.mlp.0"]


def test_activations_that_differ():
    model = llama()
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    assert refusal(model) == (
        "The feed-forward blocks of LlamaForCausalLM differ in `hidden_act`: relu, silu. Name layers of one kind with "
        "`layers`."
    )
    assert find_blocks(model, layers=[1]).hidden_act == "relu"


def test_shared_weights():
    model = llama()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    assert refusal(model) == "LlamaForCausalLM shares weights between `model.layers.0.mlp` and `model.layers.1.mlp`."
    zamba = {"layers_block_type": ["hybrid", "mamba", "hybrid"], "num_hidden_layers": 3, "attention_hidden_size": 64}
    model = on_meta("zamba", **TEXT | zamba | {"attention_head_dim": 16, "n_mamba_heads": 2, "mamba_dt_rank": 4})
    assert "shares weights between `model.layers.0.shared_transf.feed_forward` and" in refusal(model)


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        (
            "gpt2",
            {},
            "GPT2LMHeadModel is not gated: no module of its decoder layers computes down(act(gate(x)) * up(x)).",
        ),
        ("opt", {}, "OPTForCausalLM is not gated"),
        ("mamba", {}, "MambaForCausalLM is not gated"),
        ("phi", {}, "Layer 0, `mlp`: not gated."),
        ("starcoder2", {}, "Layer 0, `mlp`: not gated."),
        ("bitnet", {}, "Layer 0, `mlp`: parameters or buffers besides those of its projections (ffn_sub_norm.weight)."),
        ("falcon_h1", {"mlp_multipliers": [0.5, 2.0]}, "Layer 0, `feed_forward`: it computes something other than"),
        ("seed_oss", {"residual_dropout": 0.1}, "Layer 0, `mlp`: its outputs differ in training mode"),
        ("llama", {"mlp_bias": True}, "Layer 0, `mlp`: linear layers with biases (gate_proj, up_proj, down_proj)."),
        ("moshi", {}, "`MoshiGatingMLP.forward` takes further arguments besides hidden states."),
        ("hrm_text", {}, "several lists of layers (model.L_module.layers, model.H_module.layers)."),
        ("mixtral", {}, "MixtralForCausalLM is already a mixture of experts, in layers 0-1."),
    ],
)
def test_reasons(model_type, settings, reason):
    assert reason in refusal(on_meta(model_type, **TEXT | settings))


def test_activation_sparsity_is_not_a_gate():
    sizes = {"intermediate_size": [48] * 4, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    further = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99, "num_kv_shared_layers": 0}
    pattern = {"activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0], "laurel_rank": 4}
    model = on_meta("gemma3n_text", **TEXT | sizes | further | pattern)
    assert refusal(model) == (
        "Gemma3nForCausalLM has feed-forward blocks that experts cannot replace, in layers 0-1. Layer 0, `mlp`: it "
        "computes something other than down(act(gate(x)) * up(x)) with an activation of `ACT2FN`. `layers=[2, 3]` "
        "leaves those dense."
    )
    assert [block.layer for block in find_blocks(model, layers=[2, 3]).blocks] == [2, 3]


def test_models_with_adapters():
    model = llama()
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    assert refusal(adapted) == (
        "`model` must be a model of Transformers, got PeftModel. Merge its adapters first: `model.merge_and_unload()`."
    )
    assert refusal(adapted.get_base_model()) == (
        "LlamaForCausalLM has adapters: merge them into its weights first, or load it without them."
    )
    assert find_blocks(adapted.merge_and_unload()) == find_blocks(model)
    assert refusal(nn.Linear(2, 2)) == "`model` must be a model of Transformers, got Linear."


def test_quantised_models():
    model = llama()
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    assert refusal(model) == "LlamaForCausalLM is quantised: load it unquantised, and quantise the result."
    del model.config.quantization_config
    model.hf_quantizer = object()
    assert "is quantised" in refusal(model)


def test_unpacked_weights_are_not_quantised():
    model = llama()
    expected = find_blocks(model)
    model.config.quantization_config = Mxfp4Config(dequantize=True)
    assert find_blocks(model) == expected
    del model.config.quantization_config
    gguf = SimpleNamespace(quant_method="gguf", dequantize=False)
    model.hf_quantizer = SimpleNamespace(quantization_config=gguf)
    assert find_blocks(model) == expected
    head = model.lm_head
    model.lm_head = type("GgufLinear", (nn.Linear,), {})(32, 99)
    assert "is quantised" in refusal(model)
    model.lm_head = head
    head.weight = nn.Parameter(head.weight.to(torch.int8), requires_grad=False)
    assert "is quantised" in refusal(model)
