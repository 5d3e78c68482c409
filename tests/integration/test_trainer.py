"""Training with `Trainer`: accumulation, checkpointing and data parallelism do not change gradients and losses."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from tests.support.batches import collate
from tests.support.models import QUIET_TRAINING, make_inputs, make_model
from tests.support.processes import run_in_processes


def make_rows(number: int = 8) -> list[dict[str, torch.Tensor]]:
    """Returns rows of unequal length, every other one with an image. The first half of a row is not a target."""
    rows = []
    for seed in range(number):
        inputs = make_inputs(seed=seed, batch_size=1, length=9 + seed, images_per_row=seed % 2)
        row = {key: value[0] for key, value in inputs.items() if key != "pixel_values"}
        row["labels"] = row["input_ids"].clone()
        row["labels"][: 7 + seed // 3] = -100
        if "pixel_values" in inputs:
            row["pixel_values"] = inputs["pixel_values"]
        rows.append(row)
    return rows


class Gradients(TrainerCallback):
    """Records the gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def train(model, tmp_path, rows=None, **arguments) -> tuple[Trainer, Gradients]:
    gradients = Gradients()
    defaults = {
        "output_dir": str(tmp_path),
        **QUIET_TRAINING,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**defaults | arguments),
        train_dataset=make_rows() if rows is None else rows,
        data_collator=collate,
        callbacks=[gradients],
    )
    trainer.train()
    return trainer, gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_accumulation_changes_no_gradient(arrangement, tmp_path, checkpointing):
    """Compares a batch of 8 rows with 4 batches of 2 rows, whose numbers of targets, padding and images differ."""
    steps = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = make_model(expert_groups=arrangement)
        _, gradients = train(
            model,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=checkpointing and accumulation > 1,
        )
        assert len(gradients.steps) == 1
        steps += gradients.steps
    assert steps[0].keys() == steps[1].keys()
    for name, gradient in steps[0].items():
        torch.testing.assert_close(steps[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_router_losses_add_up_over_micro_batches(arrangement):
    """Equal micro-batches must give the router losses of one of them, not four times as much."""
    coefficients = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.5, "output_router_logits": True}
    model = make_model(expert_groups=arrangement, **coefficients).train()
    batch = collate(make_rows(4))
    num_targets = int((batch["labels"][:, 1:] != -100).sum())
    gradients, losses = [], []
    for times in (1, 4):
        model.zero_grad()
        total = 0.0
        for _ in range(times):
            loss = model(**batch, num_items_in_batch=torch.tensor(times * num_targets)).loss
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)
    # Without router losses, the loss is different.
    model.config.text_config.output_router_logits = False
    assert abs(model(**batch, num_items_in_batch=num_targets).loss.item() - losses[0]) > 0.1


def test_training_resumes_and_reloads(tmp_path):
    rows, folder = make_rows(), tmp_path / "whole"
    kept = {"per_device_train_batch_size": 4, "learning_rate": 5e-3, "save_strategy": "steps", "save_steps": 10}
    whole, gradients = train(make_model(), folder, rows, max_steps=20, logging_steps=5, **kept)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]

    # Resuming starts from another model, so everything that is not loaded stays wrong.
    resumed = Gradients()
    trainer = Trainer(
        model=make_model(seed=5), args=whole.args, train_dataset=rows, data_collator=collate, callbacks=[resumed]
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-10"))
    assert len(resumed.steps) == 10
    for name, gradient in gradients.steps[10].items():
        torch.testing.assert_close(resumed.steps[0][name], gradient, atol=1e-6, rtol=1e-4, msg=name)

    reloaded = SparseMoeVlmForConditionalGeneration.from_pretrained(folder / "checkpoint-20")
    for name, parameter in reloaded.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name)), name


def test_going_back_to_the_best_model(tmp_path):
    rows = make_rows()
    trainer = Trainer(
        model=make_model(),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            **QUIET_TRAINING,
            max_steps=4,
            learning_rate=5e-3,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            greater_is_better=True,  # so that the best model is not the last one
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(losses) > losses[-1] + 0.1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-4)


@pytest.mark.parametrize("output_router_logits", [False, True])
def test_evaluation_and_prediction(tmp_path, output_router_logits):
    """Predictions are only the logits, also if the model returns router losses and numbers of images differ."""
    model = make_model(output_router_logits=output_router_logits)
    predictions = []
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            **QUIET_TRAINING,
            per_device_eval_batch_size=5,
        ),
        eval_dataset=make_rows(),
        data_collator=collate,
        compute_metrics=lambda prediction: predictions.append(prediction) or {"seen": 1.0},
    )
    metrics = trainer.evaluate()
    rows, batches, expected = make_rows(), [], 0.0
    for batch in (collate(rows[:5]), collate(rows[5:])):
        with torch.no_grad():
            outputs = model(**batch)
        batches.append(outputs.logits)
        expected += outputs.loss.item() * len(outputs.logits) / len(rows)
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)
    logits = torch.from_numpy(predictions[0].predictions)
    assert logits.shape == (8, 16, 99)
    torch.testing.assert_close(logits[:5, : batches[0].shape[1]], batches[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[5:], batches[1], atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ several processes

DISTRIBUTED = """
import os, sys, tempfile
import os
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from tests.support.models import QUIET_TRAINING, make_model
from tests.integration.test_trainer import make_rows
from tests.support.batches import collate

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
rows = make_rows()
images, texts = rows[1::2], rows[::2]
mine = collate(images if rank == 0 else texts)
assert ("pixel_values" in mine) == (rank == 0)
whole = collate(images + texts)
num_targets = int((whole["labels"][:, 1:] != -100).sum())

for experts in ("eager", "grouped_mm", "batched_mm"):
    for arrangement in ("hybrid", "joint", "isolated"):
        # Every parameter needs a gradient, because ranks wait for each other without `find_unused_parameters`.
        model = make_model(expert_groups=arrangement).train()
        model.set_experts_implementation(experts)
        parallel = DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            parallel(**mine, num_items_in_batch=num_targets).loss.backward()
        shared = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        model(**whole, num_items_in_batch=num_targets).loss.backward()
        for name, parameter in model.named_parameters():
            # Data parallelism averages over the processes.
            torch.testing.assert_close(2 * shared[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)

trainer = Trainer(
    model=make_model(),
    args=TrainingArguments(
        output_dir=sys.argv[1],
        **QUIET_TRAINING,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        ddp_find_unused_parameters=False,
        save_strategy="no",
    ),
    # Batches alternate between the ranks, so one rank gets no images.
    train_dataset=[*images[:2], *texts[:2], *images[2:], *texts[2:]],
    data_collator=collate,
)
trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
trainer.train()
weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
gathered = [torch.zeros_like(weights) for _ in range(2)]
dist.all_gather(gathered, weights)
assert torch.equal(*gathered)
print(f"rank {rank} is done")
dist.destroy_process_group()
"""


@pytest.mark.extensive
def test_data_parallelism_with_a_rank_without_images(tmp_path):
    """Two processes do not hang, and have the gradients of one process."""
    result = run_in_processes(DISTRIBUTED, tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("is done") == 2
