"""Small upcycled models of every base with a sparse twin in Transformers. All their weights are random."""

import torch
from transformers import AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modeling_sparse_moe_vlm.configuration_upcycled import UpcycledExpertsConfig, upcycled_config_class
from modeling_sparse_moe_vlm.modeling_upcycled import upcycled_model_class
from modeling_sparse_moe_vlm.toolbox.upcycling.blocks import find_blocks
from tests.support.in_tree_models import QWEN
from tests.support.models import TINY_DECODER

SHARED = [
    {"name": "joint", "num_experts": 4},
    {"name": "shared", "num_experts": 1, "always_on": True, "intermediate_size": 40},
]
SIGMOID = {"router": "sigmoid"}
BIAS = {"router_bias_update_rate": 0.1}

_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
_HEADS = TINY_DECODER | {"head_dim": 12}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Type and configuration of dense decoders, by name.
BASES = {
    "cohere2": (
        "cohere2",
        TINY_DECODER
        | _ROPE
        | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "logit_scale": 0.3},
    ),
    "ernie4_5": ("ernie4_5", _HEADS),
    "exaone": ("exaone", _HEADS),
    "granite": (
        "granite",
        TINY_DECODER
        | {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "attention_bias": True,
        },
    ),
    "granite_swa": (
        "granite_swa",
        TINY_DECODER
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "layer_rope_theta": [500.0, 0],
            "sliding_window": 5,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.5,
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        TINY_DECODER
        | {
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "layer_types": ["linear_attention", "full_attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "residual_multiplier": 0.5,
        },
    ),
    "helium": ("helium", TINY_DECODER | {"head_dim": 8, "attention_bias": False}),
    "hunyuan": ("hunyuan_v1_dense", _HEADS),
    "internlm3": ("internlm3", _HEADS),
    "iquestcoder": ("iquestcoder", _HEADS),
    "lfm2": (
        "lfm2",
        TINY_DECODER | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    ),
    "llama": ("llama", _HEADS | _ROPE),
    "llama_with_biases": (
        "llama",
        TINY_DECODER
        | {
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "ministral": ("ministral", _HEADS | {"sliding_window": 5}),
    "mistral": ("mistral", TINY_DECODER | {"sliding_window": 5, "tie_word_embeddings": True}),
    "mistral_without_window": ("mistral", _HEADS | {"sliding_window": None}),
    "olmo2": ("olmo2", TINY_DECODER),
    "phi3": ("phi3", TINY_DECODER | {"sliding_window": 5}),
    "phi3_without_window": ("phi3", TINY_DECODER | _ROPE),
    "qwen2": ("qwen2", TINY_DECODER | _ROPE),
    "qwen2_with_windows": (
        "qwen2",
        TINY_DECODER | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", _HEADS | _ROPE | {"tie_word_embeddings": True}),
    "qwen3_with_window": (
        "qwen3",
        _HEADS | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen3_5": ("qwen3_5_text", TINY_DECODER | _LINEAR | {"head_dim": 8}),
    "seed_oss": ("seed_oss", _HEADS | {"residual_dropout": 0.0}),
    "seed_oss_without_biases": ("seed_oss", _HEADS | {"attention_bias": False, "residual_dropout": 0.0}),
    "youtu": ("youtu", TINY_DECODER | _MLA),
}


def make_dense(name: str):
    """Returns a dense language model."""
    model_type, settings = BASES[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))


def make_qwen3_5_with_images():
    """Returns a model with two kinds of layers, and with images as in Qwen3-VL."""
    text_config = TINY_DECODER | _LINEAR | {"head_dim": 8, "tie_word_embeddings": True}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
    vision = {name: value for name, value in QWEN["vision_config"].items() if name != "deepstack_visual_indexes"}
    config = Qwen3_5Config(text_config=text_config | {"rope_parameters": rope}, **QWEN | {"vision_config": vision})
    torch.manual_seed(0)
    return Qwen3_5ForConditionalGeneration(config)


def make_upcycled(dense, **fields):
    """Returns the upcycled model of a base. All its weights are random, as after training."""
    found = find_blocks(dense)
    defaults = {
        "hidden_size": found.hidden_size,
        "num_hidden_layers": found.num_layers,
        "hidden_act": found.hidden_act,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "expert_groups": "joint",
    }
    dense_layers = fields.get("mlp_only_layers", [])
    prefix = f"{dense.base_model_prefix}."
    blocks = [block.name.removeprefix(prefix) for block in found.blocks if block.layer not in dense_layers]
    experts = UpcycledExpertsConfig(blocks=blocks, **defaults | fields)
    values = dense.config.to_dict() | {"experts_config": experts}
    del values["model_type"]
    config = upcycled_config_class(type(dense.config)).from_dict(values)
    return randomize(upcycled_model_class(type(dense))._from_config(config))


def randomize(model):
    """Sets all parameters and router biases to random values that are large enough to matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(std=0.5)
            elif parameter.dim() > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape[1]).expand_as(buffer))
    model.generation_config.eos_token_id = None
    return model.eval()


def make_input_ids(length: int = 20) -> torch.Tensor:
    return torch.randint(7, 99, (2, length), generator=torch.Generator().manual_seed(0))
