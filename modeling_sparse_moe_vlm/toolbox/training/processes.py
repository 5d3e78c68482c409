"""What processes that run one training program together leave to the first of them: progress, evaluation, files."""

from __future__ import annotations

from pathlib import Path

from datasets import disable_progress_bars
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging


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
    as long as it takes, and none waits for it. To be called by all.

    Args:
        trainer (`Trainer`):
            A trainer that is done.
        folder (`Path`):
            Where to write the model, or the adapter, and the processor that the trainer has.

    Returns:
        `bool`: whether this process is the first. The others have nothing left to do. With several processes the
        trainer's model may be but a part of the trained one, which can be read from the folder.
    """
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()  # the end of the group would end what another process still receives
    trainer.accelerator.end_training()
    if not trainer.is_world_process_zero():
        return False
    (folder / TRAINING_ARGS_NAME).unlink()  # a pickle with paths of this machine, which no model needs
    return True
