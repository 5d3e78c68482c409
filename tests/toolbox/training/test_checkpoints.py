"""An interrupted training resumes from the newest complete checkpoint."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.distributed import checkpoint as distributed_checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer
from modeling_sparse_moe_vlm.toolbox.training.checkpoints import last_whole_checkpoint
from tests.integration.test_trainer import make_rows
from tests.support.batches import collate
from tests.support.models import QUIET_TRAINING, make_model
from tests.support.processors import make_processor

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MODEL = ("config.json", "model.safetensors")
STATE = ("optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")


def make_arguments(folder: Path, **arguments) -> TrainingArguments:
    return TrainingArguments(str(folder), **QUIET_TRAINING, max_steps=2, save_steps=1, **arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """Runs with a checkpoint after each of two steps: of a model with its processor, and of an adapter."""
    folders = {}
    for kind in ("model", "adapter"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        model, processor = make_model(), make_processor()
        if kind == "adapter":
            model, processor = get_peft_model(model, expert_lora_config(model, r=2)), None
        Trainer(model, make_arguments(folders[kind]), collate, make_rows(4), processing_class=processor).train()
    return folders


@pytest.fixture(params=["model", "adapter"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def run(trained, kind, tmp_path) -> Path:
    shutil.copytree(trained[kind], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)

    def take() -> str:
        text = "\n".join(record.getMessage() for record in caplog.records if "incomplete" in record.getMessage())
        caplog.clear()
        return text

    return take


def test_the_newest_checkpoint_has_the_highest_number(run, warnings):
    assert last_whole_checkpoint(make_arguments(run)) == str(run / "checkpoint-2")
    (run / "checkpoint-1").rename(run / "checkpoint-10")
    (run / "checkpoint-final").mkdir()
    (run / "my-checkpoint-99").mkdir()
    (run / "checkpoint-11").write_text("not a folder")
    assert last_whole_checkpoint(make_arguments(run)) == str(run / "checkpoint-10")
    assert warnings() == ""


def test_every_needed_file_must_exist(run, kind, warnings):
    newest, needed = run / "checkpoint-2", set(STATE) | set(MODEL if kind == "model" else ADAPTER)
    files = {path.name for path in newest.iterdir()}
    assert needed <= files
    for name in sorted(files):
        (newest / name).rename(run / "kept")
        used = last_whole_checkpoint(make_arguments(run))
        said = warnings()
        if name in needed:
            assert used == str(run / "checkpoint-1"), name
            assert f"The checkpoint {newest} is incomplete: {newest / name} is missing" in said
            assert said.endswith(f"The training resumes from {run / 'checkpoint-1'}.")
        else:
            assert (used, said) == (str(newest), ""), name
        (run / "kept").rename(newest / name)
    assert last_whole_checkpoint(make_arguments(run)) == str(newest)


def test_truncated_files(run, warnings):
    newest = run / "checkpoint-2"
    formats = (".json", ".safetensors", ".pt", ".pth", ".bin")
    checked = [path for path in sorted(newest.iterdir()) if path.suffix in formats]
    assert len(checked) >= 7
    for path in checked:
        content = path.read_bytes()
        for kept in (0, len(content) // 2, len(content) - 2):
            path.write_bytes(content[:kept])
            assert last_whole_checkpoint(make_arguments(run)) == str(run / "checkpoint-1"), (path.name, kept)
            said = warnings()
            assert f"is incomplete: {path} is incomplete" in said, said
            assert "download" not in said
        path.write_bytes(content)


def test_checkpoints_without_an_optimizer(run, warnings):
    """They are complete with `save_only_model`. Otherwise, `Trainer` would silently start with a new optimizer."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (run / "checkpoint-2" / name).unlink()
    assert last_whole_checkpoint(make_arguments(run, save_only_model=True)) == str(run / "checkpoint-2")
    assert last_whole_checkpoint(make_arguments(run)) == str(run / "checkpoint-1")
    (run / "checkpoint-1" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .*run to resume from: start without resuming\.") as error:
        last_whole_checkpoint(make_arguments(run))
    assert f"The checkpoint {run / 'checkpoint-2'} is incomplete" in str(error.value)
    assert f"The checkpoint {run / 'checkpoint-1'} is incomplete: {run / 'checkpoint-1/optimizer.pt'}" in str(
        error.value
    )


def test_no_checkpoints(tmp_path):
    for folder in (tmp_path, tmp_path / "not there"):
        with pytest.raises(ValueError, match=r"start without resuming\.$"):
            last_whole_checkpoint(make_arguments(folder))


def test_only_the_first_process_warns(run, warnings, monkeypatch):
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    assert last_whole_checkpoint(make_arguments(run)) == str(run / "checkpoint-1")
    assert warnings() == ""


@pytest.mark.parametrize("kind", ["model"], indirect=True)
def test_weights_in_several_files(run, warnings):
    newest = run / "checkpoint-2"
    (newest / "model.safetensors").unlink()
    make_model().save_pretrained(newest, max_shard_size="50KB")
    assert last_whole_checkpoint(make_arguments(run)) == str(newest)
    for path in sorted(newest.glob("model[-.]*")):
        path.rename(run / "kept")
        assert last_whole_checkpoint(make_arguments(run)) == str(run / "checkpoint-1"), path.name
        assert f"{newest / ('model.safetensors' if 'index' in path.name else path.name)} is missing" in warnings()
        (run / "kept").rename(path)
    index = newest / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["absent.weight"] = sorted(newest.glob("model[-.]*"))[0].name
    index.write_text(json.dumps(listed))
    assert last_whole_checkpoint(make_arguments(run)) == str(run / "checkpoint-1")
    assert "lacks the tensor 'absent.weight'" in warnings()


@pytest.mark.parametrize("kind", ["adapter"], indirect=True)
def test_several_adapters(run, warnings):
    newest = run / "checkpoint-2"
    (newest / "other").mkdir()
    for name in ADAPTER:
        shutil.copy(newest / name, newest / "other" / name)
    assert last_whole_checkpoint(make_arguments(run)) == str(newest)
    for name in ADAPTER:  # also if every adapter has its own folder
        (newest / name).unlink()
    assert last_whole_checkpoint(make_arguments(run)) == str(newest)
    (newest / "other" / "adapter_config.json").unlink()
    assert last_whole_checkpoint(make_arguments(run)) == str(run / "checkpoint-1")
    assert f"{newest / 'other/adapter_config.json'} is missing" in warnings()


@pytest.mark.parametrize("kind", ["model"], indirect=True)
def test_states_of_several_processes(run, warnings):
    newest = run / "checkpoint-2"
    state = newest / "rng_state.pth"
    for rank in range(2):
        shutil.copy(state, newest / f"rng_state_{rank}.pth")
    state.unlink()
    assert last_whole_checkpoint(make_arguments(run)) == str(newest)
    (newest / "rng_state_1.pth").write_bytes(b"PK")
    assert last_whole_checkpoint(make_arguments(run)) == str(run / "checkpoint-1")
    assert f"{newest / 'rng_state_1.pth'} is incomplete" in warnings()
    (newest / "rng_state_1.pth").unlink()
    (newest / "rng_state_0.pth").unlink()
    assert last_whole_checkpoint(make_arguments(run)) == str(run / "checkpoint-1")


@pytest.mark.parametrize("kind", ["model"], indirect=True)
def test_sharded_states(run, warnings):
    """FSDP writes folders with distributed checkpoints of torch, or one file with another suffix."""
    newest = run / "checkpoint-2"
    (newest / "optimizer.pt").rename(newest / "optimizer.bin")
    assert last_whole_checkpoint(make_arguments(run)) == str(newest)
    (newest / "optimizer.bin").unlink()
    (newest / "model.safetensors").rename(run / "kept")
    for name in ("optimizer_0", "pytorch_model_fsdp_0"):
        state = {"weight": torch.randn(50), "other": torch.randn(20)}
        distributed_checkpoint.save(state, checkpoint_id=newest / name, no_dist=True)
    assert last_whole_checkpoint(make_arguments(run)) == str(newest)
    for name in ("optimizer_0", "pytorch_model_fsdp_0"):
        files = sorted((newest / name).iterdir())
        assert {path.suffix for path in files} == {"", ".distcp"}
        for path in files:
            content = path.read_bytes()
            path.unlink()
            assert last_whole_checkpoint(make_arguments(run)) == str(run / "checkpoint-1"), path
            assert f"{path} is missing" in warnings()
            path.write_bytes(content[:-1])
            assert last_whole_checkpoint(make_arguments(run)) == str(run / "checkpoint-1"), path
            assert f"{path} is incomplete" in warnings()
            path.write_bytes(content)
    shutil.rmtree(newest / "pytorch_model_fsdp_0")
    assert last_whole_checkpoint(make_arguments(run)) == str(run / "checkpoint-1")


@pytest.mark.parametrize("kind", ["model"], indirect=True)
def test_deepspeed(run, warnings):
    newest = run / "checkpoint-2"
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (newest / name).unlink()
    (newest / "latest").write_text("global_step2\n")
    assert last_whole_checkpoint(make_arguments(run)) == str(run / "checkpoint-1")
    assert f"{newest / 'global_step2'} is missing" in warnings()
    (newest / "global_step2").mkdir()
    assert last_whole_checkpoint(make_arguments(run)) == str(newest)
    (newest / "global_step2" / "mp_rank_00_model_states.pt").write_bytes(b"PK")
    assert last_whole_checkpoint(make_arguments(run)) == str(run / "checkpoint-1")


@pytest.mark.parametrize("kind", ["model"], indirect=True)
def test_the_training_resumes(run):
    os.truncate(run / "checkpoint-2" / "optimizer.pt", 1000)
    arguments = make_arguments(run)
    trainer = Trainer(make_model(seed=3), arguments, collate, make_rows(4))
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(arguments))
    assert trainer.state.global_step == 2
    assert last_whole_checkpoint(arguments) == str(run / "checkpoint-2")


class Starts(TrainerCallback):
    """Records the step from which a training resumes."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


@pytest.mark.parametrize(("resume", "step"), [(True, 1), (False, 0), (None, 0), ("checkpoint-1", 1)])
def test_the_trainer_resumes_from_the_newest_complete_checkpoint(trained, tmp_path, resume, step):
    run = shutil.copytree(trained["model"], tmp_path / "run")
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    starts = Starts()
    trainer = SparseMoeTrainer(make_model(), make_arguments(run), collate, make_rows(4), callbacks=[starts])
    trainer.train(str(run / resume) if isinstance(resume, str) else resume)
    assert starts.step == step
    assert trainer.state.global_step == 2


def test_the_trainer_fails_if_there_is_no_checkpoint_to_resume_from(tmp_path):
    trainer = SparseMoeTrainer(make_model(), make_arguments(tmp_path), collate, make_rows(4))
    with pytest.raises(ValueError, match=r"There is no checkpoint in .* to resume from"):
        trainer.train(resume_from_checkpoint=True)
