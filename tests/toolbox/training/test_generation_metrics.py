"""`GenerationMetrics` scores generated answers at every evaluation, before early stopping and the best checkpoint."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from modeling_sparse_moe_vlm.toolbox.data import VisionLanguageCollator
from modeling_sparse_moe_vlm.toolbox.evaluation import generate_answers
from modeling_sparse_moe_vlm.toolbox.training import GenerationMetrics, SparseMoeTrainer, generation_metrics
from tests.support.models import QUIET_TRAINING
from tests.support.processes import run_in_processes
from tests.support.processors import assistant, make_image, make_processor, make_speaking_model, speak_printably, user
from tests.toolbox.routing.test_monitor_figures import LateRecorder, Recorder

SHORT = {"max_new_tokens": 4}


def make_conversations(number: int = 6, with_images: bool = True) -> list[dict]:
    questions = ["the cat", "the mat", "the image", "on the cat", "sat", "and the mat"]
    return [
        {"messages": [user(*[make_image(i)] * with_images, questions[i % 6]), assistant(f"a {i}")]}
        for i in range(number)
    ]


def with_right_answers(rows: list[dict], answers: list[str], right: set[int]) -> list[dict]:
    """Returns rows whose references are the answers of the model, or else another text."""
    return [
        row | {"references": ["no", answer] if number in right else ["no"]}
        for number, (row, answer) in enumerate(zip(rows, answers, strict=True))
    ]


def make_trainer(model, tmp_path, callbacks, trainer_class=Trainer, **arguments):
    processor = make_processor()
    defaults = {"output_dir": str(tmp_path), **QUIET_TRAINING, "max_steps": 1, "logging_steps": 1, "eval_steps": 1}
    defaults |= {"eval_strategy": "steps", "save_strategy": "no", "per_device_train_batch_size": 2}
    return trainer_class(
        model=model,
        args=TrainingArguments(**defaults | arguments),
        train_dataset=make_conversations(),
        eval_dataset=make_conversations(2),
        data_collator=VisionLanguageCollator(processor),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("is_late", [False, True])
def test_scores_are_metrics_of_the_evaluation(tmp_path, is_late):
    model, processor, rows = speak_printably(make_speaking_model()), make_processor(), make_conversations()
    answers = generate_answers(model, processor, rows, **SHORT)
    assert len(set(answers)) > 2
    sample = sorted(random.Random(3).sample(range(6), 4))
    assert sample != list(range(4))
    rows = with_right_answers(rows, answers, right={sample[0], sample[1], sample[3]})
    before, after = Recorder(), LateRecorder()
    own = GenerationMetrics(processor, rows, ["exact_match", "anls"], num_samples=4, batch_size=3, seed=3, **SHORT)
    trainer = make_trainer(
        model, tmp_path, [before] if is_late else [before, own, after], learning_rate=0.0, report_to="tensorboard"
    )
    for callback in (own, after) if is_late else ():
        trainer.add_callback(callback)
    trainer.train()
    assert own.sample == sample
    assert own.answers == [answers[number] for number in sample]
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    assert EventAccumulator(str(file)).Reload().Scalars("eval/exact_match")[0].value == 75.0
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    for recorder in (before, after):
        evaluations += [logs for logs in recorder.logs if "eval_loss" in logs] + recorder.metrics
    assert len(evaluations) == 5
    assert [entry["eval_exact_match"] for entry in evaluations] == [75.0] * 5
    assert all(75.0 <= entry["eval_anls"] < 100.0 for entry in evaluations)
    lines = [json.loads(line) for line in (tmp_path / "generated_answers/step-1.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "row": f"row {sample[1]}",
        "answer": answers[sample[1]],
        "references": ["no", answers[sample[1]]],
    }
    assert [line["answer"] for line in lines] == own.answers
    # After training, too. Another prefix is another set of rows.
    assert trainer.evaluate()["eval_exact_match"] == 75.0
    for prefix in ("test", "evaluation"):
        assert "exact_match" not in "".join(trainer.evaluate(metric_key_prefix=prefix))


@pytest.mark.parametrize(
    ("content", "columns", "expected"),
    [
        ("the cat", {}, False),
        ("the cat", {"images": [], "videos": None}, False),
        ("the cat", {"images": ["a.png"]}, True),
        ("the cat", {"videos": ["a.mp4"]}, True),
        ([{"type": "text", "text": "the cat"}], {}, False),
        ([{"type": "image"}], {}, True),
        ([{"type": "text", "text": "the cat"}, {"type": "video"}], {}, True),
    ],
)
def test_rows_with_images_or_videos(content, columns, expected):
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "sat"}]} | columns
    assert generation_metrics._has_image(row) is expected


def test_several_evaluation_sets_generate_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(generation_metrics, "generate_answers", lambda *_, **__: calls.append(1) or ["a 0", "b"])
    own, recorder = GenerationMetrics(make_processor(), make_conversations(2)), Recorder()
    trainer = make_trainer(make_speaking_model(), tmp_path, [own, recorder])
    trainer.eval_dataset = {"few": make_conversations(1), "more": make_conversations(2)}
    metrics = trainer.evaluate()
    assert len(calls) == 1
    assert metrics["eval_exact_match"] == 50.0
    assert {"eval_few_loss", "eval_more_loss"} <= metrics.keys()
    assert ["eval_exact_match" in logs for logs in recorder.logs] == [True, False]
    trainer.evaluate()
    assert len(calls) == 2


def test_training_is_not_affected_by_sampling(tmp_path):
    """The random numbers of the training stay the same, and the same answers are drawn at every evaluation."""

    class Draws(Recorder):
        def on_log(self, args, state, control, **kwargs):
            self.logs.append(torch.rand(2).tolist())

    drawn = []
    for has_metrics in (False, True):
        draws = Draws()
        own = GenerationMetrics(make_processor(), make_conversations(2), do_sample=True, **SHORT)
        model = speak_printably(make_speaking_model())
        trainer = make_trainer(model, tmp_path, [own] * has_metrics + [draws], learning_rate=0.0, max_steps=2)
        trainer.train()
        drawn.append(draws.logs)
    assert drawn[0] == drawn[1]
    first, second = ((tmp_path / f"generated_answers/step-{step}.jsonl").read_text() for step in (1, 2))
    assert first == second


def test_rows_of_datasets_and_few_rows():
    rows = Dataset.from_list([{"messages": [assistant("x")], "references": ["a", "b"]}] * 3)
    own = GenerationMetrics(make_processor(), rows)
    assert own.sample == [0, 1, 2]
    assert own._references == [["a", "b"]] * 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": iter([])}, TypeError, "`rows` must have a length"),
        ({"rows": []}, ValueError, "`rows` has no rows"),
        ({"num_samples": 0}, ValueError, "`num_samples` must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1, got 0"),
        ({"metrics": ["exactness"]}, ValueError, "exactness"),
        ({"rows": [{"messages": [user("x")]}]}, ValueError, "^row 0: .*no references"),
        ({"rows": [{"messages": [assistant("x"), user("y")]}]}, ValueError, "^row 0: .*no references, and its last"),
        ({"rows": [{"messages": []}]}, ValueError, "^row 0: .*no references, and its last"),
        ({"rows": [{"messages": [user("x")], "source": "a.jsonl", "row": 7}]}, ValueError, "^a.jsonl, row 7: "),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {"processor": make_processor(), "rows": make_conversations(2)}
    GenerationMetrics(**arguments)
    with pytest.raises(error, match=message):
        GenerationMetrics(**arguments | change)


# ------------------------------------------------------------------------------------------------ best checkpoint

# The share of right answers at each step: the second is the best one, and two evaluations later, training stops.
SCORES = {1: 25.0, 2: 75.0, 3: 50.0, 4: 75.0, 5: 100.0}


def scripted(trainer_class, tmp_path, monkeypatch, **arguments):
    """Returns a trainer whose answers have the scores of `SCORES`."""
    rows = make_conversations(4)

    def answers(model, processor, rows, **kwargs):
        num_right = int(SCORES[trainer.state.global_step] / 25)
        return [f"a {i}" if i < num_right else "wrong" for i in range(4)]

    monkeypatch.setattr(generation_metrics, "generate_answers", answers)
    trainer = make_trainer(
        make_speaking_model(),
        tmp_path,
        # Early stopping is called before the metrics in the list that the user passes.
        [EarlyStoppingCallback(early_stopping_patience=2), GenerationMetrics(make_processor(), rows)],
        trainer_class,
        max_steps=5,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="exact_match",
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,
        **arguments,
    )
    return trainer


def check_outcome(trainer, tmp_path):
    assert trainer.state.global_step == 4
    assert trainer.state.best_metric == 75.0
    assert trainer.state.best_global_step == 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    # The model is that of the best checkpoint, not of the last one.
    best, last = (load_file(tmp_path / f"checkpoint-{step}/model.safetensors") for step in (2, 4))
    name = "lm_head.weight"
    assert torch.equal(trainer.model.get_parameter(name), best[name])
    assert not torch.equal(best[name], last[name])


@pytest.mark.parametrize("trainer_class", [Trainer, SparseMoeTrainer])
def test_early_stopping_and_the_best_checkpoint(tmp_path, monkeypatch, trainer_class):
    trainer = scripted(trainer_class, tmp_path, monkeypatch)
    trainer.train()
    scores = [entry["eval_exact_match"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert scores == [25.0, 75.0, 50.0, 75.0]
    check_outcome(trainer, tmp_path)
    # A resumed run knows the best score, and that one evaluation was worse: it stops after one more step.
    state = json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"] == 1
    resumed = scripted(trainer_class, tmp_path, monkeypatch)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    scores = [entry["eval_exact_match"] for entry in resumed.state.log_history if "eval_loss" in entry]
    assert scores == [25.0, 75.0, 50.0, 75.0]
    check_outcome(resumed, tmp_path)


# ------------------------------------------------------------------------------------------------ several processes


@pytest.mark.parametrize(
    ("sizes", "is_mixed", "shared", "synced"),
    [
        (None, True, True, False),
        ({"tp_size": 1}, False, True, True),
        ({"tp_size": 1}, True, False, True),
        ({"tp_size": 2}, False, False, True),
    ],
    ids=["data parallel", "experts", "experts, mixed rows", "tensor parallel"],
)
def test_rows_of_the_second_of_two_processes(monkeypatch, sizes, is_mixed, shared, synced):
    """The third answer comes from the first process, which has one row more."""
    rows = make_conversations(2) + make_conversations(3, with_images=not is_mixed)[2:]
    calls = []

    def answers(model, processor, rows, **options):
        calls.append((rows, options))
        return [f"mine {i}" for i in range(len(rows))]

    def gather(gathered, mine):
        gathered[:] = ["its 0", "its 1"], mine

    monkeypatch.setattr(generation_metrics, "generate_answers", answers)
    monkeypatch.setattr(generation_metrics, "is_one_of_several_processes", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    model = make_speaking_model()
    if sizes is not None:
        model.config.distributed_config = SimpleNamespace(**sizes)
    found = GenerationMetrics(make_processor(), rows, batch_size=7)._generate(model)
    assert found == (["its 0", "mine 0", "its 1"] if shared else ["mine 0", "mine 1", "mine 2"])
    ((given, options),) = calls
    assert [row["messages"] for row in given] == [
        rows[number]["messages"] for number in ([1, 1] if shared else [0, 1, 2])
    ]
    assert options == {"batch_size": 7} | ({"synced_gpus": True} if synced else {})


PROGRAM = """
import json
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.data import VisionLanguageCollator
from modeling_sparse_moe_vlm.toolbox.routing import RoutingMonitor
from modeling_sparse_moe_vlm.toolbox.training import GenerationMetrics, generation_metrics
from tests.support.models import QUIET_TRAINING
from tests.support.processors import make_processor
from tests.toolbox.training.test_generation_metrics import LENGTHS, make_conversations

folder = Path(sys.argv[1])
torch.set_num_threads(1)
generate_answers, numbers = generation_metrics.generate_answers, []


def counted(model, processor, rows, **options):
    numbers.append(len(rows))
    return generate_answers(model, processor, rows, **options)


generation_metrics.generate_answers = counted
arguments = TrainingArguments(
    str(folder / "run"), **QUIET_TRAINING, max_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=1,
    save_strategy="no", learning_rate=0.0, per_device_train_batch_size=2, per_device_eval_batch_size=2,
)
rank, found = arguments.process_index, {}
processor = make_processor()
for kind, sizes in (("ddp", None), ("fsdp", {"fsdp_size": 2}), ("experts", {"fsdp_size": 2, "ep_size": 2})):
    options = {} if sizes is None else {"distributed_config": DistributedConfig(**sizes)}
    model = SparseMoeVlmForConditionalGeneration.from_pretrained(folder / "model", **options)
    for rows in ("alike", "mixed"):
        data = make_conversations(5) if rows == "alike" else make_conversations(2) + make_conversations(3, False)
        own = GenerationMetrics(processor, data, batch_size=2, **LENGTHS)
        trainer = Trainer(
            model=model, args=arguments, train_dataset=make_conversations(8), eval_dataset=make_conversations(4),
            data_collator=VisionLanguageCollator(processor), callbacks=[own, RoutingMonitor()],
        )
        trainer.train()
        entry = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        found[f"{kind} {rows}"] = own.answers, entry, log["z_loss"], numbers.pop()
(folder / f"found-{rank}.json").write_text(json.dumps(found))
torch.distributed.destroy_process_group()
"""
LENGTHS = {"max_new_tokens": 6}


@pytest.mark.extensive
@pytest.mark.slow
def test_processes_share_the_rows_and_have_the_same_scores(tmp_path):
    """Under data, FSDP2 and expert parallelism. Training continues after generation."""
    model = make_speaking_model(num_experts=4, output_router_logits=True, router_z_loss_coef=0.1)
    model.save_pretrained(tmp_path / "model")
    answers = {
        "alike": generate_answers(model, make_processor(), make_conversations(5), **LENGTHS),
        "mixed": generate_answers(
            model, make_processor(), make_conversations(2) + make_conversations(3, False), **LENGTHS
        ),
    }
    result = run_in_processes(PROGRAM, tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == 6
    for name, (found, metrics, z_loss, number) in first.items():
        other_answers, other_metrics, other_z_loss, other_number = second[name]
        # A process without images does not run the vision tower, for whose weights the other would wait under FSDP2.
        assert number == other_number == (3 if name.startswith("ddp") or name.endswith("alike") else 5)
        assert found == other_answers == answers[name.split()[1]], name
        assert metrics["eval_exact_match"] == other_metrics["eval_exact_match"]
        assert metrics["eval_z_loss"] == other_metrics["eval_z_loss"]
        assert z_loss == other_z_loss
    # One process after the other has other rows, but the mean over both is the same with every kind of parallelism.
    assert len({round(z_loss, 3) for _, _, z_loss, _ in first.values()}) == 1
