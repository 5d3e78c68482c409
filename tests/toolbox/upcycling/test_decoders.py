"""Finds the text decoder of a model, how images enter it, and the tokens that represent them."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    initialization,
)

from modeling_sparse_moe_vlm.toolbox.upcycling.decoders import (
    decoder_layers,
    placeholder_ids,
    takes_images_by_cross_attention,
)
from modeling_sparse_moe_vlm.toolbox.upcycling.errors import UpcyclingError
from tests.support.in_tree_models import IMAGE, TEXT, VIDEO, VISION, make_mllama, make_model


def build(config, auto_class=AutoModelForCausalLM):
    with torch.device("meta"), initialization.no_init_weights():
        return auto_class.from_config(config)


@pytest.mark.parametrize(
    ("name", "path"),
    [("llava", "model.language_model"), ("smolvlm", "model.text_model"), ("qwen3_vl", "model.language_model")],
)
def test_decoders_of_vision_language_models(name, path):
    model = make_model(name)
    found = decoder_layers(model)
    assert (found.decoder, found.name, found.path) == (path, "layers", f"{path}.layers")
    assert found.layers is model.get_submodule(path).layers
    assert found.config is model.config.text_config


def test_decoders_that_are_the_model_itself():
    model = build(LlamaConfig(**TEXT), AutoModel)
    found = decoder_layers(model)
    assert (found.decoder, found.path) == ("", "layers")
    assert found.config is model.config


def test_decoders_that_the_library_mistakes_for_another_module():
    model = build(AutoConfig.for_model("modernbert-decoder", **TEXT))
    assert model.get_decoder() is model.decoder  # which is the language head
    assert decoder_layers(model).path == "model.layers"


def test_a_tower_as_deep_as_the_decoder_and_larger():
    text = TEXT | {"num_hidden_layers": 2}
    vision = VISION | {"model_type": "clip_vision_model", "num_hidden_layers": 2, "hidden_size": 64}
    config = AutoConfig.for_model("llava", text_config=text | {"model_type": "llama"}, vision_config=vision)
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        assert decoder_layers(build(config, auto_class)).decoder.endswith("language_model")
    model = build(config, AutoModel)
    model.get_decoder = lambda: model  # as some classes return it
    assert decoder_layers(model).decoder == "language_model"


def test_further_lists_of_the_decoder():
    model = build(LlamaConfig(**TEXT))
    model.model.norms = nn.ModuleList(nn.RMSNorm(32, device="meta") for _ in range(2))
    model.model.heads = nn.ModuleList(nn.Linear(32, 999, device="meta") for _ in range(5))
    assert decoder_layers(model).path == "model.layers"


@pytest.mark.parametrize("interval", [1, 2])
def test_cross_attention_layers_next_to_those_of_the_decoder(interval):
    vision = {"embed_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    settings = {"vision_config": vision, "cross_layer_interval": interval, "use_resampler": False}
    model = build(AutoConfig.for_model("idefics", **TEXT | settings), AutoModel)
    assert len(model.gated_cross_attn_layers) == 2 // interval
    assert decoder_layers(model).path == "layers"


def test_decoders_after_encoders():
    text = TEXT | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    larger = text | {"intermediate_size": 96}
    model = build(AutoConfig.for_model("t5gemma", encoder=larger, decoder=text), AutoModelForSeq2SeqLM)
    model.get_decoder = lambda: model
    assert decoder_layers(model).path == "model.decoder.layers"


def test_alternating_layers_are_refused():
    model = build(LlamaConfig(**TEXT))
    model.model.others = nn.ModuleList(build(LlamaConfig(**TEXT)).model.layers)
    with pytest.raises(UpcyclingError, match=r"several lists of layers \(model.layers, model.others\)"):
        decoder_layers(model)


def test_models_without_a_list_of_layers():
    model = build(LlamaConfig(**TEXT))
    del model.model.layers
    with pytest.raises(UpcyclingError, match=r"^LlamaForCausalLM has no text decoder with a list of layers\.$"):
        decoder_layers(model)


@pytest.mark.parametrize("name", ["llava", "smolvlm", "gemma3", "qwen3_vl"])
def test_images_that_are_tokens(name):
    assert not takes_images_by_cross_attention(make_model(name))


def test_images_that_are_not_tokens():
    assert takes_images_by_cross_attention(make_mllama())
    vision = {"embed_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    idefics = {"vision_config": vision, "cross_layer_interval": 2, "use_resampler": False}
    assert takes_images_by_cross_attention(build(AutoConfig.for_model("idefics", **TEXT | idefics), AutoModel))
    text = TEXT | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    model = build(AutoConfig.for_model("t5gemma", encoder=text, decoder=text), AutoModelForSeq2SeqLM)
    assert takes_images_by_cross_attention(model)


def test_text_models():
    assert not takes_images_by_cross_attention(build(LlamaConfig(**TEXT)))
    assert placeholder_ids(LlamaConfig()) == {}


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("llava", {"image_token_index": 7}, {"image": [7]}),
        ("qwen3_vl", {"image_token_id": IMAGE, "video_token_id": VIDEO}, {"image": [IMAGE], "video": [VIDEO]}),
        ("llava_onevision", {}, {"image": [151646], "video": [151647]}),
        ("qwen2_5_omni_thinker", {}, {"image": [151655], "video": [151656], "audio": [151646]}),
        ("gemma4", {"audio_token_id": 5}, {"image": [258880], "video": [258884], "audio": [5]}),
        ("molmo2", {}, {"image": [151938]}),
        ("minicpmv4_6", {}, {}),
        ("minicpmv4_6", {"image_token_id": 0}, {"image": [0]}),
    ],
)
def test_tokens_that_stand_for_features(model_type, settings, expected):
    found = placeholder_ids(AutoConfig.for_model(model_type, **settings))
    assert found == expected
    assert list(found) == list(expected)
