"""Rows of a user's own data, and training on them."""

from pathlib import Path

import torch
from transformers import TrainingArguments

from modeling_sparse_moe_vlm.toolbox.data import VisionLanguageCollator, load_rows
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer
from tests.support.models import QUIET_TRAINING
from tests.support.processors import make_processor, make_speaking_model
from tests.toolbox.data.data_files import write_image, write_lines

WORDS = ["the", "cat", "and", "the", "image", "of", "the", "cat", "sat", "on", "the", "mat"]


def write_own_data(
    folder: Path, num_rows: int = 13, bad: tuple[int, ...] = (5,), without_image=None, long=(), broken=()
) -> Path:
    """
    Writes rows of unequal length to two files. Every third row has no image, or those that are named. The bad rows lack
    the file of their image, or that file is `broken`. The answers of the long rows are eight times as long.
    """
    rows = []
    for i in range(num_rows):
        path = write_image(folder / f"{i}.png", color=(20 * i % 256, 90, 255 - 15 * i % 256))
        if i in broken:
            path.write_bytes(b"not an image")
        is_text = i % 3 == 0 if without_image is None else i in without_image
        image = {} if is_text else {"image": f"../{'gone' if i in bad and i not in broken else i}.png"}
        answer = " ".join(WORDS[i % 4 : 5 + i % 3] * (8 if i in long else 1))
        rows.append({"question": " ".join(WORDS[: 2 + i % 5]), "answer": answer} | image)
    half = (num_rows + 1) // 2
    write_lines(folder / "data/0.jsonl", rows[:half])
    write_lines(folder / "data/1.jsonl", rows[half:])
    return folder / "data"


def make_trainer(
    data: Path,
    folder: Path,
    model=None,
    streaming=False,
    shuffle=True,
    prepare=None,
    packing=False,
    skipped_file=None,
    **arguments,
):
    """Returns a trainer. `prepare(model, arguments)` can change the model and return the optimizer."""
    model = make_speaking_model() if model is None else model
    rows = load_rows(data, streaming=streaming, on_bad_row="skip", skipped_file=skipped_file)
    if streaming and shuffle:
        rows = rows.shuffle(seed=7, buffer_size=5)
    defaults = {
        "max_steps": 7,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "logging_steps": 3,
        "save_steps": 2,
        **QUIET_TRAINING,
    }
    arguments = TrainingArguments(str(folder), **defaults | arguments)
    return SparseMoeTrainer(
        model,
        arguments,
        VisionLanguageCollator(make_processor(), packing=packing, model=model),
        rows,
        optimizer_cls_and_kwargs=None if prepare is None else prepare(model, arguments),
    )


# Not figures of the training.
OF_TIME = ("runtime", "per_second", "total_flos", "peak_memory")


def figures(trainer) -> list[dict]:
    """Returns everything that was logged, without times."""
    return [
        {name: value for name, value in entry.items() if not any(part in name for part in OF_TIME)}
        for entry in trainer.state.log_history
    ]


def tensors(trainer) -> dict[str, torch.Tensor]:
    """Returns copies of the tensors of the model."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
