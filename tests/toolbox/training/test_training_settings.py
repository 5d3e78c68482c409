"""Trained models are saved without the settings of training."""

import json

import pytest
import torch
from transformers import LlavaConfig, TrainingArguments

from modeling_sparse_moe_vlm.toolbox.demo import scenes
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer, from_scratch
from modeling_sparse_moe_vlm.toolbox.training.training_settings import compute_router_losses, no_training_settings
from tests.integration.test_trainer import make_rows
from tests.support.batches import collate
from tests.support.in_tree_models import make_llava
from tests.support.models import QUIET_TRAINING, make_model


def saved(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["text_config"]


@pytest.mark.parametrize("configured", [False, True])
def test_saved_models_do_not_return_router_logits(tmp_path, configured):
    model = make_model(output_router_logits=configured, router_aux_loss_coef=0.5)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), **QUIET_TRAINING, max_steps=2, save_steps=1, logging_steps=1, learning_rate=1e-3
    )
    trainer = SparseMoeTrainer(model=model, args=arguments, train_dataset=make_rows(), data_collator=collate)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    for folder in ("checkpoint-1", "checkpoint-2", "model"):
        config = saved(tmp_path / folder)
        assert (config["output_router_logits"], config["router_aux_loss_coef"]) == (False, 0.5)
    assert model.config.text_config.output_router_logits == configured  # as before
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [("aux_loss" in entry) for entry in logs] == [configured, configured]


def test_the_setting_is_restored_if_saving_fails():
    model = make_model(output_router_logits=True)
    with pytest.raises(ZeroDivisionError), no_training_settings(model):
        _ = 1 / model.config.text_config.output_router_logits
    assert model.config.text_config.output_router_logits


def test_other_models_are_not_affected():
    model = make_llava()
    before = model.config.to_dict()
    compute_router_losses(model)
    with no_training_settings(model):
        assert LlavaConfig.from_dict(before).to_dict() == model.config.to_dict() == before


def test_training_continues_with_router_losses():
    model = make_model()
    compute_router_losses(model)
    assert model.config.text_config.output_router_logits


def test_new_models_do_not_limit_answers():
    torch.manual_seed(0)
    model, processor = from_scratch("configuration/models/tiny.json", scenes("train", 11, cell_size=8), vocab_size=300)
    assert model.generation_config.max_new_tokens is None
    assert model.generation_config.max_length is None
    assert model.generation_config.suppress_tokens == [model.config.image_token_id]
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.config.text_config.output_router_logits  # training from scratch needs router losses
