"""`RoutingMonitor` logs router losses, routing, speed and memory in any trainer, and every callback receives them."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainerCallback, TrainingArguments

from modeling_sparse_moe_vlm.toolbox import throughput, trainer_figures
from modeling_sparse_moe_vlm.toolbox.routing import RoutingMonitor, measure_routing, routing_statistics
from modeling_sparse_moe_vlm.toolbox.routing.loss_watch import mean_losses
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer
from tests.integration.test_trainer import make_rows
from tests.support.batches import collate
from tests.support.models import QUIET_TRAINING, TINY_DECODER, make_model

COEFFICIENTS = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25}


class Recorder(TrainerCallback):
    """Keeps a copy of the logs and metrics that a callback receives."""

    def __init__(self):
        self.logs, self.metrics = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.metrics.append(dict(metrics))


class LateRecorder(Recorder):
    """A second class, because `Trainer` warns of two callbacks of one class."""


def train(model, tmp_path, callbacks, trainer_class=Trainer, late=(), rows=None, **arguments):
    defaults = {"output_dir": str(tmp_path), **QUIET_TRAINING, "max_steps": 1, "logging_steps": 1}
    # With a learning rate of zero, the figures can be computed again afterwards.
    defaults |= {"save_strategy": "no", "per_device_train_batch_size": 8, "learning_rate": 0.0}
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(**defaults | arguments),
        train_dataset=make_rows() if rows is None else rows,
        eval_dataset=make_rows(5),
        data_collator=collate,
        callbacks=callbacks,
    )
    for callback in late:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def expected_figures(model, rows) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the figures of one batch with all rows, of all layers and by layer."""
    batch = collate(rows)
    with torch.no_grad():
        outputs = model(**batch, output_router_logits=True)
    text, image = outputs.aux_loss_by_modality.tolist()
    losses = {"aux_loss": outputs.aux_loss.item(), "z_loss": outputs.z_loss.item(), "aux_loss_text": text}
    losses |= {"aux_loss_image": image, "router_loss": outputs.router_loss.item()}
    statistics = routing_statistics(model.config.text_config, measure_routing(model, [batch]))
    summary = {f"routing/{name}": value for name, value in statistics.summary().items()}
    details = {f"routing/{name}": value for name, value in (statistics.metrics() | statistics.loads()).items()}
    return losses | summary, details


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("trainer_class", [Trainer, SparseMoeTrainer])
@pytest.mark.parametrize("monitor_is_late", [False, True])
def test_every_callback_and_tensorboard_receive_all_figures(tmp_path, capsys, trainer_class, monitor_is_late):
    model, monitor, before, after = make_model(**COEFFICIENTS), RoutingMonitor(), Recorder(), LateRecorder()
    callbacks, late = ([before, monitor, after], []) if not monitor_is_late else ([before], [monitor, after])
    if monitor_is_late and trainer_class is SparseMoeTrainer:
        late = [after]  # it has a monitor
    trainer = train(model, tmp_path, callbacks, trainer_class, late, report_to="tensorboard")
    figures, details = expected_figures(model, make_rows())
    assert {"routing/layer_1/joint/image/max_violation", "routing/layer_0/joint/text/load/3"} <= details.keys()
    written, history = scalars(tmp_path), trainer.state.log_history[0]
    for name, value in (figures | details).items():
        assert before.logs[0][name] == after.logs[0][name] == pytest.approx(value, abs=6e-5), name
        assert written[f"train/{name}"] == [(1, pytest.approx(value, abs=6e-5))], name
    for name in figures:
        assert history[name] == before.logs[0][name]
    assert before.logs[0].keys() == after.logs[0].keys()
    assert {"loss", "tokens_per_second", "peak_memory_gib"} <= before.logs[0].keys()
    # Thousands of figures by layer would flood the terminal and the state, which every checkpoint contains.
    printed = capsys.readouterr().out
    assert "routing/joint/text/entropy" in printed
    assert "layer_0" not in printed
    assert not details.keys() & history.keys()


def test_figures_by_layer_can_be_chosen(tmp_path):
    for by_layer, report_to, has_them in ((None, "none", False), (True, "none", True), (False, "tensorboard", False)):
        recorder = Recorder()
        train(make_model(**COEFFICIENTS), tmp_path, [recorder, RoutingMonitor(by_layer)], report_to=report_to)
        assert ("routing/layer_0/joint/text/entropy" in recorder.logs[0]) == has_them
        assert "routing/joint/text/entropy" in recorder.logs[0]


def test_a_monitor_among_the_callbacks_replaces_that_of_the_trainer(tmp_path):
    """Two of them would update the biases twice."""
    monitor = RoutingMonitor()
    trainer = train(make_model(**COEFFICIENTS), tmp_path, [monitor], SparseMoeTrainer)
    assert trainer.routing is monitor
    assert sum(isinstance(one, RoutingMonitor) for one in trainer.callback_handler.callbacks) == 1


def test_evaluations_get_router_losses_and_routing(tmp_path):
    """Also in the metrics that choose the best checkpoint. Training and evaluation are counted separately."""
    model, recorder = make_model(**COEFFICIENTS), Recorder()
    kept = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = train(
        model,
        tmp_path,
        [recorder, RoutingMonitor()],
        metric_for_best_model="routing/joint/image/max_violation",
        greater_is_better=False,
        per_device_eval_batch_size=5,
        max_steps=2,
        **kept,
    )
    figures, _ = expected_figures(model, make_rows(5))
    of_training, _ = expected_figures(model, make_rows())
    evaluations = [logs for logs in recorder.logs if "eval_loss" in logs]
    assert len(evaluations) == len(recorder.metrics) == 2
    for name, value in figures.items():
        for logs in (*evaluations, *recorder.metrics, trainer.state.log_history[1], trainer.state.log_history[3]):
            assert logs[f"eval_{name}"] == pytest.approx(value, abs=6e-5), name
        assert trainer.state.log_history[2][name] == pytest.approx(of_training[name], abs=6e-5)
    assert trainer.state.best_metric == evaluations[0]["eval_routing/joint/image/max_violation"]
    assert trainer.state.best_global_step == 1
    after_training = trainer.evaluate()
    assert "eval_loss" in after_training
    assert "eval_aux_loss" not in after_training  # only evaluations during training are watched


def test_only_passes_with_labels_belong_to_an_evaluation(tmp_path):
    """Not those of generation or of another callback."""

    class Peek(TrainerCallback):
        @torch.no_grad()
        def on_step_end(self, args, state, control, model=None, **kwargs):
            batch = collate(make_rows(7))
            model.eval()
            model(**{name: value for name, value in batch.items() if name != "labels"}, output_router_logits=True)
            model.train()

    model, recorder = make_model(**COEFFICIENTS), Recorder()
    train(model, tmp_path, [recorder, RoutingMonitor(), Peek()], eval_strategy="steps", eval_steps=1)
    figures, _ = expected_figures(model, make_rows(5))
    (logs,) = [logs for logs in recorder.logs if "eval_loss" in logs]
    for name, value in figures.items():
        assert logs[f"eval_{name}"] == pytest.approx(value, abs=6e-5), name


def test_several_evaluation_sets_have_their_own_figures(tmp_path):
    model, recorder = make_model(**COEFFICIENTS), Recorder()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(tmp_path), **QUIET_TRAINING, max_steps=1, eval_strategy="steps", eval_steps=1),
        train_dataset=make_rows(),
        eval_dataset={"few": make_rows(3), "many": make_rows(8)},
        data_collator=collate,
        callbacks=[RoutingMonitor(), recorder],
    )
    trainer.train()
    for logs, rows in zip(recorder.metrics, (make_rows(3), make_rows(8)), strict=True):
        name = "few" if len(rows) == 3 else "many"
        figures, _ = expected_figures(model, rows)
        assert {key for key in logs if "routing" in key} == {
            f"eval_{name}_{key}" for key in figures if "routing" in key
        }
        assert logs[f"eval_{name}_z_loss"] == pytest.approx(figures["z_loss"], abs=6e-5)


def test_models_of_transformers_have_their_aux_loss_logged(tmp_path):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **TINY_DECODER,
        head_dim=8,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
    )
    model, recorder = Qwen3MoeForCausalLM(config), Recorder()
    row = {"input_ids": torch.arange(4, 20), "attention_mask": torch.ones(16, dtype=torch.long)}
    row["labels"] = row["input_ids"]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path),
            **QUIET_TRAINING,
            max_steps=1,
            logging_steps=1,
            learning_rate=0.0,
            save_strategy="no",
        ),
        train_dataset=[row] * 2,
        callbacks=[RoutingMonitor(), recorder],
    )
    trainer.train()
    aux_loss = model(**{name: value[None] for name, value in row.items()}).aux_loss.item()
    assert recorder.logs[0]["aux_loss"] == pytest.approx(aux_loss, abs=6e-5)
    assert recorder.logs[0]["tokens_per_second"] == recorder.logs[0]["tokens_per_second_text"] > 0


def test_means_leave_out_missing_modalities():
    losses = [{"a": torch.tensor(1.0), "b": torch.tensor(torch.nan)}, {"a": torch.tensor(4.0), "b": torch.tensor(3.0)}]
    assert mean_losses(losses) == {"a": 2.5, "b": 3.0}
    assert mean_losses([losses[0]]) == {"a": 1.0}
    assert mean_losses([]) == {}


def test_weights_of_the_modalities_by_layer(tmp_path):
    """α and β, from the first pass since the last log, over real tokens that can attend to the modality."""
    model, recorder, sampled = make_model(), Recorder(), []

    def spy(decoder, args, output):
        sampled.append(output.modality_weights is not None)

    decoder = model.model.language_model
    handle = decoder.register_forward_hook(spy)
    monitor = RoutingMonitor(modality_weights=True)
    order = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    train(
        model,
        tmp_path,
        [recorder, monitor],
        eval_strategy="steps",
        eval_steps=2,
        train_sampling_strategy="sequential",
        **order,
    )
    handle.remove()
    assert not decoder._forward_hooks
    # Two micro-batches per step, and one batch of the evaluation. The first has the first four rows.
    assert sampled == [True, False, True, False, False]
    batch = collate(make_rows()[:4])
    with torch.no_grad():
        weights = model(**batch, output_modality_weights=True).modality_weights
    real = batch["attention_mask"].bool()
    assert not real.all()
    for layer, values in enumerate(weights):
        for modality, name in enumerate(("text", "image")):
            of_tokens = values[..., modality].transpose(1, 2)[real]  # (tokens, heads)
            assert (of_tokens == 0).any() == (name == "image")
            expected = of_tokens[of_tokens > 0].mean().item()
            for log in [logs for logs in recorder.logs if "loss" in logs]:
                assert log[f"modality_weights/layer_{layer}/{name}"] == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------ speed and memory


def test_tokens_per_second(tmp_path, monkeypatch):
    """Every look at the clock takes one second. The time of evaluations and saving does not count."""
    clock = itertools.count()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    recorder = Recorder()
    train(
        make_model(),
        tmp_path,
        [recorder, RoutingMonitor()],
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    rows = make_rows()
    text = sum(int((row["mm_token_type_ids"] == 0).sum()) for row in rows)
    image = sum(int((row["mm_token_type_ids"] == 1).sum()) for row in rows)
    assert image > 0
    logs = [logs for logs in recorder.logs if "loss" in logs]
    assert len(logs) == 2
    for log in logs:
        # Two steps, and the look at the clock when the loss is logged.
        assert log["tokens_per_second_text"] == pytest.approx(2 * text / 3, abs=1e-4)
        assert log["tokens_per_second_image"] == pytest.approx(2 * image / 3, abs=1e-4)
        assert log["tokens_per_second"] == pytest.approx(2 * (text + image) / 3, abs=1e-4)


def test_tokens_are_counted_by_modality_without_padding():
    model = SimpleNamespace(config=SimpleNamespace(image_token_id=3, video_token_index=4))
    input_ids = torch.tensor([[3, 3, 7, 0], [4, 9, 9, 3]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])

    def count(num_modalities=4, **inputs):
        return throughput.count_tokens(model, inputs, num_modalities).tolist()

    assert count(input_ids=input_ids, attention_mask=mask) == [3, 3, 1, 0]
    assert count(input_ids=input_ids) == [4, 3, 1, 0]
    assert count(2, input_ids=input_ids) == [5, 3]
    assert count(input_ids=input_ids, mm_token_type_ids=(input_ids == 9).long(), attention_mask=mask) == [5, 2, 0, 0]
    assert count(inputs_embeds=torch.zeros(2, 4, 8), attention_mask=mask) == [7, 0, 0, 0]
    assert count(input_ids=input_ids, attention_mask=torch.ones(2, 1, 4, 4)) == [4, 3, 1, 0]
    assert throughput.count_tokens(model, {}, 4) is None


def test_peak_memory(monkeypatch):
    usage = SimpleNamespace(ru_maxrss=3 * 2**20)
    monkeypatch.setattr("resource.getrusage", lambda who: usage)
    monkeypatch.setattr("sys.platform", "linux")
    assert throughput.peak_memory(torch.device("cpu")) == 3.0
    monkeypatch.setattr("sys.platform", "darwin")
    assert throughput.peak_memory(torch.device("cpu")) == 3 / 1024
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 5 * 2**30)
    assert throughput.peak_memory(torch.device("cuda")) == 5.0


# ------------------------------------------------------------------------------------------------ contracts of Trainer


def test_prefixes_of_evaluations():
    assert trainer_figures.evaluation_prefix({"eval_loss": 1.0, "eval_runtime": 2.0}) == "eval"
    assert trainer_figures.evaluation_prefix({"eval_few_runtime": 2.0}) == "eval_few"
    assert trainer_figures.evaluation_prefix({"train_runtime": 2.0, "train_loss": 1.0}) is None
    assert trainer_figures.evaluation_prefix({"loss": 1.0}) is None


def test_each_callback_is_called_once_per_event(tmp_path):
    """Although the list of callbacks changes during the first event."""

    class Begun(TrainerCallback):
        begun = 0

        def on_train_begin(self, args, state, control, **kwargs):
            self.begun += 1

    class BegunLate(Begun): ...

    early, late, monitor = Begun(), BegunLate(), RoutingMonitor()
    trainer = train(make_model(), tmp_path, [early], late=[monitor, late])
    assert (early.begun, late.begun) == (1, 1)
    callbacks = trainer.callback_handler.callbacks
    assert callbacks[0] is monitor
    assert type(callbacks[-1]).__name__ == "PrinterCallback"
    assert len(callbacks) == len({id(callback) for callback in callbacks}) == 6
