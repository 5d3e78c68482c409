"""Errors about missing memory name the rows of the batch."""

import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import Trainer, TrainingArguments

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.data import VisionLanguageCollator, load_rows
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer
from modeling_sparse_moe_vlm.toolbox.training.memory_errors import naming_rows
from tests.support.models import QUIET_TRAINING, make_config
from tests.support.processors import make_processor
from tests.toolbox.data.data_files import write_image, write_lines

CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


@pytest.fixture
def trainer(tmp_path):
    write_image(tmp_path / "a.png")
    rows = [{"question": "q", "answer": "a", "image": "a.png"}, {"question": "q", "answer": "a"}]
    data = load_rows(write_lines(tmp_path / "a.jsonl", rows))
    processor = make_processor()
    model = SparseMoeVlmForConditionalGeneration(make_config())
    arguments = TrainingArguments(str(tmp_path / "run"), **QUIET_TRAINING, max_steps=1, per_device_train_batch_size=2)
    return SparseMoeTrainer(model, arguments, VisionLanguageCollator(processor), train_dataset=data, eval_dataset=data)


def fail(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize("step", ["train", "evaluate"])
def test_the_trainer_names_the_rows(step, trainer, monkeypatch, tmp_path):
    monkeypatch.setattr(Trainer, "compute_loss", fail)
    with pytest.raises(torch.OutOfMemoryError) as error:
        getattr(trainer, step)()
    lines = str(error.value).splitlines()
    sizes = trainer.data_collator(list(trainer.train_dataset)).row_sizes
    assert lines[0] == "CUDA out of memory. Tried to allocate 2 GiB"
    for size in sizes:
        assert str(size) in lines[1]
    assert f"{tmp_path}/a.jsonl, row 0 (tokens: {sizes[0].tokens}, images: 1, image tokens: 4)" in lines[1]
    assert lines[1].startswith("The batch has 2 rows: ")
    assert "Decrease `per_device_train_batch_size`" in lines[1]
    assert should_reduce_batch_size(error.value)


def test_the_allocator_of_the_cpu_and_batches_without_names():
    """Other errors, and the types of all errors, stay as they are."""
    inputs = {"input_ids": torch.zeros(2, 3), "names": ["a"]}
    with pytest.raises(RuntimeError) as error, naming_rows(inputs):
        raise RuntimeError(f"{CPU} 99 bytes.")
    assert type(error.value) is RuntimeError
    assert str(error.value).startswith(f"{CPU} 99 bytes.\nThe batch: {{'input_ids': (2, 3)}}. Decrease `per_device")
    for other in (RuntimeError("shapes"), ValueError("out of memory."), NotImplementedError("no")):
        message = str(other)
        with pytest.raises(type(other)) as error, naming_rows(inputs):
            raise other
        assert error.value is other
        assert str(other) == message
    with naming_rows(inputs):
        pass
