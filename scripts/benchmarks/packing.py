"""
Compares training steps on packed rows with training steps on padded rows, for rows of mixed length with images.

    python scripts/benchmarks/packing.py --json

The rows are drawn as in mixed instruction data: 70 % have one image, 10 % have two, and 20 % have none. An image has 64
tokens. The number of text tokens is log-normal with a median of 64 and a σ of 0.9, between 8 and 512, so most rows are
short and a few are long. The batches, of 16 rows each, are random, without grouping by length. Both variants train on
the same rows: `VisionLanguageCollator` pads them (the peer), or packs them with `packing=True`. A training step is
forward and backward. The collator's own time is not measured, because it runs in worker processes.

`padded_vs_packed` is the time of the packed steps relative to that of the padded steps. `tokens_per_second` counts the
tokens of the rows, without padding. The models are ours and a dense LLaVA of Transformers.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from harness import Row, is_cuda, parse_arguments, report, time_interleaved
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from modeling_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.data.packing import RowPacker, RowPositions

IMAGE, FIRST_WORD = 3, 4
IMAGE_TOKENS = 64
PATCH = 8
ROWS_PER_BATCH = 16
BAR = 0.67


@dataclass(frozen=True)
class Size:
    """Sizes of the models, and number of batches of a timed run."""

    hidden: int = 256
    layers: int = 4
    vocabulary: int = 4096
    vision_hidden: int = 128
    vision_layers: int = 4
    batches: int = 2


QUICK = Size(hidden=128, layers=2, vocabulary=1024, vision_hidden=64, vision_layers=2, batches=1)


def main() -> None:
    arguments = parse_arguments(__doc__, repetitions=7)
    size = QUICK if arguments.quick else Size()
    dtype = torch.bfloat16 if is_cuda(arguments.device) else torch.float32
    torch.manual_seed(0)
    rows: list[Row] = []
    for name, model in {"ours, hybrid": make_ours(size), "LLaVA of Transformers, dense": make_llava(size)}.items():
        batches = make_batches(model, size)
        check_equal(model, batches)
        model = model.to(arguments.device, dtype)
        runs = {}
        for variant, its_batches in batches.items():
            placed = [place(batch, arguments.device, dtype) for batch in its_batches]
            runs[variant] = lambda model=model, placed=placed: train(model, placed)
        seconds = time_interleaved(runs, arguments.device, arguments.repetitions)
        num_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches["padded"])
        run = {variant: sum(batch["input_ids"].numel() for batch in batches[variant]) for variant in batches}
        case = f"{name}: {num_tokens} tokens, run as {run['packed']} packed or {run['padded']} padded"
        rows.append(Row(case, "padded_vs_packed", seconds["packed"], seconds["padded"], bar=BAR))
        per_second = {variant: num_tokens / value for variant, value in seconds.items()}
        rows.append(Row(case, "tokens_per_second", per_second["packed"], per_second["padded"]))
    report("packing", arguments, rows)


def make_ours(size: Size) -> SparseMoeVlmForConditionalGeneration:
    text = decoder(size) | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": size.hidden}
    config = SparseMoeVlmConfig(
        text_config=text | {"output_router_logits": True},
        vision_config=tower(size) | {"model_type": "siglip_vision_model", "vision_use_head": False},
        pixel_shuffle_factor=1,
        image_token_id=IMAGE,
    )
    return SparseMoeVlmForConditionalGeneration(config)


def make_llava(size: Size) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        text_config=LlamaConfig(**decoder(size)),
        vision_config=CLIPVisionConfig(**tower(size)),
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,  # without the class token
    )
    return LlavaForConditionalGeneration(config)


def decoder(size: Size) -> dict:
    heads = size.hidden // 64
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": 3 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
    }


def tower(size: Size) -> dict:
    return {
        "hidden_size": size.vision_hidden,
        "intermediate_size": 4 * size.vision_hidden,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_hidden // 32,
        "image_size": math.isqrt(IMAGE_TOKENS) * PATCH,
        "patch_size": PATCH,
    }


def make_rows(number: int, vocabulary: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Returns model inputs of rows, whose lengths are drawn as described above. The text after the images is target."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(number):
        num_images = draw.choices([1, 2, 0], weights=[70, 10, 20])[0]
        num_words = min(max(round(draw.lognormvariate(math.log(64), 0.9)), 8), 512)
        words = torch.randint(FIRST_WORD, vocabulary, (num_words,), generator=generator)
        input_ids = torch.cat([words[:4], torch.full((num_images * IMAGE_TOKENS,), IMAGE), words[4:]])[None]
        row = {"input_ids": input_ids, "labels": input_ids.masked_fill(input_ids == IMAGE, -100)}
        if num_images:
            side = math.isqrt(IMAGE_TOKENS) * PATCH
            row["pixel_values"] = torch.randn(num_images, 3, side, side, generator=generator)
        rows.append(row)
    return rows


def make_batches(model: torch.nn.Module, size: Size) -> dict[str, list[dict]]:
    """Returns the same rows in packed and in padded batches."""
    packer = RowPacker(0, {"input_ids": True, "labels": True, "pixel_values": False}, RowPositions(model))
    batches: dict[str, list[dict]] = {"packed": [], "padded": []}
    for seed in range(size.batches):
        rows = make_rows(ROWS_PER_BATCH, size.vocabulary, seed)
        lengths = [row["input_ids"].shape[1] for row in rows]
        batches["packed"].append(dict(packer.pack(rows, packer.assign(lengths))))
        padded = dict(packer.pack(rows, [[number] for number in range(len(rows))]))
        padded["attention_mask"] = (padded.pop("position_ids") >= 0).long()
        batches["padded"].append(padded)
    return batches


def place(batch: dict, device: str, dtype: torch.dtype) -> dict:
    return {
        name: value.to(device, dtype if value.is_floating_point() else None) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }


@torch.no_grad()
def check_equal(model: torch.nn.Module, batches: dict[str, list[dict]]) -> None:
    """Checks that packed and padded rows have the same loss."""
    packed, padded = (model(**batches[variant][0]).loss.item() for variant in ("packed", "padded"))
    if not math.isclose(packed, padded, rel_tol=1e-4):
        raise AssertionError(f"the loss of packed rows is {packed}, but that of padded rows is {padded}.")


def train(model: torch.nn.Module, batches: list[dict]) -> None:
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        model.zero_grad()


if __name__ == "__main__":
    main()
