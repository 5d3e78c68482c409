"""The presets and recipes in the repository are complete: they load, and their models can be built."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, TrainingArguments

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.training.recipes import load_recipe

pytestmark = pytest.mark.newest

CONFIGURATION = Path(__file__).parent.parent / "configuration"
MODELS = sorted((CONFIGURATION / "models").glob("*.json"))
RECIPES = sorted((CONFIGURATION / "training").glob("*.yaml"))


def test_there_are_presets_and_recipes():
    assert MODELS
    assert RECIPES


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_preset(path):
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = SparseMoeVlmForConditionalGeneration(config)
    assert model.num_parameters() == config.num_parameters()
    assert config.num_active_parameters("text") < config.num_active_parameters("image") < config.num_parameters()
    assert config.text_config.output_router_logits, "a preset is for training, which needs the router losses"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path, tmp_path):
    recipe = load_recipe(path)
    assert (CONFIGURATION.parent / recipe.model).exists()
    TrainingArguments(output_dir=str(tmp_path), remove_unused_columns=False, **recipe.training)
