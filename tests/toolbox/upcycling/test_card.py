"""The card of an upcycled model, line by line."""

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_sparse_moe_vlm.toolbox.upcycling.card import write_card
from modeling_sparse_moe_vlm.toolbox.upcycling.costs import costs_of, costs_table
from modeling_sparse_moe_vlm.toolbox.upcycling.upcycle import upcycle
from tests.support.in_tree_models import make_llava
from tests.support.models import TINY_DECODER


def make_card(folder, source, model, **request):
    torch.manual_seed(0)
    sparse = upcycle(model, **request)
    costs = costs_of(model), costs_of(sparse)
    write_card(folder, "my-model", source, sparse, *costs)
    return ModelCard.load(folder / "README.md"), costs_table({"dense": costs[0], "sparse": costs[1]}), sparse


def test_of_a_vision_language_model_from_the_hub(tmp_path):
    card, table, sparse = make_card(tmp_path, "some/llava", make_llava())
    assert card.data.base_model == "some/llava"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["moe", "upcycled", "custom_code"]
    assert "# my-model" in card.content
    assert "made from the dense model [some/llava](https://huggingface.co/some/llava) by upcycling" in card.content
    assert table in card.content
    for line in (
        "| start | residual (router rows random, seed 0) |",
        "| groups | joint (8 × 48), text (1 × 48, always on), image (1 × 48, always on) |",
        "| routed experts per token | 2 |",
        "| sparse layers | 2 of 2 |",
        'model = AutoModelForImageTextToText.from_pretrained("my-model", trust_remote_code=True)',
    ):
        assert line in card.content.splitlines()
    assert "Before any training: parity on 32 tokens (made batch, float32)" in card.content
    del sparse.config.experts_config.start["parity"]
    write_card(tmp_path, "my-model", "some/llava", sparse, costs_of(sparse), costs_of(sparse))
    assert "parity" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("request_", "start"),
    [
        ({"start": "split", "granularity": 2, "seed": 7}, "split (granularity 2, router rows random, seed 7)"),
        ({"start": "drop", "drop_ratio": 0.25}, "drop (drop_ratio 0.25, router rows random, seed 0)"),
        ({"layers": [1]}, "copy (router rows random, seed 0)"),
    ],
)
def test_of_a_language_model_in_a_folder(request_, start, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**TINY_DECODER))
    card, _, _ = make_card(tmp_path, str(tmp_path), model, expert_groups="joint", **request_)
    assert card.data.base_model is None
    assert card.data.pipeline_tag == "text-generation"
    assert f"the dense model `{tmp_path}` by upcycling" in card.content
    lines = card.content.splitlines()
    assert f"| start | {start} |" in lines
    assert f"| sparse layers | {2 if 'layers' not in request_ else 1} of 2 |" in lines
    assert 'model = AutoModelForCausalLM.from_pretrained("my-model", trust_remote_code=True)' in lines
