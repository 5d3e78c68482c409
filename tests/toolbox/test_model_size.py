"""Sizes of our models and of models of the library, from their configurations."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma4Config,
    Gemma4TextConfig,
    JetMoeConfig,
    LlamaConfig,
    LlavaConfig,
    MllamaForCausalLM,
    MllamaTextConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
)

from modeling_sparse_moe_vlm.toolbox import model_size as module
from modeling_sparse_moe_vlm.toolbox.meta_model import model_on_meta_device
from modeling_sparse_moe_vlm.toolbox.model_size import ModelSize, describe_size, model_size, short
from tests.support.models import make_config, make_model

pytestmark = pytest.mark.newest

DECODER = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
ATTENTION = 4 * 16 * 16
NORMS = 2 * 16
EMBEDDINGS = 50 * 16


def test_our_models(arrangement):
    config = make_config(expert_groups=arrangement)
    assert model_size(config) == ModelSize(
        config.num_parameters(),
        {"text": config.num_active_parameters("text"), "image": config.num_active_parameters("image")},
    )
    decoder = config.text_config
    assert model_size(decoder).total == decoder.num_parameters()
    assert model_size(decoder).active["text"] == decoder.num_active_parameters("text")


def test_a_dense_decoder():
    total = 2 * EMBEDDINGS + 2 * (ATTENTION + NORMS + 3 * 16 * 24) + 16
    assert model_size(LlamaConfig(**DECODER)) == ModelSize(total, {"text": total})
    tied = model_size(LlamaConfig(**DECODER, tie_word_embeddings=True))
    assert tied == ModelSize(total - EMBEDDINGS, {"text": total - EMBEDDINGS})


def test_a_mixture_of_experts():
    config = Qwen3MoeConfig(**DECODER, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=1)
    expert = 3 * 16 * 12
    layer = ATTENTION + NORMS + 2 * 8 + 4 * 16  # with norms of queries and keys, and a router
    rest = 2 * EMBEDDINGS + 2 * layer + 16
    assert model_size(config) == ModelSize(rest + 2 * 4 * expert, {"text": rest + 2 * 1 * expert})
    config.num_experts_per_tok = 3
    assert model_size(config).active == {"text": rest + 2 * 3 * expert}


def test_experts_without_the_experts_interface():
    config = JetMoeConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, kv_channels=8, num_local_experts=4)
    size = model_size(config)
    assert size.active == {}
    assert size.total > EMBEDDINGS


def test_a_configuration_without_the_number_of_chosen_experts(monkeypatch):
    config = Qwen3MoeConfig(**DECODER, moe_intermediate_size=12, num_experts=4)
    assert model_size(config).active
    monkeypatch.setattr(module, "CHOSEN_EXPERTS", ())
    assert model_size(config).active == {}


def test_names_of_the_number_of_chosen_experts():
    """`num_experts_per_tok` is not the only name."""
    config = Gemma4TextConfig(
        **DECODER | {"intermediate_size": 8},
        global_head_dim=8,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=1,
        moe_intermediate_size=12,
        hidden_size_per_layer_input=0,
    )
    size = model_size(config)
    assert size.total - size.active["text"] == 2 * 3 * 3 * 16 * 12


def test_text_does_not_use_the_vision_encoder_and_the_connector():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(**DECODER)
    size = model_size(LlavaConfig(vision_config=vision, text_config=text))
    assert size.active == {"text": model_size(text).total, "image": size.total}
    assert size.total > size.active["text"] + 16 * 16


def test_a_vision_language_mixture_of_experts_of_the_library():
    text = {**DECODER, "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    size = model_size(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    idle = 2 * 2 * 3 * 16 * 12
    assert size.active["image"] == size.total - idle
    assert size.active["text"] == model_size(Qwen3MoeConfig(**text)).active["text"]


def test_description_of_a_model():
    model = make_model()
    size = model_size(model.config)
    assert describe_size(model) == (
        f"Model with {size.total:,} parameters ({size.active['text']:,} active per text token, "
        f"{size.active['image']:,} active per image token)."
    )
    assert size.total == model.num_parameters()


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0 k"), (999_949, "999.9 k"), (1_000_000, "1.0 M"), (31_040_000_000, "31.0 G")],
)
def test_numbers_with_units(number, text):
    assert short(number) == text


def test_an_encoder_of_another_modality_is_not_used():
    """Image tokens do not pass through the audio encoder, and audio tokens not through the image encoder."""
    text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    audio = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16}
    model = model_on_meta_device(Gemma4Config(text_config=text, audio_config=audio, vision_config={"hidden_size": 16}))
    size = model_size(model)
    image, sound = (sum(p.numel() for p in model.get_encoder(name).parameters()) for name in ("image", "audio"))
    assert image != sound
    assert min(image, sound) > 0
    assert size.active["image"] == size.total - sound
    assert size.active["audio"] == size.total - image
    assert size.active["text"] < min(size.total - image, size.total - sound)


def test_a_decoder_without_an_auto_class():
    """It is found by the class name in its configuration."""
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = MllamaTextConfig(**DECODER, **tokens, cross_attention_layers=[], rope_parameters=rope)
    with pytest.raises(
        ValueError, match="no auto class of Transformers knows a configuration of type MllamaTextConfig"
    ):
        model_size(config)
    config.architectures = ["MllamaForCausalLM"]
    model = model_on_meta_device(config, "bfloat16")
    assert type(model) is MllamaForCausalLM
    assert model.lm_head.weight.device == torch.device("meta")
    assert model.dtype == torch.bfloat16
