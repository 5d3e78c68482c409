"""Small models for all tests. Their weights are large enough that experts, attention and routing all matter."""

import torch

from modeling_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmForConditionalGeneration

# Sizes of tiny decoders and vision towers of every kind.
TINY_DECODER = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # With the usual 0.02, the experts of a tiny model hardly change the logits, so comparisons could not fail.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}
TEXT_CONFIG = TINY_DECODER | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
VISION_CONFIG = TINY_TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
IMAGE_TOKEN_ID = 3
# Arguments of training runs on the CPU without logging.
QUIET_TRAINING = {"use_cpu": True, "remove_unused_columns": False, "report_to": "none", "disable_tqdm": True}


def make_config(vision_config: dict | None = None, **text_config) -> SparseMoeVlmConfig:
    return SparseMoeVlmConfig(
        text_config=TEXT_CONFIG | text_config,
        vision_config=VISION_CONFIG if vision_config is None else vision_config,
        image_token_id=IMAGE_TOKEN_ID,
    )


def make_model(seed: int = 0, **text_config) -> SparseMoeVlmForConditionalGeneration:
    torch.manual_seed(seed)
    return SparseMoeVlmForConditionalGeneration(make_config(**text_config)).eval()


def make_inputs(
    seed: int = 0, batch_size: int = 2, length: int = 14, images_per_row: int = 1
) -> dict[str, torch.Tensor]:
    """Returns rows of text with `images_per_row` images of 4 tokens each after the first two tokens."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, 99, (batch_size, length), generator=generator)
    input_ids[:, 2 : 2 + 4 * images_per_row] = IMAGE_TOKEN_ID
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE_TOKEN_ID).long(),
    }
    if images_per_row:
        inputs["pixel_values"] = torch.randn(batch_size * images_per_row, 3, 16, 16, generator=generator)
    return inputs
