"""Whenever a save is interrupted, the folder contains the complete old or new model, and all unrelated files."""

import errno
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from transformers.trainer import TRAINING_ARGS_NAME

from modeling_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.registered import staged_saves
from modeling_sparse_moe_vlm.registered.staged_saves import put_in_place, staged_folder
from modeling_sparse_moe_vlm.toolbox.training.processes import save_and_part
from tests.support.models import make_config, make_model
from tests.support.processors import make_processor

pytestmark = pytest.mark.newest

linux = pytest.mark.skipif(sys.platform != "linux", reason="counts the system calls of Linux")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.fixture(params=["exchange", "move"])
def way(request, monkeypatch) -> str:
    """The way in which files are moved into place, on systems that can exchange two folders and on others."""
    if request.param == "move":

        def fail(*_):
            raise OSError(errno.EINVAL, "no such call")

        monkeypatch.setattr(staged_saves, "_swap", fail)
    return request.param


def test_folders_are_exchanged_in_one_step(tmp_path):
    one, other = write(tmp_path / "one", a="1"), write(tmp_path / "other", b="2")
    staged_saves._swap(os.fsencode(one), os.fsencode(other))
    assert (contents(one), contents(other)) == ({"b": b"2"}, {"a": b"1"})
    with pytest.raises(OSError, match="cannot be exchanged"):
        staged_saves._swap(os.fsencode(one), os.fsencode(tmp_path / "absent"))


def test_files_that_stay_and_files_that_are_removed(way, tmp_path):
    old = {"model__safetensors": "old", "config__json": "old", "README__md": "card", "notes__txt": "mine"}
    folder = write(tmp_path / "model", **old)
    write(folder / "checkpoint-1" / "deep", model__safetensors="of a checkpoint")
    write(folder, **{"model-00001-of-00002__safetensors": "old", "model__safetensors__index__json": "old"})
    write(folder, model__fp16__safetensors="another variant", other__safetensors="another file")
    os.symlink("notes.txt", folder / "link")
    os.symlink("checkpoint-1", folder / "link-to-folder")
    (folder / "notes.txt").chmod(0o640)
    folder.chmod(0o750)
    stage = write(tmp_path / "stage", config__json="new", **{"model-00001-of-00003__safetensors": "new"})
    write(stage / "adapter", adapter_config__json="new")
    put_in_place(stage, folder, outdated=["README.md", "absent"])
    assert contents(folder) == {
        "config.json": b"new",
        "model-00001-of-00003.safetensors": b"new",
        "adapter/adapter_config.json": b"new",
        "notes.txt": b"mine",
        "link": b"mine",
        "checkpoint-1/deep/model.safetensors": b"of a checkpoint",
        "model.fp16.safetensors": b"another variant",
        "other.safetensors": b"another file",
    } | ({"link-to-folder/deep/model.safetensors": b"of a checkpoint"} if sys.version_info >= (3, 13) else {})
    assert (os.readlink(folder / "link"), os.readlink(folder / "link-to-folder")) == ("notes.txt", "checkpoint-1")
    assert (folder.stat().st_mode & 0o777, (folder / "notes.txt").stat().st_mode & 0o777) == (0o750, 0o640)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.safetensors", "model"),
        ("model-00001-of-00002.safetensors", "model"),
        ("model.safetensors.index.json", "model"),
        ("model.fp16.safetensors", "model.fp16"),
        ("model.fp16-00002-of-00002.safetensors", "model.fp16"),
        ("model.safetensors.index.fp16.json", "model.fp16"),
        ("adapter_model.safetensors", "adapter_model"),
        ("config.json", None),
        ("model.safetensors.txt", None),
        ("safetensors", None),
    ],
)
def test_kinds_of_weights(name, kind):
    assert staged_saves._kind_of_weights(name) == kind


def test_the_working_directory_stays_the_same_folder(tmp_path, monkeypatch):
    for inner in (".", "inner"):
        folder = write(tmp_path / "model", config__json="old")
        (folder / "inner").mkdir(exist_ok=True)
        monkeypatch.chdir(folder / inner)
        inode = folder.stat().st_ino
        put_in_place(write(tmp_path / "stage", config__json="new"), folder)
        assert folder.stat().st_ino == inode
        assert (folder / "config.json").read_text() == "new"
        Path("works.txt").write_text("still")
    monkeypatch.chdir(tmp_path)
    put_in_place(write(tmp_path / "stage", config__json="newest"), folder, exchange=False)
    assert folder.stat().st_ino == inode
    put_in_place(write(tmp_path / "stage", config__json="last"), folder)
    assert folder.stat().st_ino != inode
    assert (folder / "config.json").read_text() == "last"


def test_folders_without_hard_links_keep_their_files(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", fail)
    folder = write(tmp_path / "model", config__json="old", notes__txt="mine")
    put_in_place(write(tmp_path / "stage", config__json="new"), folder)
    assert contents(folder) == {"config.json": b"new", "notes.txt": b"mine"}


def test_a_folder_whose_parent_cannot_be_written_to(tmp_path, monkeypatch):
    folder = write(tmp_path / "model", config__json="old", notes__txt="mine")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with staged_folder(folder) as stage:
        assert stage.parent == folder
        write(stage, config__json="new")
    assert contents(folder) == {"config.json": b"new", "notes.txt": b"mine"}


def test_links_to_folders_are_kept(tmp_path):
    folder = write(tmp_path / "elsewhere" / "real", config__json="old")
    os.symlink(folder, tmp_path / "model")
    with staged_folder(tmp_path / "model") as stage:
        assert stage.parent == folder.parent
        write(stage, config__json="new")
    assert (tmp_path / "model").is_symlink()
    assert contents(folder) == {"config.json": b"new"}


def test_files_of_killed_processes_are_removed(tmp_path):
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    for owner in (process, os.getpid(), os.getppid()):
        write(tmp_path / f".model.saving-{owner}-x", config__json="staged")
    write(tmp_path / f"..model.saving-{process}-x.saving-{process}-y", config__json="a stage of a stage")
    write(tmp_path / f".other.saving-{process}-x", config__json="staged")
    write(tmp_path / ".model.saving-notes", config__json="mine")
    with staged_folder(tmp_path / "model") as stage:
        assert stage.name.startswith(f".model.saving-{os.getpid()}-")
    kept = {f".model.saving-{os.getpid()}-x", f".model.saving-{os.getppid()}-x", ".model.saving-notes"}
    assert {path.name for path in tmp_path.iterdir()} == {*kept, f".other.saving-{process}-x", "model"}


# ------------------------------------------------------------------------------------------------ models


def fail_at(number: int, monkeypatch):
    """Simulates a full disk after this number of files."""
    written = []

    def save_file(*args, **kwargs):
        if len(written) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(args)
        return safetensors.torch.save_file(*args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save_file)


@pytest.mark.parametrize("number", [0, 2])
def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch, number):
    make_model(seed=0).save_pretrained(tmp_path / "model", max_shard_size="50KB")
    before = contents(tmp_path / "model")
    fail_at(number, monkeypatch)
    for folder in ("model", "new"):
        with pytest.raises(OSError, match="No space left"):
            make_model(seed=1).save_pretrained(tmp_path / folder, max_shard_size="50KB")
    assert contents(tmp_path / "model") == before
    assert contents(tmp_path / "new") == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]
    SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(("first", "second"), [("1GB", "50KB"), ("50KB", "1GB"), ("50KB", "80KB")])
def test_weights_of_an_older_model_are_removed(way, tmp_path, first, second):
    """Transformers keeps an old single file beside the new shards, and would load the old file."""
    make_model(seed=0).save_pretrained(tmp_path / "model", max_shard_size=first)
    (tmp_path / "model" / "notes.txt").write_text("mine")
    make_model(seed=1).save_pretrained(tmp_path / "model", max_shard_size=second)
    make_model(seed=1).save_pretrained(tmp_path / "alone", max_shard_size=second)
    assert contents(tmp_path / "model") == contents(tmp_path / "alone") | {"notes.txt": b"mine"}
    loaded = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.lm_head.weight, make_model(seed=1).lm_head.weight)


def test_arguments_by_position_and_by_name(tmp_path, monkeypatch):
    """Models that are uploaded, or saved by several processes, are written to the folder directly."""
    calls = []

    def save(
        self,
        save_directory,
        is_main_process=True,
        state_dict=None,
        push_to_hub=False,
        distributed_checkpoint=False,
        **kwargs,
    ):
        calls.append((Path(save_directory), push_to_hub, distributed_checkpoint, kwargs))

    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.save_pretrained", save)
    model, folder = make_model(), tmp_path / "a"
    model.save_pretrained(save_directory=folder, push_to_hub=False, variant="fp16")
    model.save_pretrained(folder, True, None, True)
    model.save_pretrained(folder, push_to_hub=True, repo_id="team/model")
    model.save_pretrained(folder, distributed_checkpoint=True)
    (tmp_path / "file").write_text("in the way")
    model.save_pretrained(tmp_path / "file")
    assert calls[0][0].name.startswith(".a.saving-")
    assert calls[0][1:] == (False, False, {"variant": "fp16"})
    assert calls[1:] == [
        (folder, True, False, {}),
        (folder, True, False, {"repo_id": "team/model"}),
        (folder, False, True, {}),
        (tmp_path / "file", False, False, {}),
    ]


def test_the_code_is_that_of_the_model_even_if_the_configuration_has_other_code(tmp_path):
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    make_model().save_pretrained(tmp_path / "changed")
    head = tmp_path / "changed" / "language_head.py"
    head.write_text(head.read_text() + "\n# changed\n")
    name = "modeling_sparse_moe_vlm.SparseMoeVlmForConditionalGeneration"
    own = get_class_from_dynamic_module(name, tmp_path / "changed")
    own(make_config()).save_pretrained(tmp_path / "again")  # a configuration of the package
    assert (tmp_path / "again" / "language_head.py").read_text().endswith("# changed\n")


# ------------------------------------------------------------------------------------------------ kills

FILE_EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.chmod",
    "os.utime",
    "ctypes.dlsym",
}


class EndAtStep:
    """Ends the process before a change of the file system, which is given by its index."""

    def __init__(self, step: int):
        self.left = step

    def __call__(self, event: str, arguments: tuple) -> None:
        if event in FILE_EVENTS or (event == "open" and set(str(arguments[1])) & set("wax+")):
            if self.left == 0:
                os._exit(9)
            self.left -= 1


def states_after_kills(folder: Path, save) -> tuple[list[dict[str, bytes]], int]:
    """
    Saves to a folder in processes that are killed before their first, second, … change of the file system, until one
    is not killed. Returns the contents of the folder after each.
    """
    kept, states = contents(folder), []
    names = [path.name for path in folder.parent.iterdir()]
    for step in range(10_000):
        process = os.fork()
        if process == 0:
            try:
                torch.set_num_threads(1)
                sys.addaudithook(EndAtStep(step))
                save()
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert status in (0, 9)
        states.append(contents(folder))
        if status == 0:
            assert [path.name for path in folder.parent.iterdir()] == names, "something was left beside the folder"
            return states, step
        if states[-1] != kept:  # the next process starts with the old model again
            for name in contents(folder):
                (folder / name).unlink()
            for name, content in kept.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
    raise AssertionError("the save never ends")


@linux
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_killed_save_leaves_the_old_model_or_the_new_one(tmp_path, monkeypatch):
    for part in (SparseMoeVlmForConditionalGeneration, SparseMoeVlmConfig):
        monkeypatch.setattr(part, "_auto_class", None)  # without the files of the code, for speed
    folder = tmp_path / "model"
    make_model(seed=0).save_pretrained(folder, max_shard_size="100KB")
    (folder / "notes.txt").write_text("mine")
    old, model = contents(folder), make_model(seed=1, vocab_size=100)
    states, num_steps = states_after_kills(folder, lambda: model.save_pretrained(folder))
    new = states[-1]
    assert num_steps > 12
    assert new["model.safetensors"] != old.get("model.safetensors")
    assert json.loads(new["config.json"])["text_config"]["vocab_size"] == 100
    assert all(state in (old, new) for state in states)
    assert states[0] == old
    assert states.count(new) > 3, "what is removed comes after the new model is there"


class FakeTrainer:
    """Has the methods of a trainer that `save_and_part` uses. It writes the files one by one."""

    def __init__(self, files: dict[str, str], is_first: bool = True):
        self.files, self.is_first, self.waits = files, is_first, 0
        self.accelerator = SimpleNamespace(wait_for_everyone=self.wait, end_training=self.wait)

    def wait(self):
        self.waits += 1

    def is_world_process_zero(self) -> bool:
        return self.is_first

    def save_model(self, folder: str):
        assert self.waits == 1, "another process may still remove what an interrupted save left"
        if self.is_first:
            write(Path(folder), **self.files)


OLD = {
    "model__safetensors": "old",
    "tokenizer__json": "old",
    "config__json": "old",
    "README__md": "card of the old one",
}
NEW = {"model__safetensors": "new", "tokenizer__json": "new", "config__json": "new", TRAINING_ARGS_NAME: "paths"}


@linux
@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_killed_final_save_leaves_the_old_files_or_the_new_ones(tmp_path, kind):
    def named(files: dict[str, str]) -> dict[str, str]:
        return {name.replace("model__", f"{kind}_model__"): text for name, text in files.items()}

    folder = write(tmp_path / kind, notes__txt="mine", **named(OLD))
    old = contents(folder)
    states, num_steps = states_after_kills(folder, lambda: save_and_part(FakeTrainer(named(NEW)), folder))
    assert num_steps > 10
    new = {"config.json": b"new", "tokenizer.json": b"new", f"{kind}_model.safetensors": b"new", "notes.txt": b"mine"}
    assert states[-1] == new
    assert all(state in (old, new) for state in states)
    assert states.count(new) > 2
    assert states.count(old) > 8


@linux
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_if_folders_cannot_be_exchanged_no_mixture_can_be_loaded(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EINVAL, "no such call")

    monkeypatch.setattr(staged_saves, "_swap", fail)
    folder = write(tmp_path / "model", **OLD)
    write(folder, **{"model-00001-of-00002__safetensors": "old", "model__safetensors__index__json": "old"})
    files = NEW | {"model-00001-of-00001__safetensors": "new", "model__safetensors__index__json": "new"}
    del files["model__safetensors"]
    states, _ = states_after_kills(folder, lambda: save_and_part(FakeTrainer(files), folder))
    for state in states:
        weights = {content for name, content in state.items() if "safetensors" in name}
        others = {content for name, content in state.items() if name in ("config.json", "tokenizer.json")}
        assert len(weights) <= 1, state
        if weights == {b"new"}:
            assert others == {b"new"}, state
        if others != {b"old"}:
            assert weights <= {b"new"}, state
        if "model.safetensors.index.json" in state and weights == {b"new"}:
            assert "model-00001-of-00001.safetensors" in state


def test_only_the_first_process_moves_files_into_place(tmp_path):
    folder = write(tmp_path / "model", **OLD)
    old = contents(folder)
    other = FakeTrainer(NEW, is_first=False)
    write(tmp_path / ".model.saving", config__json="of the first process")
    assert save_and_part(other, folder) is False
    assert contents(folder) == old
    assert (tmp_path / ".model.saving" / "config.json").read_text() == "of the first process"
    assert other.waits == 3
    first = FakeTrainer(NEW)
    write(tmp_path / ".model.saving", left__json="by an interrupted save")
    assert save_and_part(first, folder) is True
    assert contents(folder) == {"model.safetensors": b"new", "config.json": b"new", "tokenizer.json": b"new"}
    assert first.waits == 3
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_final_save_that_fails_leaves_the_old_model(tmp_path):
    folder = write(tmp_path / "model", **OLD)
    old = contents(folder)
    trainer = FakeTrainer(NEW)

    def fail(path):
        write(Path(path), config__json="new")
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer.save_model = fail
    with pytest.raises(OSError, match="No space left"):
        save_and_part(trainer, folder)
    assert contents(folder) == old


def test_processors_come_with_the_model(tmp_path):
    """Tests the final save of a real model and processor over older ones."""
    make_processor().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    make_model(seed=0).save_pretrained(tmp_path / "model")
    trainer = FakeTrainer({})

    def save(path):
        make_model(seed=1).save_pretrained(path)
        make_processor().save_pretrained(path)
        (Path(path) / TRAINING_ARGS_NAME).write_bytes(b"")

    trainer.save_model = save
    assert save_and_part(trainer, tmp_path / "model")
    save(tmp_path / "alone")
    (tmp_path / "alone" / TRAINING_ARGS_NAME).unlink()
    assert contents(tmp_path / "model") == contents(tmp_path / "alone")
