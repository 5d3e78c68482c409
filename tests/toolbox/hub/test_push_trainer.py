"""`SparseMoeTrainer` uploads the same files as `push_checkpoint`, at the end and during training."""

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config
from modeling_sparse_moe_vlm.toolbox.hub import PushError, plan_push
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer
from tests.support.hub_client import hub, lfs  # noqa: F401
from tests.support.hub_server import TOKEN, Fault
from tests.support.models import QUIET_TRAINING
from tests.support.processors import make_processor, make_speaking_model

TRAINING = "Training in progress, step {} (sparse-moe-vlm)"


def make_trainer(folder, model=None, processor=True, trainer_class=SparseMoeTrainer, **arguments):
    row = {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([5, 6, 7])}
    arguments = {
        **QUIET_TRAINING,
        "output_dir": str(folder),
        "max_steps": 2,
        "hub_model_id": "user/model",
        "hub_token": TOKEN,
        "per_device_train_batch_size": 1,
    } | arguments
    return trainer_class(
        model=model or make_speaking_model(),
        args=TrainingArguments(**arguments),
        train_dataset=[row, row],
        processing_class=make_processor() if processor else None,
    )


def contents(plan):
    return {
        name: file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        for name, file in plan.files.items()
    }


def test_at_the_end(hub, lfs, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.delenv("HF_TOKEN")
    trainer = make_trainer(tmp_path / "run", hub_private_repo=True, hub_revision="v2")
    trainer.train()
    info = trainer.push_to_hub()
    repository = hub.repository("user/model")
    assert repository.is_private
    assert repository.files("main") == {}
    assert repository.files("v2") == contents(plan_push(tmp_path / "run", "user/model"))
    assert {"modeling_sparse_moe_vlm.py", "processor_config.json", "model.safetensors"} <= repository.files("v2").keys()
    assert not [name for name in repository.files("v2") if name.endswith((".bin", ".pt"))]
    assert (tmp_path / "run/training_args.bin").exists()
    assert info.oid == repository.refs["v2"]
    assert repository.history("v2")[0].title == "End of training (sparse-moe-vlm)"
    assert trainer.push_to_hub("Again", blocking=False).result().oid == info.oid


def test_a_name_without_a_user(hub, lfs, tmp_path):  # noqa: F811
    make_trainer(tmp_path / "run", hub_model_id=None).push_to_hub(private=True)
    assert "model.safetensors" in hub.repository("user/run").files()
    assert hub.repository("user/run").is_private


def test_during_training(hub, lfs, tmp_path):  # noqa: F811
    options = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = make_trainer(tmp_path / "run", hub_always_push=True, **options)
    trainer.train()
    repository = hub.repository("user/model")
    titles = [commit.title for commit in repository.history()]
    assert titles == [TRAINING.format(2), TRAINING.format(1), "initial commit"]
    saved = tmp_path / "run/checkpoint-2"
    assert repository.files() == contents(plan_push(saved, "user/model"))
    steps = [repository.files(commit.sha)["model.safetensors"] for commit in repository.history()[:2]]
    assert steps[0] != steps[1]
    assert not list((tmp_path / "run").glob("_uploading-*"))
    assert not [name for name in repository.files() if "optimizer" in name or "trainer_state" in name]


@pytest.mark.extensive
@pytest.mark.parametrize(
    ("strategy", "folders"),
    [("end", set()), ("checkpoint", {"last-checkpoint"}), ("all_checkpoints", {"checkpoint-1", "checkpoint-2"})],
)
def test_strategies(strategy, folders, hub, lfs, tmp_path):  # noqa: F811
    options = {"push_to_hub": True, "hub_strategy": strategy, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path / "run", hub_always_push=True, **options).train()
    files = hub.repository("user/model").files()
    found = {name.partition("/")[0] for name in files if "/" in name}
    assert found == folders
    for folder in folders:
        assert {f"{folder}/optimizer.pt", f"{folder}/trainer_state.json", f"{folder}/model.safetensors"} <= files.keys()
        assert f"{folder}/training_args.bin" not in files
    assert ("model.safetensors" in files) == (strategy != "end")


@pytest.mark.extensive
def test_failures_do_not_end_the_training(hub, lfs, tmp_path, caplog):  # noqa: F811
    options = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path / "run", **options)
    hub.faults = [Fault("POST /api/models/user/model/commit", 500)]
    trainer.train()
    assert trainer.state.global_step == 2
    warning = "The checkpoint was not uploaded, and the training continues: The Hub answered with the status 500"
    assert warning in caplog.text
    assert hub.repository("user/model").files() == {}
    trainer.push_to_hub()
    assert "model.safetensors" in hub.repository("user/model").files()


def test_without_a_processor(hub, lfs, tmp_path):  # noqa: F811
    with pytest.raises(PushError, match="has no processor"):
        make_trainer(tmp_path / "run", processor=False).push_to_hub()


def test_an_adapter(hub, lfs, tmp_path):  # noqa: F811
    model = make_speaking_model()
    trainer = make_trainer(tmp_path / "run", get_peft_model(model, expert_lora_config(model)), label_names=["labels"])
    with pytest.raises(PushError, match=r"does not name the base model .*\(--base-model user/name\)"):
        trainer.push_to_hub()
    trainer.push_to_hub(base_model="user/base")
    files = hub.repository("user/model").files()
    assert files.keys() >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert b'"base_model_name_or_path": "user/base"' in files["adapter_config.json"]
    assert not [name for name in files if name.endswith(".bin") or name.startswith("modeling_")]


@pytest.mark.extensive
def test_the_card_of_transformers_on_request(hub, lfs, tmp_path):  # noqa: F811
    make_trainer(tmp_path / "run").push_to_hub(tags=["scenes"], license="mit")
    card = hub.repository("user/model").files()["README.md"].decode()
    assert "- scenes" in card
    assert "license: mit" in card


@pytest.mark.extensive
def test_what_transformers_uploads(hub, lfs, tmp_path):  # noqa: F811
    """Transformers' own trainer uploads the token, which is why ours does not use its upload."""
    trainer = make_trainer(tmp_path / "run", trainer_class=Trainer)
    trainer.push_to_hub()
    files = hub.repository("user/model").files()
    assert TOKEN.encode() in files["training_args.bin"]
    expected = plan_push(tmp_path / "run", "user/model").files.keys() - {"LICENSE", "LICENSE-CODE"}
    assert files.keys() == {*expected, "training_args.bin"}
