"""The configuration: defaults, saving and loading, vision towers, wrong values, supported releases."""

import copy
import json
import logging
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoConfig, SiglipVisionConfig, ViTConfig

from modeling_sparse_moe_vlm import (
    SparseMoeVlmConfig,
    SparseMoeVlmForCausalLM,
    SparseMoeVlmForConditionalGeneration,
    SparseMoeVlmTextConfig,
)
from tests.support.models import TEXT_CONFIG, VISION_CONFIG, make_config
from tests.support.oracles import ARRANGEMENTS, MANY_GROUPS

BY_LAYER = [
    {"name": "text", "num_experts": 2, "modalities": ["text"], "layers": [0]},
    {"name": "image", "num_experts": 2, "modalities": ("image",), "layers": (0,)},
    {"name": "joint", "num_experts": 6, "layers": [1]},
]
CONFIGURATIONS = ARRANGEMENTS | {
    "by layer": {"expert_groups": BY_LAYER, "num_experts": None},
    "dense layer": {"mlp_only_layers": [0]},
    "all dense": {"decoder_sparse_step": 3},
    "tied": {"tie_word_embeddings": True},
    "balancing": {
        "router_local_entropy_coef": {"text": 0.1},
        "router_global_entropy_coef": 0.2,
        "router_global_entropy_threshold": {"image": 1.5},
        "router_bias_update_rate": 1e-3,
        "expert_capacity_factor": 1.25,
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}},
}


# ---------------------------------------------------------------- defaults


def test_the_default_arrangement_is_hybrid():
    config = SparseMoeVlmConfig()
    text = config.text_config
    assert [(g["name"], g["num_experts"], g["modalities"], g["always_on"]) for g in text.expert_groups] == [
        ("joint", 8, ["text", "image"], False),
        ("text", 1, ["text"], True),
        ("image", 1, ["image"], True),
    ]
    assert text.num_experts == 8
    assert text.num_key_value_heads == text.num_attention_heads
    assert text.head_dim * text.num_attention_heads == text.hidden_size
    assert config.vision_config.model_type == "siglip_vision_model"
    assert config.image_seq_length == 49
    assert config.get_text_config() is text
    assert text.get_text_config() is text


def test_auto_classes_know_the_types():
    config = AutoConfig.for_model("sparse_moe_vlm", text_config={"num_experts": 4})
    assert type(config) is SparseMoeVlmConfig
    assert config.text_config.num_experts == 4
    assert type(AutoConfig.for_model("sparse_moe_vlm_text")) is SparseMoeVlmTextConfig


def test_objects_are_kept_and_dicts_are_not_changed():
    text, vision = SparseMoeVlmTextConfig(**TEXT_CONFIG), SiglipVisionConfig(image_size=32)
    config = SparseMoeVlmConfig(text_config=text, vision_config=vision)
    assert config.text_config is text
    assert config.vision_config is vision
    given = {"rope_parameters": {"rope_type": "default"}, "expert_groups": copy.deepcopy(BY_LAYER), "num_experts": None}
    before = copy.deepcopy(given)
    made = make_config(**given).text_config
    made.expert_groups[0]["modalities"].append("image")
    assert given == before


# ---------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_round_trip(name, tmp_path):
    config = make_config(**CONFIGURATIONS[name])
    text = config.text_config
    for original in (config, text):
        original.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        for loaded in (
            type(original).from_pretrained(tmp_path),
            AutoConfig.from_pretrained(tmp_path),
            type(original).from_dict(saved),
        ):
            assert type(loaded) is type(original)
            loaded.name_or_path = ""  # of the folder
            assert loaded.to_dict() == original.to_dict()
            assert loaded.to_diff_dict() == original.to_diff_dict()
        for same in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            assert same == original
        assert type(original).from_dict(json.loads(original.to_json_string(use_diff=False))).to_dict() == (
            original.to_dict()
        )
        assert original.to_diff_dict()["model_type"] == original.model_type
    assert SparseMoeVlmTextConfig.from_dict(saved).layer_expert_groups(1) == text.layer_expert_groups(1)


def test_text_config_is_read_from_the_whole_configuration(tmp_path):
    config = make_config(**ARRANGEMENTS["many"])
    config.save_pretrained(tmp_path)
    assert SparseMoeVlmTextConfig.from_pretrained(tmp_path).to_dict() == config.text_config.to_dict()


def test_saved_groups_are_plain_and_complete(tmp_path):
    make_config(expert_groups=BY_LAYER, num_experts=None).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["text_config"]["expert_groups"][1] == {
        "name": "image",
        "num_experts": 2,
        "modalities": ["image"],
        "intermediate_size": 24,
        "always_on": False,
        "layers": [0],
    }
    assert saved["auto_map"]["AutoModelForImageTextToText"].endswith("SparseMoeVlmForConditionalGeneration")


def test_both_flags_of_tying_agree(tmp_path):
    for kwargs in ({"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}):
        config = SparseMoeVlmConfig(**kwargs)
        assert config.tie_word_embeddings
        assert config.text_config.tie_word_embeddings


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 8),
        ({"num_experts": 6}, 6),
        ({"num_experts": 6, "expert_groups": "joint"}, 6),
        ({"num_experts": 6, "expert_groups": "isolated"}, 6),
        ({"expert_groups": MANY_GROUPS}, 9),
        ({"expert_groups": MANY_GROUPS, "num_experts": 9}, 9),
        ({"expert_groups": BY_LAYER, "num_hidden_layers": 2}, 6),
        ({"mlp_only_layers": [0, 1], "num_hidden_layers": 2, "num_experts": 6}, 0),
    ],
)
def test_number_of_routed_experts_of_a_layer(given, expected):
    config = SparseMoeVlmTextConfig(**given)
    assert config.num_experts == expected
    assert SparseMoeVlmTextConfig(**config.to_dict()).num_experts == expected


def test_groups_of_a_layer():
    config = make_config(expert_groups=BY_LAYER, num_experts=None, num_hidden_layers=3, mlp_only_layers=[2]).text_config
    names = [[group.name for group in config.layer_expert_groups(layer)] for layer in range(3)]
    assert names == [["text", "image"], ["joint"], []]
    many = make_config(**ARRANGEMENTS["many"]).text_config
    assert [group.name for group in many.layer_expert_groups(0, always_on=False)] == ["text", "joint", "image"]
    assert [group.name for group in many.layer_expert_groups(0, always_on=True)] == ["vision", "everyone"]
    assert many.routed_group_names == ["text", "joint", "image"]
    (text,) = [group for group in many.layer_expert_groups(0) if group.name == "text"]
    assert (text.modalities, text.intermediate_size, text.layers) == (("text",), 16, None)
    assert text.serves("text")
    assert not text.serves("image")


def test_which_layers_are_sparse():
    config = SparseMoeVlmTextConfig(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=(3,))
    assert [config.is_sparse_layer(layer) for layer in range(6)] == [False, True, False, False, False, True]
    assert config.mlp_only_layers == [3]


def test_experts_per_token_of_a_modality():
    config = SparseMoeVlmTextConfig(num_experts_per_tok=3, num_experts_per_tok_by_modality={"image": 2})
    assert config.experts_per_token("text") == 3
    assert config.experts_per_token("image") == 2


def test_implementation_of_experts_is_only_set_in_the_decoder():
    config = make_config()
    config._experts_implementation = "grouped_mm"
    assert config._experts_implementation == config.text_config._experts_implementation == "grouped_mm"
    assert config.vision_config._experts_implementation is None
    config._experts_implementation = {"text_config": "batched_mm"}
    assert config._experts_implementation == "grouped_mm"
    assert config.text_config._experts_implementation == "batched_mm"


def test_warning_about_a_router_that_cannot_learn(caplog):
    with caplog.at_level(logging.WARNING, logger="modeling_sparse_moe_vlm"):
        make_config(num_experts_per_tok=1, num_experts=31)
    assert "norm_topk_prob=False" in caplog.text


# ---------------------------------------------------------------- vision towers

TOWERS = {
    "siglip_vision_model": {"vision_use_head": False},
    "clip_vision_model": {},
    "dinov2": {},
    "dinov2_with_registers": {"num_register_tokens": 3},
    "dinov3_vit": {"num_register_tokens": 3},
    "vit": {},
}


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("model_type", TOWERS)
def test_any_vision_tower(model_type, factor):
    sizes = {key: VISION_CONFIG[key] for key in VISION_CONFIG if key not in ("model_type", "vision_use_head")}
    given = AutoConfig.for_model(model_type, **sizes, **TOWERS[model_type])
    as_dict = given.to_dict()
    for vision_config in (given, as_dict):
        config = SparseMoeVlmConfig(
            vision_config=vision_config, text_config=TEXT_CONFIG, image_token_id=3, pixel_shuffle_factor=factor
        )
        assert type(config.vision_config) is type(given)
    assert config.image_seq_length == (4 // factor) ** 2
    model = SparseMoeVlmForConditionalGeneration(config).eval()
    features = model.get_image_features(torch.randn(2, 3, 16, 16)).pooler_output
    assert [tuple(feature.shape) for feature in features] == [(config.image_seq_length, 32)] * 2
    input_ids = torch.tensor([[5, *[3] * config.image_seq_length, 7]])
    first, second = (
        model(input_ids=input_ids, pixel_values=torch.full((1, 3, 16, 16), value)).logits for value in (-1.0, 1.0)
    )
    torch.testing.assert_close(first[:, 0], second[:, 0])
    assert (first[:, -1] - second[:, -1]).abs().max() > 1e-2


# ---------------------------------------------------------------- wrong values


def group(**keys) -> dict:
    return {"expert_groups": [{"name": "joint", "num_experts": 4} | keys]}


WRONG = [
    ({"vocab_size": 0}, r"`vocab_size` must be an integer of at least 1, got 0"),
    ({"hidden_size": "64"}, r"`hidden_size` must be an integer .*got '64'"),
    ({"hidden_size": 64.0}, r"`hidden_size` must be an integer"),
    ({"num_hidden_layers": True}, r"`num_hidden_layers` must be an integer"),
    ({"intermediate_size": None}, r"`intermediate_size` must be an integer"),
    ({"max_position_embeddings": -1}, r"`max_position_embeddings`"),
    ({"num_attention_heads": 0}, r"`num_attention_heads`"),
    ({"num_key_value_heads": 3}, r"`num_attention_heads` \(16\) must be a multiple of `num_key_value_heads` \(3\)"),
    ({"num_key_value_heads": 0}, r"`num_key_value_heads`"),
    ({"hidden_size": 100}, r"`hidden_size` \(100\) must be a multiple .*or set `head_dim`"),
    ({"head_dim": 7}, r"`head_dim` must be even"),
    ({"hidden_act": "swiglu"}, r"`hidden_act` must be one of .*silu.*got 'swiglu'"),
    ({"initializer_range": -0.1}, r"`initializer_range` must be a number of at least 0"),
    ({"rms_norm_eps": "1e-6"}, r"`rms_norm_eps` must be a number"),
    ({"num_experts_per_token": 2}, r"no field `num_experts_per_token`: did you mean `num_experts_per_tok`"),
    ({"router_aux_loss_coeff": 0.1}, r"did you mean `router_aux_loss_coef`"),
    ({"router_z_loss_coef": float("inf")}, r"`router_z_loss_coef` must be a number"),
    ({"rms_norm_eps": float("nan")}, r"`rms_norm_eps` must be a number"),
    ({"attention_dropout": 1.5}, r"`attention_dropout` must be a number from 0 to 1"),
    ({"use_qk_norm": "false"}, r"`use_qk_norm` must be True or False, got 'false'"),
    ({"attention_out_bias": 1}, r"`attention_out_bias` must be True or False, got 1"),
    ({"nope_layers": 3}, r"`nope_layers` must be a list of int, got 3"),
    ({"nope_layers": [24]}, r"`nope_layers` names layers \[24\], but the model has layers 0 to 23"),
    ({"nope_layers": [3, 3]}, r"`nope_layers` repeats a value: \[3, 3\]"),
    ({"start": "copy"}, r"`start` must be a dict, got 'copy'"),
    ({"norm_topk_prob": None}, r"`norm_topk_prob` must be True or False"),
    ({"output_router_logits": 1}, r"`output_router_logits` must be True or False"),
    ({"pad_token_id": 32000}, r"`pad_token_id` must be an integer from 0 to 31999"),
    ({"pad_token_id": -1}, r"`pad_token_id`"),
    ({"rope_parameters": 10000.0}, r"`rope_parameters` must be a dict"),
    ({"rope_parameters": {"rope_theta": "big"}}, r"`rope_parameters\['rope_theta'\]` must be a number"),
    ({"rope_parameters": {"rope_theta": 0.0}}, r"`rope_parameters\['rope_theta'\]` must be more than 0"),
    ({"rope_parameters": {"rope_type": "spiral"}}, r"`rope_parameters\['rope_type'\]` must be one of default.*yarn"),
    ({"rope_parameters": {"rope_type": "yarn"}}, r"`rope_parameters` is incomplete.*factor"),
    ({"decoder_sparse_step": 0}, r"`decoder_sparse_step`"),
    ({"mlp_only_layers": [24]}, r"`mlp_only_layers` names layers \[24\], but the model has layers 0 to 23"),
    ({"mlp_only_layers": [-1]}, r"`mlp_only_layers`"),
    ({"mlp_only_layers": 3}, r"`mlp_only_layers` must be a list of int"),
    ({"modalities": []}, r"`modalities` must start with 'text'"),
    ({"modalities": "text"}, r"`modalities` must be a list of str"),
    ({"modalities": ["image", "text"]}, r"`modalities` must start with 'text'"),
    ({"modalities": ["text", "image", "audio"]}, r"must have their own places"),
    ({"modalities": ["text", "depth", "image"]}, r"must have their own places"),
    ({"modalities": ["text", "image", "video", "audio", "text"]}, r"`modalities` repeats a value"),
    ({"num_experts": 0}, r"`num_experts` must be an integer of at least 1"),
    ({"num_experts": "8"}, r"`num_experts` must be an integer"),
    ({"num_experts_per_tok": 9}, r"`num_experts_per_tok` is 9 .*layer 0 has 8 routed experts.*lower it"),
    ({"num_experts_per_tok": 0}, r"`num_experts_per_tok` must be an integer"),
    ({"num_experts_per_tok": 1.5}, r"`num_experts_per_tok` must be an integer"),
    ({"num_experts": 2, "num_experts_per_tok": 2, "expert_groups": "isolated"}, r"`num_experts_per_tok` is 2.*has 1"),
    ({"num_experts_per_tok_by_modality": {"image": 9}}, r"`num_experts_per_tok_by_modality`"),
    ({"num_experts_per_tok_by_modality": {"image": 0}}, r"`num_experts_per_tok_by_modality\['image'\]`"),
    ({"num_experts_per_tok_by_modality": {"video": 1}}, r"`num_experts_per_tok_by_modality` .*'text', 'image'"),
    ({"num_experts_per_tok_by_modality": [2, 1]}, r"`num_experts_per_tok_by_modality` must be a dict"),
    ({"moe_intermediate_size": 0}, r"`moe_intermediate_size`"),
    ({"router": "hash"}, r"`router` must be one of softmax, sigmoid, top_p, got 'hash'"),
    ({"router_top_p": 1.1}, r"`router_top_p` must be a number from 0 to 1"),
    ({"router_top_p": 0}, r"`router_top_p` must be more than 0"),
    ({"router_aux_loss_coef": -1}, r"`router_aux_loss_coef`"),
    ({"router_z_loss_coef": None}, r"`router_z_loss_coef`"),
    ({"router_local_entropy_coef": -1}, r"`router_local_entropy_coef` must be a number of at least 0"),
    ({"router_global_entropy_coef": None}, r"`router_global_entropy_coef`"),
    ({"router_global_entropy_coef": {"image": "1"}}, r"`router_global_entropy_coef\['image'\]` must be a number"),
    ({"router_global_entropy_threshold": {"smell": 1.0}}, r"threshold` names \['smell'\], but the `modalities` are"),
    ({"router_bias_update_rate": -1e-3}, r"`router_bias_update_rate` must be a number of at least 0"),
    ({"router_bias_update_rate": True}, r"`router_bias_update_rate` must be a number"),
    ({"expert_capacity_factor": 0.0}, r"`expert_capacity_factor` must be more than 0, or None for no limit"),
    ({"expert_capacity_factor": "1"}, r"`expert_capacity_factor` must be a number"),
    ({"expert_groups": "mixed"}, r"`expert_groups` must be one of hybrid, joint, isolated, or a list"),
    ({"expert_groups": None}, r"`expert_groups` must be a list of dict"),
    ({"expert_groups": {"name": "joint", "num_experts": 4}}, r"`expert_groups` must be a list of dict"),
    ({"expert_groups": ["joint"]}, r"`expert_groups` must be a list of dict"),
    ({"expert_groups": []}, r"`expert_groups` leaves sparse layer 0 without a routed group: add one"),
    ({"expert_groups": "isolated", "num_experts": 7}, r"isolated.*`num_experts` \(7\) evenly over 2.*multiple"),
    ({"expert_groups": [{"name": "joint"}]}, r"`expert_groups` entry .*lacks \['num_experts'\]"),
    (group(experts=4), r"`expert_groups` has unknown keys \['experts'\]; known ones are"),
    (group(num_experts=0), r"`expert_groups\['joint'\].num_experts` must be an integer"),
    (group(num_experts=2.0), r"`expert_groups\['joint'\].num_experts` must be an integer"),
    (group(intermediate_size=None), r"`expert_groups\['joint'\].intermediate_size`"),
    (group(always_on="yes"), r"`expert_groups\['joint'\].always_on` must be True or False"),
    (group(always_on=True), r"leaves sparse layer 0 without a routed group"),
    (group(modalities="text"), r"`expert_groups\['joint'\].modalities` must be a list of str"),
    (group(modalities=["video"]), r"`expert_groups\['joint'\].modalities` is \['video'\]"),
    (group(modalities=[]), r"`expert_groups\['joint'\].modalities` is \[\]"),
    (group(modalities=["text"]), r"for modality 'image', but layer 0 has 0 routed experts"),
    (group(layers=[99]), r"`expert_groups\['joint'\].layers` names layers \[99\]"),
    (group(layers=[0, 0]), r"`expert_groups\['joint'\].layers` repeats a value: \[0, 0\]"),
    (group(modalities=["text", "text"]), r"`expert_groups\['joint'\].modalities` repeats a value"),
    (group(layers=1), r"`expert_groups\['joint'\].layers` must be a list of int"),
    (group(layers=[1]), r"leaves sparse layer 0 without a routed group"),
    (
        group(layers=[3]) | {"mlp_only_layers": [3]},
        r"`expert_groups\['joint'\].layers` is \[3\], of which none is sparse",
    ),
    (group() | {"num_experts": 8}, r"`num_experts` is 8, but `expert_groups` have 4.*leave `num_experts` out"),
    ({"expert_groups": MANY_GROUPS + MANY_GROUPS[:1]}, r"`expert_groups` repeats a value"),
    *(
        (group(name=name), r"group name .* in `expert_groups`")
        for name in ("Joint", "a-b", "a.b", "1", "", "up_proj", "training", "keys", "forward", None)
    ),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[str(fields)[:60] for fields, _ in WRONG])
def test_wrong_field_of_the_decoder(fields, message):
    with pytest.raises(ValueError, match=message):
        SparseMoeVlmTextConfig(**fields)
    with pytest.raises(ValueError, match=message):
        SparseMoeVlmConfig(text_config=fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_config": 3}, r"`text_config` must be a configuration or a dict, got 3"),
        ({"text_config": {"model_type": "llama"}}, r"`text_config` must be of type 'sparse_moe_vlm_text'.*'llama'"),
        ({"text_config": AutoConfig.for_model("qwen3")}, r"`text_config` must be of type 'sparse_moe_vlm_text'"),
        ({"text_config": {"modalities": ["text"]}}, r"`text_config` .*`modalities` that include 'image'"),
        ({"vision_config": "siglip"}, r"`vision_config` must be a configuration or a dict"),
        ({"vision_config": {"model_type": "resnet"}}, r"`vision_config` \(resnet\) merges patches from stage to stage"),
        ({"vision_config": ViTConfig(image_size=(224, 112))}, r"`vision_config` \(vit\) must give `image_size`"),
        ({"pixel_shuffle_factor": 3}, r"`pixel_shuffle_factor` \(3\) must divide the 14 patches per side"),
        ({"pixel_shuffle_factor": 0}, r"`pixel_shuffle_factor` must be an integer of at least 1"),
        (
            {"vision_config": {"patch_size": 500}},
            r"`vision_config.image_size` \(224\) must be at least `patch_size` \(500\)",
        ),
        ({"image_token_id": 32000}, r"`image_token_id` must be an integer from 0 to 31999, got 32000"),
        ({"image_token_id": -1}, r"`image_token_id`"),
        ({"image_token_id": 5, "text_config": {"pad_token_id": 5}}, r"`image_token_id` \(5\) is also .*pad_token_id"),
        ({"image_token_index": 5}, r"no field `image_token_index`: did you mean `image_token_id`"),
        ({"vision_config": {"model_type": "swin"}}, r"\(swin\) merges patches.*SigLIP, CLIP"),
        ({"vision_config": {"model_type": "convnext"}}, r"\(convnext\) merges patches"),
        ({"vision_config": {"model_type": "pixtral"}}, r"\(pixtral\) packs images of any size"),
        ({"vision_config": {"model_type": "qwen3_vl_vision"}}, r"\(qwen3_vl_vision\) packs images"),
        ({"vision_config": {"model_type": "siglip2_vision_model"}}, r"takes images as lists of patches"),
        ({"vision_config": {"model_type": "minicpmv4_7_vision"}}, r"\(minicpmv4_7_vision\) merges patches in one"),
        ({"vision_config": {"model_type": "videomae"}}, r"\(videomae\) reads videos"),
        ({"vision_config": {"patch_size": 0}}, r"`vision_config.patch_size` must be an integer of at least 1"),
        ({"image_token_id": "<image>"}, r"`image_token_id`"),
        ({"projector_hidden_act": "gelo"}, r"`projector_hidden_act` must be one of .*gelu"),
        ({"multimodal_projector_bias": "no"}, r"`multimodal_projector_bias` must be True or False"),
        ({"tie_word_embeddings": None}, r"`tie_word_embeddings` must be True or False"),
    ],
)
def test_wrong_field_of_the_whole_model(fields, message):
    with pytest.raises(ValueError, match=message):
        SparseMoeVlmConfig(**fields)


# ---------------------------------------------------------------- import

GATE = """
    import importlib, json, pathlib, sys, types
    import modeling_sparse_moe_vlm

    folder = pathlib.Path(modeling_sparse_moe_vlm.__file__).parent
    results = {}
    for version in json.loads(sys.argv[1]):
        # As remote code is loaded: the same files under another name. Nothing may be imported before the check.
        package = types.ModuleType("remote_code")
        package.__path__ = [str(folder)]
        for name in [name for name in sys.modules if name.split(".")[0] == "remote_code"]:
            del sys.modules[name]
        sys.modules["remote_code"] = package
        sys.modules["transformers"].__version__ = version
        loaded = set(sys.modules)
        try:
            importlib.import_module(f"remote_code.{sys.argv[2]}_sparse_moe_vlm")
            results[version] = None
        except ImportError as error:
            results[version] = str(error)
            assert set(sys.modules) == loaded
    print(json.dumps(results))
"""


@pytest.mark.parametrize("file", ["configuration", "processing"])
def test_unsupported_transformers_is_an_error_at_import(file):
    supported = ["5.20.0", "5.23.0", "5.23.1.dev0", "5.99.0"]
    unsupported = ["5.19.9", "4.57.0", "6.0.0", "6.0.0.dev0", "10.1"]
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(GATE), json.dumps(supported + unsupported), file],
        capture_output=True,
        text=True,
        check=True,
    )
    results = json.loads(output.stdout)
    assert [results[version] for version in supported] == [None] * len(supported)
    for version in unsupported:
        assert ">=5.20,<6" in results[version]
        assert f"transformers {version} is installed" in results[version]
        assert "pip install 'transformers>=5.20,<6'" in results[version]


def test_defaults_are_silent():
    program = "from modeling_sparse_moe_vlm import SparseMoeVlmConfig; SparseMoeVlmConfig().num_parameters()"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout + output.stderr == ""


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("num_experts", 16, r"`num_experts` is 16, but"), ("num_experts_per_tok", 99, "`num_experts_per_tok` is 99")],
)
def test_fields_changed_after_construction_are_checked_when_a_model_is_made(field, value, message):
    config = make_config()
    setattr(config.text_config, field, value)
    for make in (SparseMoeVlmForConditionalGeneration, lambda config: SparseMoeVlmForCausalLM(config.text_config)):
        with pytest.raises(ValueError, match=message):
            make(config)
