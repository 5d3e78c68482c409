"""A small training run, launched in several ways, with the same result for any number of processes."""

import json
import os
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from tests.integration.test_trainer import make_rows
from tests.support.batches import collate
from tests.support.models import QUIET_TRAINING

GLOBAL_BATCH = 4


def make_global_batches() -> list[dict[str, torch.Tensor]]:
    """Returns rows in an order in which the second of two processes never gets an image."""
    rows = make_rows()
    images, texts = rows[1::2], rows[::2]
    return [*images[:2], *texts[:2], *images[2:], *texts[2:]]


def train(start: Path, folder: Path, sizes: dict | None = None, trainer_class: type[Trainer] = Trainer):
    """
    Trains the model saved in `start` for a few steps of plain gradient descent, which does not amplify rounding errors.

    Writes to the folder: the model (`model`), its tensors (`tensors.pt`), and the loss of every step (`losses.json`).
    """
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        **QUIET_TRAINING,
        max_steps=4,
        logging_steps=1,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        optim="sgd",
        save_strategy="no",
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or "tp_size" in (sizes or {}):
        # Accelerate refuses both on the CPU, unless the CPU is treated as a GPU.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    arguments.per_device_train_batch_size = GLOBAL_BATCH // (sizes or {}).get("dp", arguments.world_size)
    distributed = {k: v for k, v in (sizes or {}).items() if k != "dp"}
    config = {"distributed_config": DistributedConfig(**distributed)} if distributed else {}
    model = SparseMoeVlmForConditionalGeneration.from_pretrained(start, **config)
    trainer = trainer_class(model=model, args=arguments, train_dataset=make_global_batches(), data_collator=collate)
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    trainer.save_model(str(folder / "model"))
    tensors = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
    }
    if trainer.is_world_process_zero():
        torch.save(tensors, folder / "tensors.pt")
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / "losses.json").write_text(json.dumps(losses))
    return trainer
