"""What processes that run one training program together leave to the first of them: progress, evaluation, files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

from ...staged_saves import put_in_place
from .checkpoints import last_whole_checkpoint


def start_run(output_dir: Path, resume: bool, **training: Any) -> tuple[TrainingArguments, str | None]:
    """
    Starts a run in a folder: joins the processes, makes the folder and sets the seed.

    Args:
        output_dir (`Path`):
            Where the run writes everything; its checkpoints go to `checkpoints` in it.
        resume (`bool`):
            Whether the run goes on from its last whole checkpoint.
        training:
            Arguments of [`~transformers.TrainingArguments`].

    Returns:
        `tuple[TrainingArguments, str | None]`: the arguments of the training, and the checkpoint to go on from.

    Raises:
        ValueError: If an argument is not possible, or there is no checkpoint to go on from.
        OSError: If the folder cannot be made.
    """
    arguments = TrainingArguments(output_dir=str(output_dir / "checkpoints"), remove_unused_columns=False, **training)
    checkpoint = last_whole_checkpoint(arguments) if resume else None
    output_dir.mkdir(parents=True, exist_ok=True)
    silence_others(arguments)
    set_seed(arguments.seed)
    return arguments, checkpoint


def silence_others(arguments: TrainingArguments) -> None:
    """
    Switches off the progress bars of every process but the first.

    Args:
        arguments (`TrainingArguments`):
            Arguments of the training, which know the processes.
    """
    if arguments.process_index != 0:
        disable_progress_bars()
        logging.disable_progress_bar()


def save_and_part(trainer: Trainer, folder: Path) -> bool:
    """
    Saves the trained model whole, however it is spread over processes, and ends their group: the first can go on for
    as long as it takes, and none waits for it. To be called by all. The folder keeps an older model until the new one
    is written, and then has all of the new one.

    Args:
        trainer (`Trainer`):
            A trainer that is done.
        folder (`Path`):
            Where to write the model, or the adapter, and the processor that the trainer has.

    Returns:
        `bool`: whether this process is the first. The others have nothing left to do. With several processes the
        trainer's model may be only a part of the trained one, which can be read from the folder.
    """
    stage = folder.parent / f".{folder.name}.saving"  # the same in all processes
    if trainer.is_world_process_zero():
        shutil.rmtree(stage, ignore_errors=True)  # of an interrupted save
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(stage))
    trainer.accelerator.wait_for_everyone()  # the end of the group would end what another process still receives
    trainer.accelerator.end_training()
    if not trainer.is_world_process_zero():
        return False
    (stage / TRAINING_ARGS_NAME).unlink()  # a pickle with paths of this machine, which no model needs
    put_in_place(stage, folder, outdated=["README.md"])  # the card of an older model
    return True
