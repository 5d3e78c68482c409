"""Tiny random models of all types of Transformers, from their default configurations."""

import re

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, initialization

VOCABULARY = 128
FIRST_TOKEN = 3  # ids of placeholders and other special tokens start here and end before TEXT_TOKENS
TEXT_TOKENS = range(64, VOCABULARY)
HEADS, HEAD_DIM = 4, 8

# Replacements of integers, by the name of the field. The first pattern that matches applies.
SIZES = {
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length": 256,
    r"(.*_)?vocab_size(_.*)?|n_words|.*codebook_size": VOCABULARY,
    r"first_k_dense_replace": 1,
    r"num_hidden_layers|n_layers?|depth|(.*_)?layers|num_blocks": 2,
    r"num_key_value_heads|num_kv_heads|num_global_key_value_heads": 2,
    r"(.*_)?num_heads|(.*_)?attention_heads|n_heads?": HEADS,
    r"(.*_)?head_dim(_.*)?|.*head_size|kv_channels|d_head|dim_head": HEAD_DIM,
    r".*_rank": 8,
    r"moe_.*intermediate_size|.*expert.*intermediate_size": 24,
    r"(.*_)?intermediate_size|(.*_)?ffn_dim|n_inner|d_ff|d_inner|ffn_hidden_size|dim_ff|mlp_dim|ff_dim": 48,
    r"(.*_)?hidden_size|d_model|n_embd|(.*_)?dim|embedding_size|width": 32,
    r"image_size|img_size|resolution": 16,
    r"(.*_)?patch_size": 4,
    r"(.*_)?num_experts|n_routed_experts|num_local_experts": 4,
    r"num_experts_per_tok(en)?|top_k|(moe_)?top_?k": 2,
    r"base_channels|latent_channels": 32,
    r"channel_multiplier": (1, 1),
    r"n_group|topk_group|num_expert_group": 1,
    r"(.*_)?sliding_window|attention_window.*|chunk_size|.*window_size": 8,
}
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

ROPE = {"rope_type": "default", "rope_theta": 1e4}
ROTARY_SECTIONS = {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}}
LATENT_ATTENTION = {"num_key_value_heads": HEADS}
LINEAR_ATTENTION = {"layer_types": ["linear_attention", "full_attention"]}
VOCABULARY_MAP = {"vocabulary_map": {"<image>": 8} | {f"IMGIMG{letter}Z": 100 + i for i, letter in enumerate("ABCD")}}
TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
GEMMA3N = {
    "num_hidden_layers": 4,
    "intermediate_size": [48] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
}
FIXED_HEADS = {"head_dim": HEAD_DIM}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
# Further fields of types, by the `model_type` of the configuration or sub-configuration.
FIXES: dict[str, dict] = {
    "glm4v_text": ROTARY_SECTIONS,
    "glm_ocr_text": ROTARY_SECTIONS,
    "paddleocr_vl_text": ROTARY_SECTIONS,
    "qwen2_5_omni_text": ROTARY_SECTIONS,
    "qwen2_5_vl_text": ROTARY_SECTIONS,
    "qwen2_vl_text": ROTARY_SECTIONS,
    "hunyuan_vl_text": FIXED_HEADS | {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "hunyuan_v1_dense": FIXED_HEADS,
    "ministral": FIXED_HEADS,
    "nemotron": FIXED_HEADS | {"num_key_value_heads": 2},
    "deepseek_v3": LATENT_ATTENTION,
    "deepseek_v32": LATENT_ATTENTION,
    "glm_moe_dsa": LATENT_ATTENTION,
    "minicpm3": LATENT_ATTENTION,
    "youtu": LATENT_ATTENTION,
    "axk1": LATENT_ATTENTION,
    "axk2": LATENT_ATTENTION,
    "glm4_moe_lite": LATENT_ATTENTION,
    "sarvam_mla": LATENT_ATTENTION,
    "mistral_large4_text": LATENT_ATTENTION,
    "glm4v_moe_text": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "kimi_linear": LINEAR_ATTENTION | LATENT_ATTENTION,
    "qwen3_5_text": LINEAR_ATTENTION,
    "bailing_hybrid": LINEAR_ATTENTION | LATENT_ATTENTION,
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "mamba_chunk_size": 8},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "chameleon": VOCABULARY_MAP,
    "emu3": VOCABULARY_MAP,
    "emu3_vqgan": {"hidden_size": 32, "base_channels": 32, "embed_dim": 4, "latent_channels": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "hunyuan_v1_moe": FIXED_HEADS,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "step3p5": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": GEMMA3N,
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "glm5_next_text": LATENT_ATTENTION,
    "dots3_note_text": LATENT_ATTENTION,
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "granite4_vision": {
        "deepstack_layer_map": [(-1, 0)],
        "downsample_rate": "1/2",
        "vision_config": TOWER | {"hidden_size": 64},
    },
    "blip_2_qformer": {"cross_attention_frequency": 1},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "fast_vlm": {"vision_config": TOWER},
    "gemma3n": {"vision_config": TOWER},
    "perception_lm": {"vision_config": TOWER | {"model_args": {"embed_dim": 32}}},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "split_ngram_parts": 1,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "idefics": {"cross_layer_interval": 1},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 10, "vision_end_token_id": 11},
    "hunyuan_vl_vision": {"max_image_size": 64, "min_image_size": 16},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Returns the default configuration of a type, with small sizes. Every token in [`TEXT_TOKENS`] is a word."""
    return _shrunk(AutoConfig.for_model(model_type))


def tiny_model(model_type: str, auto_class, device: str = "cpu") -> PreTrainedModel:
    """Returns a random model of a type, of the class that an Auto class chooses for it."""
    if device == "meta":
        return _on_meta(tiny_config(model_type), auto_class)
    torch.manual_seed(0)
    model = _build(tiny_config(model_type), auto_class).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():  # the gates of xLSTM, which would hide the effect of experts
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def default_model(model_type: str, auto_class) -> PreTrainedModel:
    """Returns a model of a type in its default size, on the meta device."""
    return _on_meta(AutoConfig.for_model(model_type), auto_class)


def _on_meta(config: PreTrainedConfig, auto_class) -> PreTrainedModel:
    with torch.device("meta"), initialization.no_init_weights():
        return _build(config, auto_class)


def _build(config: PreTrainedConfig, auto_class) -> PreTrainedModel:
    model_class = auto_class._model_mapping[type(config)]
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    for part in vars(config).values():
        if isinstance(part, model_class.config_class):
            config = part  # a text model that the library also lists under the type of a larger model
    return model_class(config)


def _shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    token_ids = iter(range(FIRST_TOKEN, TEXT_TOKENS.start))
    fields = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = _shrunk(value)
        elif type(value) is not int and name != "channel_multiplier":
            continue
        elif re.fullmatch(r".*(_id|token_index)", name):
            fields[name] = SPECIAL_TOKENS[name] if name in SPECIAL_TOKENS else next(token_ids)
        elif sizes := [size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)]:
            fields[name] = min(value, sizes[0])
    if "initializer_range" in vars(config):
        fields["initializer_range"] = 0.2
    return type(config)(**fields | FIXES.get(config.model_type, {}))
