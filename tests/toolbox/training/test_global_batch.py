"""Router losses over the batch of all processes, with pretended processes that run one after the other."""

import sys

import pytest
import torch
from transformers import TrainingArguments

from modeling_sparse_moe_vlm import losses
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer
from modeling_sparse_moe_vlm.toolbox.training import global_batch as module
from modeling_sparse_moe_vlm.toolbox.training.global_batch import global_batch
from tests.integration.test_trainer import make_rows
from tests.support.batches import collate
from tests.support.models import QUIET_TRAINING, make_model
from tests.support.pretended_processes import pretend_two_processes

COEFFICIENTS = {
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.1,
    "router_local_entropy_coef": 0.2,
    "router_global_entropy_coef": 0.3,
}


@pytest.fixture
def reduced(monkeypatch):
    return pretend_two_processes(monkeypatch)


@pytest.mark.parametrize("halves", [(slice(0, 3), slice(3, 8)), (slice(0, 8, 2), slice(1, 8, 2))])
def test_two_processes_have_the_loss_and_the_gradient_of_one(reduced, arrangement, halves):
    """In the second case, one process has only texts."""
    mine, others = reduced
    model, rows = make_model(expert_groups=arrangement, **COEFFICIENTS).train(), make_rows()
    num_items = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    expected = model(**collate(rows), num_items_in_batch=num_items)
    expected.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    sums = []
    for half in halves:  # what each process adds
        mine.clear()
        with global_batch(model):
            model(**collate(rows[half]), num_items_in_batch=torch.tensor(num_items))
        assert len(mine) == 2  # the sums of all layers, and the number of targets
        sums.append(list(mine))
    total = 0.0
    for half, of_other in zip(halves, reversed(sums)):
        others[:] = of_other
        with global_batch(model):
            outputs = model(**collate(rows[half]), num_items_in_batch=torch.tensor(num_items))
        for name in ("aux_loss", "z_loss", "router_loss", "aux_loss_by_modality"):
            torch.testing.assert_close(outputs[name], expected[name], msg=name)
        total += outputs.loss.item()
        outputs.loss.backward()
    assert total == pytest.approx(expected.loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


def test_the_trainer_computes_the_loss_of_all_processes(tmp_path, reduced):
    """The other process has as many tokens, which are routed in the same way, and as many targets."""
    mine, others = reduced
    model, rows = make_model(**COEFFICIENTS).train(), make_rows(2)
    trainer = SparseMoeTrainer(model, TrainingArguments(str(tmp_path), **QUIET_TRAINING))
    num_items = torch.tensor(2 * sum(int((row["labels"][1:] != -100).sum()) for row in rows))
    expected = model(**collate(rows), num_items_in_batch=num_items)
    assert mine == []
    trainer.compute_loss(model, collate(rows), num_items_in_batch=num_items)
    assert len(mine) == 2  # the sums of all layers, and the number of targets
    others[:] = list(mine)
    loss, outputs = trainer.compute_loss(model, collate(rows), return_outputs=True, num_items_in_batch=num_items)
    torch.testing.assert_close(outputs.router_loss, expected.router_loss)
    torch.testing.assert_close(loss, expected.loss)
    trainer.compute_loss(model.eval(), collate(rows), num_items_in_batch=num_items)
    assert len(mine) == 4


def test_weights_without_a_number_of_targets(reduced):
    """Data parallelism averages the gradients of the processes, so each has twice its part."""
    labels, loss = torch.ones(1, 4), torch.tensor(3.0, requires_grad=True)
    with losses.router_losses_over_processes():
        weighted = losses.weighted_router_loss(loss, labels, None)
    weighted.backward()
    assert (weighted.item(), loss.grad.item()) == (3.0, 2.0)
    assert losses.weighted_router_loss(loss, labels, None).item() == 3.0
    assert losses.weighted_router_loss(loss, labels, 12).item() == 0.75
    assert reduced[0] == []


def test_only_training_in_several_processes_is_over_processes(reduced, monkeypatch):
    model = make_model()
    for is_training, are_several, expected in ((True, True, True), (False, True, False), (True, False, False)):
        monkeypatch.setattr(module, "is_one_of_several_processes", lambda several=are_several: several)
        with global_batch(model.train(is_training)):
            assert losses._is_over_processes is expected
        assert losses._is_over_processes is False
    with losses.router_losses_over_processes(), losses.router_losses_over_processes(False):
        assert losses._is_over_processes is False


def test_the_code_of_a_checkpoint_is_found(reduced, monkeypatch):
    """The code of a checkpoint has its own module `losses`."""
    model = make_model().train()
    remote = type(sys)("remote.losses")
    remote.router_losses_over_processes = losses.router_losses_over_processes
    monkeypatch.setitem(sys.modules, "remote.losses", remote)
    assert module._loss_modules(model) == [losses]
    monkeypatch.setattr(type(model), "__module__", "remote.modeling")
    assert module._loss_modules(model) == [losses, remote]
