"""
The folder in which the blocks of the documentation run. It has small random models in folders with the names of models
on the Hub, so that Transformers loads these instead, a demo model after two training steps, and an image.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from modeling_sparse_moe_vlm.toolbox.commands.main import main
from modeling_sparse_moe_vlm.toolbox.demo import scenes
from modeling_sparse_moe_vlm.toolbox.upcycling import upcycle
from tests.support.in_tree_models import make_llava, make_qwen3_vl, make_smolvlm
from tests.support.models import TINY_DECODER, TINY_TOWER
from tests.support.pages import with_small_recipe
from tests.support.processes import ROOT
from tests.support.processors import VOCAB_SIZE, make_image_processor, make_tokenizer
from tests.toolbox.upcycling.test_processors import make_llava_processor

TEXT = TINY_DECODER | {"vocab_size": VOCAB_SIZE, "head_dim": 8}


def _language_model(folder: Path) -> None:
    Qwen3ForCausalLM(Qwen3Config(**TEXT)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def _vision_encoder(folder: Path) -> None:
    SiglipVisionModel(SiglipVisionConfig(**TINY_TOWER, vision_use_head=False)).save_pretrained(folder)
    make_image_processor().save_pretrained(folder)


def _llava(folder: Path) -> None:
    make_llava(LlamaConfig(**TEXT)).save_pretrained(folder)
    make_llava_processor().save_pretrained(folder)


MODELS = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": lambda folder: make_smolvlm().save_pretrained(folder),
    "Qwen/Qwen3-VL-2B-Instruct": lambda folder: make_qwen3_vl().save_pretrained(folder),
    "Qwen/Qwen3-0.6B": _language_model,
    "google/siglip2-base-patch16-224": _vision_encoder,
    "llava-hf/llava-interleave-qwen-0.5b-hf": _llava,
    "path/to/llava": _llava,
    "outputs/trained": lambda folder: upcycle(make_qwen3_vl(), "joint", num_experts=4).save_pretrained(folder),
}


def furnish(folder: Path) -> None:
    """Writes everything into an empty folder, which is the working directory."""
    torch.manual_seed(0)
    for name, save in MODELS.items():
        save(folder / name)
    for name in ("cat.png", "photo.jpg"):
        scenes("test", 1, cell_size=16)[0]["image"].save(folder / name)
    for name in ("configuration", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    main(with_small_recipe(["train"]))
