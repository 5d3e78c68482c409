"""Small random vision-language models of Transformers, and inputs for them."""

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.support.models import TINY_DECODER, TINY_TOWER

IMAGE, VIDEO = 3, 4
GREEDY = {"max_new_tokens": 8, "do_sample": False}
WINDOW = 6
TEXT = TINY_DECODER | {"head_dim": 8}
VISION = TINY_TOWER
SLIDING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 8,
}
QWEN_TEXT = TEXT | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
QWEN = {
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "temporal_patch_size": 1,
        "spatial_merge_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
        "initializer_range": 0.2,
    },
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 5,
    "vision_end_token_id": 6,
}


def make_llava(text_config=None):
    config = LlavaConfig(
        text_config=text_config or LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION | {"patch_size": 8}),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def make_qwen3_vl():
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=QWEN_TEXT, **QWEN))


def make_qwen3_vl_moe():
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=QWEN_TEXT, **QWEN))


def make_gemma3(sliding_window=WINDOW):
    """Has sliding layers. The tokens of an image see each other."""
    config = Gemma3Config(
        text_config=TEXT | SLIDING | {"sliding_window": sliding_window},
        vision_config=VISION | {"vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=5,
        eoi_token_index=6,
    )
    return Gemma3ForConditionalGeneration(config)


def make_paligemma2():
    """Has sliding layers and soft-capped logits. The tokens of a prompt see each other."""
    config = PaliGemmaConfig(
        text_config=Gemma2Config(**TEXT | SLIDING | {"attn_logit_softcapping": 2.0}),
        vision_config=VISION | {"model_type": "siglip_vision_model", "patch_size": 8, "vision_use_head": False},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    model = PaliGemmaForConditionalGeneration(config)
    model.set_attn_implementation({"text_config": "eager"})  # SDPA does not support soft-capping
    return model


def make_idefics3():
    config = Idefics3Config(text_config=LlamaConfig(**TEXT), vision_config=VISION, image_token_id=IMAGE, scale_factor=2)
    return Idefics3ForConditionalGeneration(config)


def make_smolvlm():
    config = SmolVLMConfig(text_config=LlamaConfig(**TEXT), vision_config=VISION, image_token_id=IMAGE, scale_factor=2)
    return SmolVLMForConditionalGeneration(config)


def make_gemma4():
    """Text only. The last layers use the keys of earlier layers, and run only on the last token of a prompt."""
    text_config = TEXT | {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": WINDOW,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 99,
    }
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": 5, "boi_token_id": 6}
    return Gemma4ForConditionalGeneration(Gemma4Config(text_config=text_config, vision_config=None, **tokens))


def make_mllama():
    """Has cross-attention to the image."""
    text_config = TEXT | {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision_config = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }
    config = MllamaConfig(text_config=text_config, vision_config=vision_config, image_token_index=IMAGE)
    return MllamaForConditionalGeneration(config)


MODELS = {
    "llava": make_llava,
    "qwen3_vl": make_qwen3_vl,
    "qwen3_vl_moe": make_qwen3_vl_moe,
    "gemma3": make_gemma3,
    "paligemma2": make_paligemma2,
    "idefics3": make_idefics3,
    "smolvlm": make_smolvlm,
}


def make_mllama_inputs() -> dict[str, torch.Tensor]:
    """Returns one row with an image."""
    return {
        "input_ids": torch.tensor([[1, IMAGE, 9, 8]]),
        "pixel_values": torch.randn(1, 1, 1, 3, 16, 16),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 4, 1, 1, dtype=torch.long),
    }


def prepare(model):
    """Makes a model generate up to the maximum length, without dropout."""
    model.generation_config.eos_token_id = None
    return model.eval()


def make_model(name: str = "llava"):
    torch.manual_seed(0)
    return prepare(MODELS[name]())


def make_inputs(name: str = "llava", padded: bool = True) -> dict[str, torch.Tensor]:
    """Returns two rows with an image of 4 tokens each, at different positions. The second row is padded on the left."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(7, 99, (2, 14), generator=generator)
    input_ids[0, 2:6] = IMAGE
    input_ids[1, 6:10] = IMAGE
    attention_mask = torch.ones_like(input_ids)
    if padded:
        input_ids[1, :4] = attention_mask[1, :4] = 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    pixel_values = torch.randn(2, 3, 16, 16, generator=generator)
    is_image = (input_ids == IMAGE).long()
    if name.startswith("qwen"):
        inputs |= {"pixel_values": pixel_values.view(32, 48), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
        inputs["mm_token_type_ids"] = is_image
    elif name in ("idefics3", "smolvlm"):
        inputs["pixel_values"] = pixel_values[:, None]
    else:
        inputs["pixel_values"] = pixel_values
    if name == "gemma3":
        inputs["token_type_ids"] = is_image
    if name == "paligemma2":
        inputs["token_type_ids"] = torch.zeros_like(input_ids)
    return inputs
