"""Losses that `Trainer` computes itself: label smoothing and `compute_loss_func`."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, losses
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer
from modeling_sparse_moe_vlm.toolbox.training.resuming import ResumableTrainer
from tests.integration.test_trainer import make_rows
from tests.support.batches import collate
from tests.support.models import QUIET_TRAINING, make_model

COEFFICIENTS = {
    "router_aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.25,
    "router_local_entropy_coef": 0.125,
    "router_global_entropy_coef": 0.0625,
}


def make_trainer(tmp_path, model, trainer_class=SparseMoeTrainer, compute_loss_func=None, **arguments):
    return trainer_class(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), **QUIET_TRAINING, **arguments),
        train_dataset=make_rows(),
        data_collator=collate,
        compute_loss_func=compute_loss_func,
    )


def smoothed(logits, labels, num_items):
    """Returns the loss of torch with a smoothing of 0.1 and the labels of the next position."""
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum") / num_items


def double(outputs, labels, num_items_in_batch=None):
    return 2 * smoothed(outputs["logits"], labels, num_items_in_batch)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("has_router_losses", [True, False])
@pytest.mark.parametrize("kind", ["label smoothing", "function"])
def test_router_losses_are_added(tmp_path, kind, has_router_losses, is_training):
    model = make_model(output_router_logits=has_router_losses, **COEFFICIENTS).train(is_training)
    batch = collate(make_rows(4))
    own = model(**batch, output_router_logits=True)
    assert own.router_loss > 0.5
    targets = int((batch["labels"][:, 1:] != -100).sum())
    # As one of two micro-batches: half of the language loss, and half of the router losses.
    num_items = torch.tensor(2 * targets)
    expected = smoothed(own.logits, batch["labels"], num_items)
    if kind == "label smoothing":
        trainer = make_trainer(tmp_path, model, label_smoothing_factor=0.1)
    else:
        trainer = make_trainer(tmp_path, model, compute_loss_func=double)
        expected = 2 * expected
    if has_router_losses:
        expected = expected + own.router_loss / 2
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=num_items)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    router = model.model.language_model.layers[0].mlp.gate
    expected_gradient = torch.autograd.grad(expected, router.weight)[0]
    torch.testing.assert_close(router.weight.grad, expected_gradient)


def test_the_router_loss_in_the_outputs_is_what_the_model_adds():
    model = make_model(output_router_logits=True, **COEFFICIENTS).train()
    batch = collate(make_rows(4))
    outputs = model(**batch)
    without = model(**batch, output_router_logits=False)
    assert without.router_loss is None
    torch.testing.assert_close(outputs.loss - without.loss, outputs.router_loss)
    # With the entropy losses, it is more than the two losses with a name.
    named = 0.5 * outputs.aux_loss + 0.25 * outputs.z_loss
    assert abs(outputs.router_loss - named) > 1e-3


@pytest.mark.parametrize("text_only", [False, True])
def test_other_trainers_warn_that_router_losses_are_left_out(tmp_path, monkeypatch, text_only):
    messages = []
    monkeypatch.setattr(losses.logger, "warning_once", messages.append)

    def warnings_of(call):
        messages.clear()
        call()
        return list(messages)

    model = make_model(output_router_logits=True)
    if text_only:
        model = SparseMoeVlmForCausalLM(model.config.text_config)
    batch = collate(make_rows(1))
    if text_only:
        del batch["mm_token_type_ids"]
    trainer = make_trainer(tmp_path, model, Trainer, label_smoothing_factor=0.1)
    model.train()
    (message,) = warnings_of(lambda: trainer.compute_loss(model, dict(batch)))
    assert "use `SparseMoeTrainer`" in message
    assert "add `outputs.router_loss`" in message
    right = make_trainer(tmp_path, model, label_smoothing_factor=0.1)
    plain = make_trainer(tmp_path, model, Trainer)
    for trainer in (right, plain):
        assert warnings_of(lambda trainer=trainer: trainer.compute_loss(model, dict(batch))) == []
    unlabelled = {key: value for key, value in batch.items() if key != "labels"}
    assert warnings_of(lambda: model(**unlabelled, output_router_logits=True)) == []
    with torch.no_grad():
        assert warnings_of(lambda: model(**unlabelled)) == []
    assert len(warnings_of(lambda: model(**unlabelled))) == 1
    model.eval()
    assert warnings_of(lambda: model(**unlabelled)) == []


@pytest.mark.parametrize("has_experts", [True, False])
def test_router_biases_need_router_logits_if_there_are_sparse_layers(tmp_path, monkeypatch, has_experts):
    model = make_model(router_bias_update_rate=0.1, mlp_only_layers=[] if has_experts else [0, 1])
    trainer = make_trainer(tmp_path, model)
    monkeypatch.setattr(ResumableTrainer, "train", lambda trainer, *args, **kwargs: (args, kwargs))
    if has_experts:
        with pytest.raises(ValueError, match="`router_bias_update_rate` is set, but the model does not return router"):
            trainer.train()
        model.config.text_config.output_router_logits = True
    assert trainer.train("checkpoint", None, ignore_keys_for_eval=["a"]) == (
        ("checkpoint", None),
        {"ignore_keys_for_eval": ["a"]},
    )
