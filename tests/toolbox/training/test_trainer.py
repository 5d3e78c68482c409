"""A small run from a preset and built-in data to a trained, evaluated and saved model."""

import json

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText, TrainingArguments

from modeling_sparse_moe_vlm.toolbox.data import VisionLanguageCollator
from modeling_sparse_moe_vlm.toolbox.demo import conversations, scenes, train_tokenizer
from modeling_sparse_moe_vlm.toolbox.demo.drawings import draw_answers, draw_expert_load
from modeling_sparse_moe_vlm.toolbox.evaluation import generate_answers
from modeling_sparse_moe_vlm.toolbox.hub import write_model_card
from modeling_sparse_moe_vlm.toolbox.routing import expert_load
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer, from_scratch, model_parts, train_parts
from modeling_sparse_moe_vlm.toolbox.training.recipes import Recipe, load_recipe
from tests.support.own_data import make_trainer, write_own_data

PRESET = "configuration/models/tiny.json"
RECIPE = "configuration/training/demo.yaml"


@pytest.fixture(scope="module")
def data():
    return scenes("train", 66, cell_size=16)


@pytest.fixture
def fresh(data):
    torch.manual_seed(0)
    return from_scratch(PRESET, data, vocab_size=400)


def test_the_tokenizer_is_lossless():
    tokenizer = train_tokenizer(["What is left of the cat?"], vocab_size=300)
    text = "Żółć, 🐈 and <unknown> words\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<image>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="must be at least 260"):
        train_tokenizer(["x"], vocab_size=100)


def test_training_lowers_the_loss_and_logs_router_losses(tmp_path, data, fresh):
    model, processor = fresh
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=11,
        learning_rate=3e-3,
        logging_steps=4,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = SparseMoeTrainer(
        model=model,
        args=arguments,
        data_collator=VisionLanguageCollator(processor),
        train_dataset=conversations(data),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    for entry in logs:
        assert entry["aux_loss"] == pytest.approx((entry["aux_loss_text"] + entry["aux_loss_image"]) / 2, abs=2e-4)
        assert entry["aux_loss"] > 0


def test_answers_load_and_figures(tmp_path, data, fresh):
    model, processor = fresh
    rows = conversations(data.select(range(6)))
    answers = generate_answers(model, processor, rows, batch_size=4, max_new_tokens=3)
    alone = [generate_answers(model, processor, [rows[i]], max_new_tokens=3)[0] for i in range(6)]
    assert answers == alone
    load = expert_load(model.eval(), [VisionLanguageCollator(processor)([rows[i] for i in range(6)])])
    assert set(load) == {"text", "image"}
    for shares in load.values():
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(4))
    draw_answers([data[i] for i in range(6)], answers, tmp_path / "answers.png")
    draw_expert_load(load, tmp_path / "load.png")
    assert (tmp_path / "answers.png").stat().st_size > 5000
    assert (tmp_path / "load.png").stat().st_size > 5000


def test_the_model_card_has_the_scores(tmp_path, fresh):
    model, processor = fresh
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    metrics = {
        "test": {"overall": {"model": 12.34, "blind": 5.0, "most_frequent_answer": 4.0}},
        "test_style": {"overall": {"model": 6.78, "blind": 5.0, "most_frequent_answer": 4.0}},
    }
    recipe = load_recipe(RECIPE, ["training.max_steps=7", "data.num_train=66"])
    write_model_card(tmp_path, template="model_card.md", config=model.config, metrics=metrics, recipe=recipe)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    measured = {result.dataset_split: (result.dataset_name, result.metric_value) for result in card.data.eval_results}
    assert measured == {
        "test": ("Emoji scenes, held-out arrangements", 12.3),
        "test_style": ("Emoji scenes, held-out drawing style", 6.8),
    }
    assert "| Emoji scenes, held-out arrangements | 12.3 | 5.0 | 4.0 |" in card.text
    shown = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert Recipe(**shown) == recipe
    assert "http" not in card.text

    write_model_card(tmp_path, template="model_card.md", config=model.config)
    unmeasured = ModelCard.load(tmp_path / "README.md")
    assert not unmeasured.data.eval_results
    assert "Nothing was measured" in unmeasured.text
    assert "No record of the training" in unmeasured.text
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoConfig"]
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).num_parameters() == model.config.num_parameters()


@pytest.mark.parametrize("with_outputs", [False, True])
def test_batches_of_texts_have_a_gradient_of_zero_if_only_parts_for_images_train(with_outputs, tmp_path):
    """Their loss stays the same. Every parameter has a gradient, as with several processes."""
    data = write_own_data(tmp_path, num_rows=2, bad=(), without_image=(0, 1))
    freeze = {"connector": "train", "rest": "freeze"}
    trainer = make_trainer(data, tmp_path / "o", prepare=lambda model, own: train_parts(model, freeze, own))
    model = trainer.model.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    expected = model(**batch).loss
    assert not expected.requires_grad
    result = trainer.compute_loss(model, dict(batch), return_outputs=with_outputs)
    loss = result[0] if with_outputs else result
    assert loss.item() == expected.item()
    if with_outputs:
        assert result[1].logits.shape[:2] == batch["input_ids"].shape
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == model_parts(model)["connector"].keys()
    assert not any(gradient.any() for gradient in gradients.values())
    with torch.no_grad():
        assert not trainer.compute_loss(model, dict(batch)).requires_grad
    assert not trainer.compute_loss(model.eval(), dict(batch)).requires_grad
    model.train().requires_grad_(True)
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    assert model.lm_head.weight.grad.any()
