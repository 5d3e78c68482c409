"""`SparseMoeTrainer` counts routing, updates biases once per step, logs figures and warns about a collapse."""

import peft
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_sparse_moe_vlm import routing
from modeling_sparse_moe_vlm.routing import router_biases
from modeling_sparse_moe_vlm.toolbox.routing import (
    RoutingMonitor,
    measure_routing,
    routing_statistics,
    update_router_bias,
)
from modeling_sparse_moe_vlm.toolbox.routing.watch import decoders
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer
from tests.integration.test_trainer import make_rows
from tests.support.batches import collate
from tests.support.models import QUIET_TRAINING, make_inputs, make_model


def train(model, tmp_path, rows=None, **arguments) -> SparseMoeTrainer:
    defaults = {
        "output_dir": str(tmp_path),
        **QUIET_TRAINING,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
        "learning_rate": 0.0,  # so that the counts can be repeated
    }
    trainer = SparseMoeTrainer(
        model=model,
        args=TrainingArguments(**defaults | arguments),
        train_dataset=make_rows() if rows is None else rows,
        data_collator=collate,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (2, 4)], ids=["one batch", "four micro-batches"])
def test_statistics_cover_the_whole_batch(tmp_path, size, accumulation, checkpointing):
    """With any micro-batches, and although gradient checkpointing runs every layer twice."""
    model = make_model(output_router_logits=True)
    expected = routing_statistics(model.config.text_config, measure_routing(model, [collate(make_rows())]))
    trainer = train(
        model,
        tmp_path,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
    )
    statistics = trainer.routing.statistics
    for row, wanted in zip(statistics.rows, expected.rows, strict=True):
        assert (row.wanted, row.num_tokens) == (wanted.wanted, wanted.num_tokens)
        assert row.entropy == pytest.approx(wanted.entropy, rel=1e-4)
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name, value in expected.summary().items():
        assert entry[f"routing/{name}"] == pytest.approx(value, abs=1e-4)


def test_each_log_covers_the_steps_since_the_last(tmp_path):
    trainer = train(make_model(output_router_logits=True), tmp_path, max_steps=4, logging_steps=2)
    tokens = sum(int(row["attention_mask"].sum()) for row in make_rows())
    assert sum(row.num_tokens for row in trainer.routing.statistics.rows) == 2 * 2 * tokens  # layers, steps
    assert len([entry for entry in trainer.state.log_history if "routing/joint/text/entropy" in entry]) == 2


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (2, 4)], ids=["one batch", "four micro-batches"])
def test_biases_are_updated_once_per_step(tmp_path, size, accumulation, checkpointing):
    """By the load of the whole step, as if updated by hand after each step."""
    fields = {"expert_groups": "joint", "router_bias_update_rate": 0.01, "output_router_logits": True}
    by_hand = make_model(**fields)
    for _ in range(3):
        update_router_bias(by_hand, measure_routing(by_hand, [collate(make_rows())]))
    model = make_model(**fields)
    train(
        model,
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
    )
    assert all((bias != 0).any() for bias in router_biases(model))
    for bias, expected in zip(router_biases(model), router_biases(by_hand), strict=True):
        torch.testing.assert_close(bias, expected)


def test_bias_is_in_the_checkpoint_and_resumes(tmp_path):
    fields = {"expert_groups": "joint", "router_bias_update_rate": 0.01, "output_router_logits": True}
    kept = {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = train(make_model(**fields), tmp_path, **kept)
    resumed = SparseMoeTrainer(
        model=make_model(seed=5, **fields), args=whole.args, train_dataset=make_rows(), data_collator=collate
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for bias, expected in zip(router_biases(resumed.model), router_biases(whole.model), strict=True):
        torch.testing.assert_close(bias, expected)
        assert bias.any()


def test_evaluation_is_not_counted_and_updates_nothing(tmp_path):
    model = make_model(router_bias_update_rate=0.01, output_router_logits=True)
    trainer = SparseMoeTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, remove_unused_columns=False, report_to="none"),
        eval_dataset=make_rows(),
        data_collator=collate,
    )
    trainer.evaluate()
    assert trainer.routing.report() == {}
    assert all((bias == 0).all() for bias in router_biases(model))


def test_bias_needs_router_logits(tmp_path):
    with pytest.raises(ValueError, match=r"set `output_router_logits=True`"):
        train(make_model(router_bias_update_rate=0.01), tmp_path)
    train(make_model(router_bias_update_rate=0.0), tmp_path)  # the biases do not change, so nothing is needed


def test_without_router_logits_nothing_is_logged(tmp_path):
    trainer = train(make_model(), tmp_path)
    assert not [name for entry in trainer.state.log_history for name in entry if "routing" in name]
    dense = train(make_model(mlp_only_layers=[0, 1], output_router_logits=True, router_bias_update_rate=0.1), tmp_path)
    assert not [name for entry in dense.state.log_history for name in entry if "routing" in name]


def test_one_warning_until_routing_recovers(caplog):
    """Image tokens of the second layer go only to the first two experts."""
    model, monitor = make_model(expert_groups="joint", output_router_logits=True), RoutingMonitor()
    inputs = make_inputs(batch_size=24)

    def step(collapsed: bool) -> list[str]:
        caplog.clear()
        with torch.no_grad():
            logits = [layer.clone() for layer in model(**inputs).router_logits]
        if collapsed:
            is_image = inputs["mm_token_type_ids"].flatten() == 1
            logits[1][is_image] = torch.tensor([5.0, 4.0, -5.0, -5.0])
        monitor.add(model, inputs, logits)
        monitor.on_step_end(None, None, None, model=model)
        assert monitor.report()
        return [record.getMessage() for record in caplog.records]

    assert step(collapsed=False) == []
    (message,) = step(collapsed=True)
    assert "layer 1, group 'joint', image tokens use effectively 2.0 of 4 experts" in message
    assert step(collapsed=True) == [], "said already"
    assert step(collapsed=False) == []
    assert len(step(collapsed=True)) == 1


def test_modality_ids_may_be_left_out(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "mm_token_type_ids"} for row in make_rows()]

    def collate_without_ids(rows):
        batch = collate([row | {"mm_token_type_ids": torch.zeros_like(row["input_ids"])} for row in rows])
        return {name: value for name, value in batch.items() if name != "mm_token_type_ids"}

    trainer = SparseMoeTrainer(
        model=make_model(output_router_logits=True),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            remove_unused_columns=False,
            report_to="none",
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=rows,
        data_collator=collate_without_ids,
    )
    trainer.train()
    assert trainer.routing.statistics.metrics()["layer_0/joint/image/experts_per_token"] == 2.0


# ------------------------------------------------------------------------------------------------ any trainer


def train_plainly(model, tmp_path, callbacks=(), **arguments) -> Trainer:
    defaults = {"output_dir": str(tmp_path), **QUIET_TRAINING, "max_steps": 3, "logging_steps": 1}
    defaults |= {"save_strategy": "no", "per_device_train_batch_size": 8, "learning_rate": 0.0}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**defaults | arguments),
        train_dataset=make_rows(),
        data_collator=collate,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("returns_logits", [False, True])
@pytest.mark.parametrize(("size", "accumulation", "checkpointing"), [(8, 1, False), (2, 4, True)])
def test_biases_are_updated_with_any_trainer(tmp_path, size, accumulation, checkpointing, returns_logits):
    """By the load of the whole step, whether or not the model returns router logits."""
    fields = {"expert_groups": "joint", "router_bias_update_rate": 0.01}
    by_hand = make_model(**fields)
    for _ in range(3):
        update_router_bias(by_hand, measure_routing(by_hand, [collate(make_rows())]))
    model, monitor = make_model(output_router_logits=returns_logits, **fields), RoutingMonitor()
    trainer = train_plainly(
        model,
        tmp_path,
        [monitor],
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
    )
    for bias, expected in zip(router_biases(model), router_biases(by_hand), strict=True):
        assert (bias != 0).any()
        torch.testing.assert_close(bias, expected)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len([entry for entry in logs if "routing/joint/text/entropy" in entry]) == 3
    tokens = sum(int(row["attention_mask"].sum()) for row in make_rows())
    assert sum(row.num_tokens for row in monitor.statistics.rows) == 2 * tokens  # layers; one step since the last log
    (decoder,) = decoders(model)
    assert not decoder._forward_hooks
    assert not decoder._forward_pre_hooks


def test_frozen_routers_keep_their_biases(tmp_path):
    """An adapter is trained, whose checkpoint would not contain the biases. A trained router updates its own."""
    model = make_model(expert_groups="joint", router_bias_update_rate=0.01)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    first, second = (layer.mlp.gate for layer in model.model.language_model.layers)
    second.weight.requires_grad_(True)
    train_plainly(adapted, tmp_path, [RoutingMonitor()])
    assert not first.e_score_correction_bias.any()
    assert second.e_score_correction_bias.any()


def resting_biases(caplog, call) -> list[str]:
    routing.logger.warning_once.cache_clear()
    caplog.clear()
    call()
    return [record.getMessage() for record in caplog.records if "do not move by themselves" in record.getMessage()]


def test_a_warning_once_about_biases_that_nothing_updates(tmp_path, caplog):
    fields = {"expert_groups": "joint", "router_bias_update_rate": 0.01}
    (message,) = resting_biases(caplog, lambda: train_plainly(make_model(**fields), tmp_path))
    assert "from modeling_sparse_moe_vlm.toolbox.routing import RoutingMonitor" in message
    assert not resting_biases(caplog, lambda: train_plainly(make_model(**fields), tmp_path, [RoutingMonitor()]))
    assert not resting_biases(caplog, lambda: train(make_model(output_router_logits=True, **fields), tmp_path))
    assert not resting_biases(caplog, lambda: make_model(**fields)(**make_inputs()))
    resting = make_model(**fields | {"router_bias_update_rate": 0.0})
    assert not resting_biases(caplog, lambda: train_plainly(resting, tmp_path))
    frozen = make_model(**fields)
    for layer in frozen.model.language_model.layers:
        layer.mlp.gate.weight.requires_grad_(False)
    assert not resting_biases(caplog, lambda: train_plainly(frozen, tmp_path))


def test_passes_without_gradient_are_not_counted(tmp_path):
    """For example, passes of a reference model that is the trained model without its adapter."""

    class Peek(TrainerCallback):
        @torch.no_grad()
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model(**make_inputs(seed=7))

    monitor = RoutingMonitor()
    train_plainly(make_model(output_router_logits=True), tmp_path, [monitor, Peek()], max_steps=1)
    tokens = sum(int(row["attention_mask"].sum()) for row in make_rows())
    assert sum(row.num_tokens for row in monitor.statistics.rows if row.group == "joint") == 2 * tokens


def test_logs_are_means_since_the_last_log(tmp_path):
    """Means of the router losses over two steps each, and of a modality only over the steps that have it."""

    class Recorded(SparseMoeTrainer):
        def compute_loss(self, *args, **kwargs):
            kwargs["return_outputs"] = True
            loss, outputs = super().compute_loss(*args, **kwargs)
            steps.append(outputs)
            return loss

    steps: list = []
    settings = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 1, "save_strategy": "no"}
    trainer = Recorded(
        model=make_model(output_router_logits=True, router_z_loss_coef=0.1),
        args=TrainingArguments(output_dir=str(tmp_path), **QUIET_TRAINING, **settings, learning_rate=1e-3, seed=3),
        train_dataset=make_rows(),
        data_collator=collate,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    assert len(steps) == 4
    for log, outputs in zip(logs, (steps[:2], steps[2:]), strict=True):
        for name in ("aux_loss", "z_loss"):
            values = [output[name].item() for output in outputs]
            assert log[name] == pytest.approx(sum(values) / 2, abs=1e-4)
        for modality, name in enumerate(("aux_loss_text", "aux_loss_image")):
            values = [output["aux_loss_by_modality"][modality].item() for output in outputs]
            present = [value for value in values if value == value]
            expected = sum(present) / len(present) if present else None
            assert log.get(name) == (None if expected is None else pytest.approx(expected, abs=1e-4))
    assert logs[0]["z_loss"] != logs[1]["z_loss"]
