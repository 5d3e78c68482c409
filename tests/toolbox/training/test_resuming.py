"""A resumed run equals the uninterrupted one: the same figures at every logged step, and bitwise the same weights."""

import pytest
import torch
from peft import get_peft_model

from modeling_sparse_moe_vlm.toolbox.data import reading
from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config, factor_expert_lora
from modeling_sparse_moe_vlm.toolbox.training import train_parts
from tests.support.own_data import figures, make_trainer, tensors, write_own_data
from tests.support.processors import make_speaking_model

ROUTER_LOSSES = {"output_router_logits": True, "router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}
BIASES = {"output_router_logits": True, "router": "sigmoid", "router_bias_update_rate": 0.05}


@pytest.fixture
def data(tmp_path):
    return write_own_data(tmp_path)


def with_parts(model, arguments):
    return train_parts(model, {"vision_encoder": "freeze", "experts": 2e-3, "routers": 1e-2}, arguments)


def with_adapters():
    model = make_speaking_model(expert_groups="isolated")
    torch.manual_seed(1)
    return factor_expert_lora(get_peft_model(model, expert_lora_config(model, r=2, lora_dropout=0.1)))


RUNS = {
    "in memory": {},
    "with workers": {"dataloader_num_workers": 2},
    "accumulated": {"gradient_accumulation_steps": 3, "model": lambda: make_speaking_model(**ROUTER_LOSSES)},
    "dropout and biases": {"model": lambda: make_speaking_model(attention_dropout=0.2, **BIASES)},
    "parts": {"prepare": with_parts},
    "adapters": {"model": with_adapters},
    "streaming": {"streaming": True, "model": lambda: make_speaking_model(attention_dropout=0.2, **BIASES)},
    "streaming with workers": {
        "streaming": True,
        "dataloader_num_workers": 2,
        "gradient_accumulation_steps": 3,
        "model": lambda: make_speaking_model(**ROUTER_LOSSES),
    },
}


def run(data, folder, resume=None, model=make_speaking_model, **kwargs):
    torch.manual_seed(0)
    trainer = make_trainer(data, folder, model(), **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", RUNS)
def test_resumed_runs_equal_uninterrupted_ones(name, data, tmp_path):
    whole = run(data, tmp_path / "run", **RUNS[name])
    expected = figures(whole)
    assert [entry["step"] for entry in expected] == [3, 6, 7]
    assert all(entry["loss"] > 0 for entry in expected[:-1])
    if "model" in RUNS[name] and name != "adapters":
        assert "routing/joint/image/entropy" in expected[0]
    for checkpoint in (2, 4):
        resumed = run(data, tmp_path / "run", str(tmp_path / f"run/checkpoint-{checkpoint}"), **RUNS[name])
        assert figures(resumed) == expected
        assert resumed.model is not whole.model
        for tensor_name, tensor in tensors(resumed).items():
            assert torch.equal(tensor, tensors(whole)[tensor_name]), (checkpoint, tensor_name)


def test_the_mean_loss_covers_all_steps_with_known_losses(data, tmp_path):
    """`Trainer` divides the sum of the losses, also of those before the checkpoint, by the steps since the resume."""
    folder, kwargs = tmp_path / "run", {"logging_steps": 1, "save_steps": 4}
    torch.manual_seed(0)
    whole = make_trainer(data, folder, make_speaking_model(), **kwargs)
    output = whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history[:-1]]
    assert len(losses) == 7
    assert output.training_loss == output.metrics["train_loss"] == pytest.approx(sum(losses) / 7, rel=1e-6)

    log_file = folder / "checkpoint-4/log_state_0.pt"
    state = torch.load(log_file)
    assert state.pop("total_loss") == pytest.approx(sum(losses[:4]), rel=1e-6)
    assert state.pop("first_step_of_loss") == 0
    for write in (lambda: torch.save(state, log_file), log_file.unlink):  # an earlier release, and `Trainer`
        write()
        resumed = make_trainer(data, folder, make_speaking_model(), **kwargs)
        output = resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        assert output.training_loss == pytest.approx(sum(losses[4:]) / 3, rel=1e-6)
        assert resumed.log_state()["first_step_of_loss"] == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_before_the_resume_are_not_read(streaming, data, tmp_path, monkeypatch):
    """The run is in its third epoch."""
    kwargs = {"streaming": streaming, "max_steps": 16, "save_steps": 14, "logging_steps": 1}
    whole = run(data, tmp_path / "run", **kwargs)
    read = []
    validated_row, rows_of_batch = reading.validated_row, reading.Rows.__getitems__
    trainer = make_trainer(data, tmp_path / "run", **kwargs)
    monkeypatch.setattr(reading, "validated_row", lambda *row: read.append(1) or validated_row(*row))
    monkeypatch.setattr(reading.Rows, "__getitems__", lambda rows, keys: read.extend(keys) or rows_of_batch(rows, keys))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-14"))
    assert figures(trainer) == figures(whole)
    assert len(read) == 2 * (2 + 1)  # two batches of two rows, and one that is read in advance


def test_a_stream_starts_at_the_step_of_the_checkpoint_unless_it_is_ignored(data, tmp_path):
    trainer = make_trainer(data, tmp_path / "run", streaming=True, gradient_accumulation_steps=3)
    trainer.get_train_dataloader()
    trainer.state.global_step = 4
    for is_ignored, expected in ((False, 12), (True, 0)):
        trainer.args.ignore_data_skip = is_ignored
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
        assert trainer._stream_batches.num_skipped == expected


def test_epochs_of_a_stream_follow_one_another(data, tmp_path):
    """With gradient accumulation, no micro-batch at the end of an epoch is lost or left for the next epoch."""
    seen = []
    trainer = make_trainer(data, tmp_path / "run", streaming=True, shuffle=False, gradient_accumulation_steps=2)
    collator = trainer.data_collator
    trainer.data_collator = lambda rows: (
        seen.append([row["source"][-7] + str(row["row"]) for row in rows]) or collator(rows)
    )
    trainer.train()
    first = [f"0{i}" for i in (0, 1, 2, 3, 4, 6)] + [f"1{i}" for i in range(6)]
    read = [name for batch in seen for name in batch]
    assert read[:12] == first
    assert sorted(read[12:24]) == sorted(first)
    assert [len(batch) for batch in seen[:14]] == [2, 2, 1] + [2] * 11 or sorted(map(len, seen[:14]))[:3] == [1, 1, 2]
    assert trainer.state.global_step == 7


def test_skipped_rows_are_counted_at_the_end_of_training(data, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("modeling_sparse_moe_vlm.toolbox.data.bad_rows.logger.warning", warnings.append)
    trainer = make_trainer(data, tmp_path / "run", streaming=True, dataloader_num_workers=2)
    trainer.train()
    assert warnings == ["Skipped bad rows: 1 (1 × missing file)."]
    # A resumed run counts the rows that were skipped before.
    trainer = make_trainer(data, tmp_path / "run", streaming=True, max_steps=8)
    trainer.train(resume_from_checkpoint=True)
    assert warnings == ["Skipped bad rows: 1 (1 × missing file)."] * 2


def test_other_iterable_datasets_are_not_dispatched(data, tmp_path):
    trainer = make_trainer(data, tmp_path / "run", streaming=True)
    assert trainer.accelerator.dataloader_config.dispatch_batches is False
    trainer = make_trainer(data, tmp_path / "run", accelerator_config={"dispatch_batches": True})
    assert trainer.accelerator.dataloader_config.dispatch_batches is True
