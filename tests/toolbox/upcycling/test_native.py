"""Upcycled models as classes of Transformers: same outputs, plain checkpoints, and models that no class represents."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlavaProcessor,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from modeling_sparse_moe_vlm.toolbox.upcycling import UpcyclingError, native, to_native, upcycle
from modeling_sparse_moe_vlm.toolbox.upcycling.native_twins import COMPOSITE_TWINS, TWINS
from tests.support import in_tree_models
from tests.support.models import TINY_DECODER, TINY_TOWER
from tests.support.processors import make_image, make_image_processor, make_tokenizer
from tests.toolbox.upcycling.native_models import (
    BASES,
    BIAS,
    SHARED,
    SIGMOID,
    make_dense,
    make_input_ids,
    make_qwen3_5_with_images,
    make_upcycled,
    randomize,
)

FIRST_DENSE, LAST_DENSE = {"mlp_only_layers": [0]}, {"mlp_only_layers": [1]}
PLAIN = {"norm_topk_prob": False}
WITH_SHARED = {"expert_groups": SHARED}
NARROW_SHARED = {"expert_groups": [SHARED[0], SHARED[1] | {"intermediate_size": 16}]}
# Base, fields of the experts configuration, class of the twin.
PAIRS = [
    ("cohere2", {}, "Cohere2MoeForCausalLM"),
    ("cohere2", WITH_SHARED, "Cohere2MoeForCausalLM"),
    ("cohere2", SIGMOID, "Cohere2MoeForCausalLM"),
    ("cohere2", SIGMOID | PLAIN | LAST_DENSE, "Cohere2MoeForCausalLM"),
    ("ernie4_5", {}, "Ernie4_5_MoeForCausalLM"),
    ("ernie4_5", WITH_SHARED | FIRST_DENSE, "Ernie4_5_MoeForCausalLM"),
    ("ernie4_5", BIAS | LAST_DENSE, "Ernie4_5_MoeForCausalLM"),
    ("exaone", {}, "MixtralForCausalLM"),
    ("granite", {}, "GraniteMoeForCausalLM"),
    ("granite", WITH_SHARED, "GraniteMoeSharedForCausalLM"),
    ("granite_swa", {}, "GraniteMoeSWAForCausalLM"),
    ("granite_swa", WITH_SHARED, "GraniteMoeSWAForCausalLM"),
    ("granitemoehybrid", {}, "GraniteMoeHybridForCausalLM"),
    ("granitemoehybrid", WITH_SHARED, "GraniteMoeHybridForCausalLM"),
    ("helium", WITH_SHARED, "Ernie4_5_MoeForCausalLM"),
    ("hunyuan", {}, "HunYuanMoEV1ForCausalLM"),
    ("hunyuan", NARROW_SHARED, "HunYuanMoEV1ForCausalLM"),
    ("hunyuan", {"expert_groups": [SHARED[0], SHARED[1] | {"intermediate_size": 24}]}, "HunYuanMoEV1ForCausalLM"),
    ("internlm3", {}, "MixtralForCausalLM"),
    ("iquestcoder", {}, "MixtralForCausalLM"),
    ("lfm2", SIGMOID, "Lfm2MoeForCausalLM"),
    ("lfm2", SIGMOID | BIAS | PLAIN | FIRST_DENSE, "Lfm2MoeForCausalLM"),
    ("llama", {}, "MixtralForCausalLM"),
    ("llama", {"num_experts_per_tok": 3}, "MixtralForCausalLM"),
    ("llama", WITH_SHARED, "GraniteMoeSharedForCausalLM"),
    ("llama", SIGMOID, "Glm4MoeForCausalLM"),
    ("llama", SIGMOID | WITH_SHARED | BIAS | FIRST_DENSE, "Glm4MoeForCausalLM"),
    ("llama_with_biases", {}, "GraniteMoeSharedForCausalLM"),
    ("ministral", {}, "MixtralForCausalLM"),
    ("mistral", {}, "MixtralForCausalLM"),
    ("mistral_without_window", WITH_SHARED, "GraniteMoeSharedForCausalLM"),
    ("olmo2", {}, "FlexOlmoForCausalLM"),
    ("olmo2", PLAIN, "FlexOlmoForCausalLM"),
    ("phi3", {}, "MixtralForCausalLM"),
    ("phi3_without_window", WITH_SHARED, "GraniteMoeSharedForCausalLM"),
    ("qwen2", {}, "Qwen2MoeForCausalLM"),
    ("qwen2", WITH_SHARED | PLAIN | FIRST_DENSE, "Qwen2MoeForCausalLM"),
    ("qwen2", SIGMOID | WITH_SHARED, "Glm4MoeForCausalLM"),
    ("qwen2_with_windows", {}, "Qwen2MoeForCausalLM"),
    ("qwen3", {}, "Qwen3MoeForCausalLM"),
    ("qwen3", PLAIN | LAST_DENSE, "Qwen3MoeForCausalLM"),
    ("qwen3", SIGMOID | WITH_SHARED | BIAS, "Glm4MoeForCausalLM"),
    ("qwen3", SIGMOID | PLAIN | FIRST_DENSE, "Glm4MoeForCausalLM"),
    ("qwen3_with_window", {}, "Qwen3MoeForCausalLM"),
    ("qwen3_5", {}, "Qwen3_5MoeForCausalLM"),
    ("qwen3_5", WITH_SHARED, "Qwen3_5MoeForCausalLM"),
    ("seed_oss", {}, "Qwen2MoeForCausalLM"),
    ("seed_oss", SIGMOID | WITH_SHARED, "Glm4MoeForCausalLM"),
    ("seed_oss_without_biases", {}, "Qwen2MoeForCausalLM"),
    ("youtu", SIGMOID, "DeepseekV3ForCausalLM"),
    ("youtu", SIGMOID | WITH_SHARED | BIAS | FIRST_DENSE, "DeepseekV3ForCausalLM"),
]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def make(base: str, **fields):
    if BASES[base][0] not in CONFIG_MAPPING:
        pytest.skip(f"this release has no {base}")
    return make_upcycled(make_dense(base), **fields)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("base", "fields", "twin_class"), PAIRS)
@torch.no_grad()
def test_twin_has_the_same_outputs_and_a_plain_checkpoint(base, fields, twin_class, tmp_path):
    model = make(base, **fields)
    input_ids = make_input_ids()
    expected, tokens = model(input_ids).logits, model.generate(input_ids, **GREEDY)

    twin = to_native(model)
    assert type(twin).__name__ == twin_class
    assert type(twin).__module__.startswith("transformers.models.")
    assert_close(twin(input_ids).logits, expected)
    assert torch.equal(twin.generate(input_ids, **GREEDY), tokens)

    twin.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == [twin_class]
    assert not {"experts_config", "auto_map", "blocks"} & set(saved)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(twin)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_close(loaded(input_ids).logits, expected)


def test_every_base_is_tested():
    tested = {BASES[base][0] for base, _, _ in PAIRS}
    assert tested | {"qwen3_vl_text"} == set(TWINS)


@pytest.mark.parametrize(
    ("name", "fields", "twin_class", "decoder"),
    [
        ("llava", {}, "LlavaForConditionalGeneration", "mixtral"),
        ("llava", WITH_SHARED, "LlavaForConditionalGeneration", "granitemoeshared"),
        ("idefics3", {}, "Idefics3ForConditionalGeneration", "mixtral"),
        ("smolvlm", {}, "SmolVLMForConditionalGeneration", "mixtral"),
        ("qwen3_vl", FIRST_DENSE, "Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe_text"),
        ("qwen3_5", WITH_SHARED, "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text"),
    ],
)
@torch.no_grad()
def test_twin_of_a_model_with_images(name, fields, twin_class, decoder, tmp_path):
    dense = make_qwen3_5_with_images() if name == "qwen3_5" else in_tree_models.make_model(name)
    model = make_upcycled(dense, **fields)
    inputs = in_tree_models.make_inputs(name)
    expected, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)

    twin = to_native(model)
    assert type(twin).__name__ == twin_class
    assert twin.config.text_config.model_type == decoder
    assert_close(twin(**inputs).logits, expected)

    twin.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not {"experts_config", "auto_map"} & {*saved, *saved["text_config"]}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is type(twin)
    assert_close(loaded(**inputs).logits, expected)
    assert torch.equal(loaded.generate(**inputs, **GREEDY), tokens)


SPARSE_FIELDS = [
    ("llama", {}, {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, "head_dim": 12}),
    (
        "qwen3",
        LAST_DENSE | PLAIN,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "intermediate_size": 48,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 1,
            "norm_topk_prob": False,
            "head_dim": 12,
            "tie_word_embeddings": True,
        },
    ),
    (
        "qwen2",
        WITH_SHARED,
        {
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
        },
    ),
    ("qwen2", {}, {"shared_expert_intermediate_size": 128}),
    (
        "llama",
        WITH_SHARED,
        {
            "intermediate_size": 24,
            "shared_intermediate_size": 40,
            "attention_multiplier": 12**-0.5,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
        },
    ),
    (
        "llama",
        SIGMOID | WITH_SHARED | FIRST_DENSE,
        {
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 0,
        },
    ),
    (
        "llama",
        SIGMOID | {"expert_groups": [SHARED[0], SHARED[1] | {"intermediate_size": 48}]},
        {"n_shared_experts": 2, "first_k_dense_replace": 0},
    ),
    ("llama", SIGMOID, {"n_shared_experts": 1, "first_k_dense_replace": 0, "use_qk_norm": False}),
    (
        "ernie4_5",
        FIRST_DENSE,
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
            "moe_layer_interval": 1,
        },
    ),
    (
        "cohere2",
        SIGMOID | LAST_DENSE,
        {
            "intermediate_size": 24,
            "prefix_dense_intermediate_size": 48,
            "mlp_layer_types": ["sparse", "dense"],
            "expert_selection_fn": "sigmoid",
            "num_shared_experts": 0,
            "rope_theta": 500.0,
            "head_dim": 8,
        },
    ),
    ("lfm2", SIGMOID | FIRST_DENSE, {"moe_intermediate_size": 24, "num_dense_layers": 1, "intermediate_size": 32}),
]


@pytest.mark.parametrize(("base", "fields", "expected"), SPARSE_FIELDS)
def test_configuration_of_the_twin(base, fields, expected):
    config = to_native(make(base, **fields)).config
    assert {name: getattr(config, name) for name in expected} == expected


def test_next_twin_of_a_decoder_inside_a_model():
    text_config = LlamaConfig(**in_tree_models.TEXT, attention_bias=True)  # Mixtral has no biases
    twin = to_native(make_upcycled(in_tree_models.make_llava(text_config)))
    assert twin.config.text_config.model_type == "granitemoeshared"


@pytest.mark.parametrize(("name", "decoder"), [("llava", ["MixtralForCausalLM"]), ("qwen3_vl", None)])
def test_name_of_the_decoder_inside_a_model(name, decoder, tmp_path):
    dense = in_tree_models.make_model(name)
    dense.config.text_config.architectures = ["LlamaForCausalLM"]
    to_native(make_upcycled(dense)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["text_config"].get("architectures") == decoder


# Names of experts in the checkpoints on the Hub, by twin.
ON_DISK = {
    "cohere2": "mlp.experts.0.gate_proj.weight",
    "ernie4_5": "mlp.experts.0.gate_proj.weight",
    "granite": "block_sparse_moe.input_linear.weight",
    "hunyuan": "mlp.experts.0.gate_proj.weight",
    "lfm2": "feed_forward.experts.0.w1.weight",
    "llama": "block_sparse_moe.experts.0.w1.weight",
    "olmo2": "mlp.experts.0.gate_proj.weight",
    "qwen2": "mlp.experts.0.gate_proj.weight",
    "qwen3": "mlp.experts.0.gate_proj.weight",
    "qwen3_5": "mlp.experts.0.gate_proj.weight",
    "youtu": "mlp.experts.0.gate_proj.weight",
}


@pytest.mark.parametrize("base", ON_DISK)
def test_experts_are_saved_as_on_the_hub(base, tmp_path):
    router = SIGMOID if base in ("lfm2", "youtu") else {}
    to_native(make(base, **router)).save_pretrained(tmp_path)
    assert f"model.layers.1.{ON_DISK[base]}" in load_file(tmp_path / "model.safetensors")


def test_shared_expert_of_qwen2_moe_is_doubled_behind_a_gate_of_one_half():
    model = make("qwen2", expert_groups=SHARED)
    block, shared = to_native(model).model.layers[1].mlp, model.model.layers[1].mlp.shared_experts["shared"]
    assert torch.equal(block.shared_expert_gate.weight, torch.zeros(1, 32))
    assert torch.equal(block.shared_expert.down_proj.weight, 2 * shared.down_proj.weight)
    assert torch.equal(block.shared_expert.gate_proj.weight, shared.gate_proj.weight)
    assert torch.equal(block.shared_expert.up_proj.weight, shared.up_proj.weight)


def test_always_on_groups_are_concatenated():
    groups = [SHARED[0], SHARED[1], {"name": "more", "num_experts": 2, "always_on": True, "intermediate_size": 4}]
    model = make("qwen2", expert_groups=groups)
    twin = to_native(model)
    first, second = model.model.layers[0].mlp.shared_experts.values()
    assert torch.equal(
        twin.model.layers[0].mlp.shared_expert.up_proj.weight, torch.cat([first.up_proj.weight, second.up_proj.weight])
    )
    assert twin.config.shared_expert_intermediate_size == 48
    input_ids = make_input_ids()
    with torch.no_grad():
        assert_close(twin(input_ids).logits, model(input_ids).logits)


def test_always_on_experts_are_widened_with_zeros():
    twin = to_native(make("llama", router="sigmoid", expert_groups=SHARED))
    shared = twin.model.layers[0].mlp.shared_experts
    assert shared.up_proj.weight.shape == (48, 32)
    assert shared.gate_proj.weight[:40].all()
    for weight in (shared.gate_proj.weight[40:], shared.up_proj.weight[40:], shared.down_proj.weight[:, 40:]):
        assert torch.equal(weight, torch.zeros_like(weight))


@pytest.mark.parametrize(("width", "wider"), [(24, 24), (16, 80), (32, 96)])
@torch.no_grad()
def test_stacks_of_qwen3_vl_moe_are_saved_as_on_the_hub(width, wider, tmp_path):
    # Transposed, which other libraries rely on. Transformers detects it by the shape, so no stack may be square.
    model = make_upcycled(in_tree_models.make_model("qwen3_vl"), moe_intermediate_size=width)
    twin = to_native(model)
    assert twin.config.text_config.moe_intermediate_size == wider
    twin.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    experts = "model.language_model.layers.1.mlp.experts"
    stacks = model.get_submodule(experts)
    gate, up = saved[f"{experts}.gate_up_proj"].split(wider, dim=2)
    assert torch.equal(torch.cat([gate[..., :width], up[..., :width]], dim=2), stacks.gate_up_proj.transpose(1, 2))
    assert torch.equal(saved[f"{experts}.down_proj"][:, :width], stacks.down_proj.transpose(1, 2))
    assert not gate[..., width:].any()
    assert not up[..., width:].any()
    assert not saved[f"{experts}.down_proj"][:, width:].any()
    inputs = in_tree_models.make_inputs("qwen3_vl")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_queries_keys_and_values_of_phi3_become_three_matrices():
    model = make("phi3")
    fused = model.model.layers[0].self_attn.qkv_proj.weight
    attention = to_native(model).model.layers[0].self_attn
    assert torch.equal(attention.q_proj.weight, fused[:32])
    assert torch.equal(attention.k_proj.weight, fused[32:48])
    assert torch.equal(attention.v_proj.weight, fused[48:])


@torch.no_grad()
def test_the_processor_of_the_base_is_copied(tmp_path):
    processor = LlavaProcessor(
        make_image_processor(),
        make_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    dense = in_tree_models.make_model("llava")
    dense.resize_token_embeddings(len(processor.tokenizer))
    dense.config.image_token_id = processor.image_token_id
    model = make_upcycled(dense)
    to_native(model).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LlavaProcessor
    inputs = loaded(images=make_image(), text="<image> the cat", return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 4
    twin = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert_close(twin(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(("base", "twin"), COMPOSITE_TWINS.items())
def test_types_that_are_their_own_decoder_have_one_processor(base, twin):
    assert PROCESSOR_MAPPING_NAMES[twin] == PROCESSOR_MAPPING_NAMES[base]


@torch.no_grad()
def test_head_with_another_shape_until_it_is_tied():
    vision_config = TINY_TOWER | {"vocab_size": 40, "hidden_stride": 1}
    config = Ovis2Config(text_config=TINY_DECODER, vision_config=vision_config, hidden_size=32)
    model = make_upcycled(Ovis2ForConditionalGeneration(config))
    twin = to_native(model)
    assert twin.lm_head.weight.shape == (99, 32)
    input_ids = make_input_ids()
    assert_close(twin(input_ids).logits, model(input_ids).logits)


@torch.no_grad()
def test_base_model_without_a_head():
    model = make("qwen3")
    twin = to_native(model.model)
    assert type(twin).__name__ == "Qwen3MoeModel"
    input_ids = make_input_ids()
    assert_close(twin(input_ids).last_hidden_state, model.model(input_ids).last_hidden_state)


@torch.no_grad()
def test_fields_that_a_twin_inherits(tmp_path):
    model = make("mistral").to(torch.bfloat16).train()
    model.set_attn_implementation("eager")
    model.generation_config.repetition_penalty = 1.5
    twin = to_native(model)
    assert twin.training
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.bfloat16}
    assert twin.config.dtype == torch.bfloat16
    assert twin.config._attn_implementation == "eager"
    assert twin.generation_config.repetition_penalty == 1.5
    assert twin.generation_config is not model.generation_config
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    # No second copy of the weights.
    experts = twin.model.layers[0].mlp.experts.gate_up_proj
    assert experts.data_ptr() == model.model.layers[0].mlp.experts.gate_up_proj.data_ptr()
    # Buffers that are not in checkpoints are computed again, because casting the model has rounded them.
    assert torch.equal(twin.model.rotary_emb.inv_freq, make("mistral").model.rotary_emb.inv_freq)
    assert not to_native(model.eval()).training
    twin.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "generation_config.json").read_text())["repetition_penalty"] == 1.5


@torch.no_grad()
def test_models_from_dense_ones_and_from_folders(tmp_path):
    # Always-on experts of all modalities. In a language model, these are those of text.
    dense = make_dense("qwen2").eval()
    input_ids = make_input_ids()
    fresh = to_native(upcycle(dense, num_experts=5))
    assert type(fresh).__name__ == "Qwen2MoeForCausalLM"
    assert fresh.config.shared_expert_intermediate_size == 48
    assert_close(fresh(input_ids).logits, dense(input_ids).logits)

    trained = randomize(upcycle(dense, num_experts=5))
    expected = trained(input_ids).logits
    assert (expected - dense(input_ids).logits).abs().max() > 1e-2
    trained.save_pretrained(tmp_path)
    # The code of the checkpoint, and experts in modules of 2, 2 and 1.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, num_expert_shards=3)
    assert type(loaded).__module__.startswith("transformers_modules.")
    assert loaded.model.layers[0].mlp.experts.sizes == (2, 2, 1)
    assert_close(to_native(loaded)(input_ids).logits, expected)


@torch.no_grad()
def test_parts_of_a_dense_block_are_chosen_together():
    dense = make_dense("qwen3").eval()
    input_ids = make_input_ids()
    twin = to_native(upcycle(dense, "joint", num_experts=6, num_experts_per_tok=3, granularity=3))
    assert (twin.config.num_experts_per_tok, twin.config.moe_intermediate_size) == (3, 16)
    assert_close(twin(input_ids).logits, dense(input_ids).logits)


@torch.no_grad()
def test_always_on_experts_of_every_modality_together():
    dense = in_tree_models.make_model("llava")
    inputs = in_tree_models.make_inputs("llava")
    groups = [{"name": "joint", "num_experts": 4}, {"name": "shared", "num_experts": 1, "always_on": True}]
    twin = to_native(upcycle(dense, groups))
    assert twin.config.text_config.model_type == "granitemoeshared"
    assert_close(twin(**inputs).logits, dense(**inputs).logits)
    with pytest.raises(UpcyclingError, match=r"`expert_groups\['text'\]` serves text only"):
        to_native(upcycle(dense))


@torch.no_grad()
def test_biases_that_a_twin_cannot_represent():
    model = make("qwen3", router_bias_update_rate=0.1)
    with pytest.raises(UpcyclingError, match="qwen3_moe: its routers have no bias, and `router_bias_update_rate`"):
        to_native(model)
    first, last = (layer.mlp.gate.e_score_correction_bias for layer in model.model.layers)
    first.zero_()
    last[:, 1:] = 0.0
    with pytest.raises(UpcyclingError, match="qwen3_moe: its routers have no bias"):
        to_native(model)
    last.zero_()
    input_ids = make_input_ids()
    assert_close(to_native(model)(input_ids).logits, model(input_ids).logits)


def test_biases_that_differ_between_modalities():
    model = make("ernie4_5", router_bias_update_rate=0.1)
    model.model.layers[1].mlp.gate.e_score_correction_bias[1, 2] += 0.25
    with pytest.raises(UpcyclingError, match="biases of `router_bias_update_rate` differ between modalities"):
        to_native(model)


TWO_ROUTED = [{"name": "one", "num_experts": 2}, {"name": "two", "num_experts": 2}]
BY_LAYER = [
    {"name": "early", "num_experts": 4, "layers": [0]},
    {"name": "late", "num_experts": 4, "layers": [1], "intermediate_size": 20},
]
REFUSED = {
    "isolated": ("llama", {"expert_groups": "isolated"}, r"`expert_groups\['text'\]` serves text only"),
    "hybrid": ("llama", {"expert_groups": "hybrid"}, r"`expert_groups\['text'\]` serves text only"),
    "two groups": ("llama", {"expert_groups": TWO_ROUTED}, "`expert_groups` has 2 routed groups in layer 0"),
    "widths": ("llama", {"expert_groups": BY_LAYER}, "`expert_groups` differs between layers"),
    "pools": ("llama", {"expert_pool": [0, 0]}, "`expert_pool` is set"),
    "top_p": ("llama", {"router": "top_p"}, '`router` is "top_p"'),
    "capacity": ("llama", {"expert_capacity_factor": 1.5}, "`expert_capacity_factor` is set"),
    "top_k": ("llama", {"num_experts_per_tok_by_modality": {"image": 1}}, "`num_experts_per_tok_by_modality` differs"),
    "plain": ("llama", PLAIN, "mixtral: its weights of the chosen experts always sum to 1.*`norm_topk_prob` is False"),
    "sigmoid": ("olmo2", SIGMOID, "flex_olmo: its router is softmax, the model's `router` is 'sigmoid'"),
    "softmax": ("youtu", {}, "deepseek_v3: its router is sigmoid, the model's `router` is 'softmax'"),
    "shared": ("qwen3", WITH_SHARED, "qwen3_moe: it has no always-on experts, and the model's `expert_groups`"),
    "wide": ("hunyuan", WITH_SHARED, r"as wide as a routed one \(24, `moe_intermediate_size`\).*together \(40\)"),
    "dense": ("llama", LAST_DENSE, r"mixtral: no layer can be dense in it, and the model's layers \[1\] are"),
    "last dense": ("youtu", SIGMOID | LAST_DENSE, r"only the first layers can be dense in it, and .* layers \[1\] are"),
    "window": ("mistral", WITH_SHARED, "granitemoeshared: its configuration has no `sliding_window`, which is 5"),
    "no window": (
        "qwen3_with_window",
        SIGMOID,
        "glm4_moe: its configuration has no `use_sliding_window`, which is True",
    ),
    "bias": ("llama_with_biases", SIGMOID, "glm4_moe: it has no place for `.*o_proj.bias` and 1 more"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_field(name):
    base, fields, message = REFUSED[name]
    with pytest.raises(UpcyclingError, match=message):
        to_native(make(base, **fields))


def test_equal_groups_of_layers():
    groups = [
        {"name": "early", "num_experts": 4, "layers": [0]},
        {"name": "late", "num_experts": 4, "layers": [1]},
    ]
    model = make("llama", expert_groups=groups)
    input_ids = make_input_ids()
    with torch.no_grad():
        assert_close(to_native(model)(input_ids).logits, model(input_ids).logits)


def test_layers_in_the_middle_can_be_dense_if_any_can():
    dense = make_dense("qwen3")
    config = dense.config
    config.num_hidden_layers, config.layer_types = 3, ["full_attention"] * 3
    model = make_upcycled(type(dense)(config), mlp_only_layers=[1])
    assert to_native(model).config.mlp_only_layers == [1]
    ernie = type(make_dense("ernie4_5").config)
    config = ernie.from_dict(make_dense("ernie4_5").config.to_dict() | {"num_hidden_layers": 3})
    model = make_upcycled(AutoModelForCausalLM.from_config(config), mlp_only_layers=[1])
    with pytest.raises(UpcyclingError, match=r"only the first and last layers can be dense in it.*\[1\] are"):
        to_native(model)


def test_base_without_a_twin():
    model = make_upcycled(in_tree_models.make_model("gemma3"))
    with pytest.raises(
        UpcyclingError,
        match=r"no sparse counterpart of 'gemma3_text' decoders\. These decoders have one: cohere2, ernie4_5",
    ):
        to_native(model)


def test_windows_of_some_layers_only():
    dense = make_dense("qwen3_with_window")
    config = dense.config
    config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(UpcyclingError, match="qwen3_moe: its configuration has no `layer_types`"):
        to_native(make_upcycled(type(dense)(config)))


@pytest.mark.parametrize(
    "rope",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    ],
)
def test_rotary_embeddings_of_phi3_that_a_twin_does_not_support(rope):
    config = make_dense("phi3").config
    config.rope_parameters |= rope
    with pytest.raises(
        UpcyclingError, match="mixtral: it has rotary embeddings of the usual kind, and `rope_parameters`"
    ):
        to_native(make_upcycled(AutoModelForCausalLM.from_config(config)))


def test_models_that_cannot_be_exported():
    with pytest.raises(UpcyclingError, match="Qwen3ForCausalLM is not an upcycled model"):
        to_native(make_dense("qwen3"))
    model = make("qwen3")
    model.model.layers[0].self_attn.q_proj.to("meta")
    with pytest.raises(UpcyclingError, match="Some weights are offloaded"):
        to_native(model)
    adapted = get_peft_model(make("qwen3"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UpcyclingError, match="The model has adapters: merge them first"):
        to_native(adapted)
    model = make("qwen3")
    model._hf_peft_config_loaded = True  # as after `add_adapter` of Transformers
    with pytest.raises(UpcyclingError, match="The model has adapters: merge them first"):
        to_native(model)
    model = make("qwen3")
    model.is_quantized = True
    with pytest.raises(UpcyclingError, match="The model is quantized"):
        to_native(model)
    model = make("qwen3")
    model.lm_head.weight.full_tensor = model.lm_head.weight.clone  # as a `DTensor` has it
    with pytest.raises(UpcyclingError, match="The weights are sharded over processes"):
        to_native(model)


class CustomModel(PreTrainedModel):
    config_class = PreTrainedConfig


def test_base_with_its_own_code():
    config = PreTrainedConfig()
    config.experts_config = make("qwen3").config.experts_config
    with pytest.raises(UpcyclingError, match="The base of CustomModel is not a class of Transformers"):
        to_native(CustomModel(config))


def test_buffers_are_on_the_device_of_the_model(monkeypatch):
    model = make("llama")
    assert to_native(model).model.rotary_emb.inv_freq.device.type == "cpu"
    monkeypatch.setattr(type(model), "device", torch.device("meta"))
    assert to_native(model).model.rotary_emb.inv_freq.device.type == "meta"


def test_attention_of_the_parts_of_a_model():
    model = make_upcycled(in_tree_models.make_model("llava"))
    model.set_attn_implementation({"text_config": "eager"})
    config = to_native(model).config
    assert config.text_config._attn_implementation == "eager"
    assert config.vision_config._attn_implementation == "sdpa"


def test_part_of_a_model():
    model = make_upcycled(in_tree_models.make_model("llava"))
    decoder = model.model.language_model
    with pytest.raises(UpcyclingError, match=r"UpcycledLlamaModel has no `language_model\.layers\.0\.mlp` and 1 more"):
        to_native(decoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors | {"more": torch.zeros(1)}, "it has no place for `more`"),
        (lambda tensors: dict(list(tensors.items())[1:]), r"the model lacks its `model.embed_tokens.weight`"),
        (
            lambda tensors: tensors | {"model.norm.weight": torch.zeros(1)},
            "of another shape in it are `model.norm.weight`",
        ),
    ],
)
def test_twin_with_other_tensors(change, message, monkeypatch):
    own = native._twin_state
    monkeypatch.setattr(native, "_twin_state", lambda *arguments: change(own(*arguments)))
    with pytest.raises(UpcyclingError, match=message):
        to_native(make("llama"))


def test_fields_that_the_twins_configuration_drops(monkeypatch):
    twin = TWINS["qwen3"][0]
    changed = replace(twin, fields=lambda layers, base: twin.fields(layers, base) | {"sliding_window": 5})
    monkeypatch.setitem(TWINS, "qwen3", (changed,))
    with pytest.raises(UpcyclingError, match="qwen3_moe: its configuration makes `sliding_window` None, which is 5"):
        to_native(make("qwen3"))


def test_release_without_the_twin(monkeypatch):
    model = make("qwen3")
    monkeypatch.setattr(native, "CONFIG_MAPPING", {})
    with pytest.raises(UpcyclingError, match=r"qwen3_moe: transformers [\d.]+ does not have it"):
        to_native(model)
