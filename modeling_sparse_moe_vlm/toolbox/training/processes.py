"""Coordinates the processes of a training program. Only the first reports progress, evaluates and writes files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

from ...registered.staged_saves import put_in_place


def make_arguments(folder: Path, **training: Any) -> TrainingArguments:
    """
    Makes the arguments of a training, which initialises the group of processes.

    Args:
        folder (`Path`):
            Folder for the checkpoints.
        **training:
            Arguments of [`~transformers.TrainingArguments`].

    Returns:
        `TrainingArguments`: The arguments.

    Raises:
        ValueError: If an argument is invalid.
    """
    # A resumed run continues to count the evaluations without an improvement, for early stopping.
    training = {"restore_callback_states_from_checkpoint": True} | training
    return TrainingArguments(output_dir=str(folder), remove_unused_columns=False, **training)


def start_processes(output_dir: Path, arguments: TrainingArguments) -> None:
    """Creates the folder for all outputs, disables the progress bars of all processes but one, and sets the seed."""
    output_dir.mkdir(parents=True, exist_ok=True)
    silence_others(arguments)
    set_seed(arguments.seed)


def silence_others(arguments: TrainingArguments) -> None:
    """
    Disables the progress bars of every process except the first.

    Args:
        arguments (`TrainingArguments`):
            Arguments of the training, which contain the number of this process.
    """
    if arguments.process_index != 0:
        disable_progress_bars()
        logging.disable_progress_bar()


def save_and_part(trainer: Trainer, folder: Path) -> bool:
    """
    Saves the complete trained model, even if it is sharded over processes, and ends the group of processes. The first
    process can then continue for as long as it needs, and the others do not wait for it. All processes must call this
    function. An older model stays in the folder until the new model is completely written.

    Args:
        trainer (`Trainer`):
            The trainer, after training.
        folder (`Path`):
            Folder for the model (or adapter) and the processor of the trainer.

    Returns:
        `bool`: Whether this process is the first. The others have nothing left to do. With several processes, the
        trainer's model may be only a part of the trained model, which can be loaded from the folder.
    """
    stage = _write(trainer, folder)
    is_first = part(trainer)
    if is_first:
        _put_in_place(stage, folder)
    return is_first


def save_complete(trainer: Trainer, folder: Path) -> None:
    """
    Saves the complete trained model, even if it is sharded over processes. All processes must call this function. An
    older model stays in the folder until the new model is completely written.

    Args:
        trainer (`Trainer`):
            The trainer, after training.
        folder (`Path`):
            Folder for the model (or adapter) and the processor of the trainer.
    """
    stage = _write(trainer, folder)
    if trainer.is_world_process_zero():
        _put_in_place(stage, folder)
    trainer.accelerator.wait_for_everyone()


def _write(trainer: Trainer, folder: Path) -> Path:
    """Writes the model to a folder beside its final one, and returns that folder when all processes are done."""
    stage = folder.parent / f".{folder.name}.saving"  # the same in all processes
    if trainer.is_world_process_zero():
        stage.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(stage, ignore_errors=True)  # left by an interrupted save
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(stage))
    trainer.accelerator.wait_for_everyone()  # ending the group would interrupt processes that still receive data
    return stage


def _put_in_place(stage: Path, folder: Path) -> None:
    (stage / TRAINING_ARGS_NAME).unlink()  # a pickle with paths of this machine, which no model needs
    put_in_place(stage, folder, outdated=["README.md"])  # the card of an older model


def part(trainer: Trainer) -> bool:
    """
    Ends the group of processes. All processes must call this function.

    Returns:
        `bool`: Whether this process is the first. The others have nothing left to do.
    """
    is_first = trainer.is_world_process_zero()
    trainer.accelerator.end_training()
    return is_first
