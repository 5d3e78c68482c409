"""Rows for packing, and packers, for the small models of `models.py` and `in_tree_models.py`."""

import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from modeling_sparse_moe_vlm.toolbox.data.packing import RowPacker, RowPositions
from tests.support import in_tree_models
from tests.support.in_tree_models import IMAGE, QWEN, QWEN_TEXT, TEXT, VISION

ROWS = [(9, 1), (1, 0), (17, 2), (6, 0), (11, 1), (7, 0)]  # tokens and images


def make_qwen2_5_vl():
    """Has an encoder with window attention."""
    vision = {name: value for name, value in QWEN["vision_config"].items() if name != "num_position_embeddings"}
    vision |= {"window_size": 8, "fullatt_block_indexes": [1]}
    vision.pop("deepstack_visual_indexes")
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=QWEN_TEXT, **QWEN | {"vision_config": vision})
    )


def make_internvl():
    vision = InternVLVisionConfig(**VISION | {"image_size": [16, 16], "patch_size": [4, 4]})
    config = InternVLConfig(
        text_config=LlamaConfig(**TEXT), vision_config=vision, image_token_id=IMAGE, image_seq_length=4
    )
    return InternVLForConditionalGeneration(config)


BASES = {"qwen2_5_vl": make_qwen2_5_vl, "internvl": make_internvl} | {
    name: in_tree_models.MODELS[name] for name in ("llava", "qwen3_vl", "gemma3", "idefics3", "smolvlm")
}


def make_base(name: str):
    """Returns a dense model of Transformers in evaluation mode."""
    torch.manual_seed(0)
    return in_tree_models.prepare(BASES[name]())


def make_rows(name: str, numbers=ROWS) -> list[dict[str, torch.Tensor]]:
    """Returns model inputs of rows with some images of 4 tokens each. The first token is a target."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length, num_images in numbers:
        input_ids = torch.randint(7, 99, (1, length), generator=generator)
        for image in range(num_images):
            input_ids[:, 1 + 6 * image : 5 + 6 * image] = IMAGE
        row = {"input_ids": input_ids, "labels": input_ids.masked_fill(input_ids == IMAGE, -100)}
        is_image = (input_ids == IMAGE).long()
        if name not in ("llava", "llama", "internvl", "idefics3", "smolvlm"):
            row["mm_token_type_ids"] = is_image
        if name == "gemma3":
            row["token_type_ids"] = is_image
        if num_images:
            images = torch.randn(num_images, 3, 16, 16, generator=generator)
            row["pixel_values"] = images
            if name.startswith("qwen"):
                row["pixel_values"] = images.reshape(16 * num_images, 48)
                row["image_grid_thw"] = torch.tensor([[1, 4, 4]] * num_images)
            elif name in ("idefics3", "smolvlm"):
                row["pixel_values"] = images[None]
        rows.append(row)
    return rows


def make_packer(model, name: str) -> RowPacker:
    images_of_row = name in ("idefics3", "smolvlm")
    layouts = dict.fromkeys(("input_ids", "labels", "mm_token_type_ids", "token_type_ids"), True)
    layouts |= {"pixel_values": images_of_row, "image_grid_thw": False}
    return RowPacker(0, layouts, RowPositions(model), separators=name == "gemma3")
