"""Training of one stage of a run, of the whole model or of adapters."""

from __future__ import annotations

import time
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from .parts import train_parts
from .stages import Stage, StageFolders
from .trainer import SparseMoeTrainer


def train_stage(
    folders: StageFolders,
    number: int,
    stage: Stage,
    arguments: TrainingArguments,
    checkpoint: str | None,
    model: PreTrainedModel,
    **options: Any,
) -> SparseMoeTrainer:
    """
    Trains a model in one stage of a run, and writes the metrics of the stage.

    Args:
        folders ([`~toolbox.training.stages.StageFolders`]):
            Folders of the run.
        number (`int`):
            Number of the stage.
        stage ([`~toolbox.training.stages.Stage`]):
            The stage, whose `parts` are trained.
        arguments (`TrainingArguments`):
            Arguments of the stage.
        checkpoint (`str`, *optional*):
            Checkpoint to resume from.
        model (`PreTrainedModel`):
            The model.
        options (`Any`):
            Further arguments of [`~toolbox.training.SparseMoeTrainer`], such as the data.

    Returns:
        [`~toolbox.training.SparseMoeTrainer`]: The trainer after the training.
    """
    if arguments.process_index == 0:
        if checkpoint is None:
            folders.begin(number)
        if stage.name:
            print(f"\n{folders.title(number)}")
    optimizer = train_parts(model, stage.parts, arguments)
    start = time.time()
    trainer = SparseMoeTrainer(model=model, args=arguments, optimizer_cls_and_kwargs=optimizer, **options)
    output = trainer.train(resume_from_checkpoint=checkpoint)
    folders.write_metrics(number, trainer, output, time.time() - start)
    return trainer
