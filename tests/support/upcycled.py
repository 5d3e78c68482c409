"""Tiny upcycled models whose experts differ, and inputs for them: a LLaVA, a Qwen3-VL, a Llama, and in-tree ones."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from modeling_sparse_moe_vlm.toolbox.upcycling import upcycle
from tests.support import in_tree_models
from tests.support.in_tree_models import IMAGE, QWEN, QWEN_TEXT, TEXT
from tests.support.processors import VOCAB_SIZE

KINDS = ["llava", "qwen3_vl", "llama"]


def make_dense(kind: str = "llava", **text):
    """Returns the dense model in evaluation mode. It generates up to the maximum length."""
    torch.manual_seed(0)
    if kind == "llama":
        return in_tree_models.prepare(LlamaForCausalLM(LlamaConfig(**TEXT | text)))
    if kind == "llava":
        return in_tree_models.prepare(in_tree_models.make_llava(LlamaConfig(**TEXT | text)))
    if not text:
        return in_tree_models.make_model(kind)
    assert kind == "qwen3_vl"
    config = Qwen3VLConfig(text_config=QWEN_TEXT | text, **QWEN)
    return in_tree_models.prepare(Qwen3VLForConditionalGeneration(config))


def make_upcycled(kind: str = "llava", expert_groups: str | list = "isolated", seed: int = 0, dense=None, **fields):
    """
    Returns an upcycled model as after training: experts differ, and routers have preferences. A Llama has
    images, too, where `mm_token_type_ids` say so.
    """
    fields = {"num_experts": 8, "num_experts_per_tok": 2, "modalities": ["text", "image"]} | fields
    model = upcycle(make_dense(kind) if dense is None else dense, expert_groups, **fields)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "expert" in name or name.endswith("gate.weight"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_speaking(kind: str = "llava", expert_groups: str = "hybrid", **fields):
    """Returns an upcycled LLaVA or Llama with the vocabulary of [`~tests.support.processors.make_tokenizer`]."""
    return make_upcycled(kind, expert_groups, dense=make_dense(kind, vocab_size=VOCAB_SIZE), **fields)


def make_inputs(kind: str = "llava", padded: bool = True, images: bool = True) -> dict[str, torch.Tensor]:
    """Returns two rows of 14 tokens, each with an image of 4 tokens if there are images. The second can be padded."""
    inputs = in_tree_models.make_inputs("llava" if kind == "llama" else kind, padded)
    if images and kind != "llama":
        return inputs
    input_ids = inputs["input_ids"].clone()
    is_image = input_ids == IMAGE
    input_ids[is_image] = 50
    inputs = {"input_ids": input_ids, "attention_mask": inputs["attention_mask"]}
    return inputs | ({"mm_token_type_ids": is_image.long()} if images else {})


def make_dense_inputs(kind: str = "llava") -> dict[str, torch.Tensor]:
    """Returns inputs that the dense model also accepts: images, except for a Llama, and no padding."""
    return make_inputs(kind, padded=False, images=kind != "llama")


def make_few_experts(kind: str = "llava", expert_groups: str | list = "isolated", **fields):
    """Calls [`make_upcycled`] with four experts per layer, for the modalities of the base."""
    return make_upcycled(kind, expert_groups, **{"num_experts": 4, "modalities": None} | fields)


def make_rows(kind: str = "llava", number: int = 8) -> list[dict[str, torch.Tensor]]:
    """Returns rows of unequal length, every other one with an image. The first half of a row is not a target."""
    rows = []
    for seed in range(number):
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(7, 99, (9 + seed,), generator=generator)
        ids = torch.zeros_like(input_ids)
        row = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if seed % 2:
            ids[2:6] = 1
            if kind != "llama":
                input_ids[2:6] = IMAGE
            pixel_values = torch.randn(1, 3, 16, 16, generator=generator)
            if kind == "llava":
                row["pixel_values"] = pixel_values
            elif kind == "qwen3_vl":
                row |= {"pixel_values": pixel_values.view(16, 48), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        row["mm_token_type_ids"] = ids
        row["labels"] = input_ids.clone()
        row["labels"][: 7 + seed // 3] = -100
        rows.append(row)
    return rows
