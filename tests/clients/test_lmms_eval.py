"""lmms-eval finds the model of this package, and its evaluator scores the answers on a task whose data is local."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.evaluation import generate_answers
from modeling_sparse_moe_vlm.toolbox.training.models import from_checkpoint
from tests.support.processes import ROOT
from tests.support.processors import make_image, user

pytest.importorskip("lmms_eval")

QUESTIONS = ["What?", "What is the image of?", "The cat?"]


@pytest.fixture(scope="module")
def model_class():
    from lmms_eval.models import get_model, get_model_manifest

    ((name, path),) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "lmms_eval.models"
    ].items()
    assert EntryPoint(name, path, "lmms_eval.models").load()() == get_model_manifest("sparse_moe_vlm")
    return get_model("sparse_moe_vlm")


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with the file of a task, and images with questions. Answers are added by the returned function."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def write(answers: list[str], **generation_kwargs) -> str:
        folder = tmp_path / "images/test"
        folder.mkdir(parents=True)
        rows = []
        for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
            make_image(number).save(folder / f"{number}.png")
            rows.append({"file_name": f"{number}.png", "question": question, "answer": answer})
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        task = {
            "task": "our_questions",
            "dataset_path": "imagefolder",
            "dataset_kwargs": {"data_dir": str(tmp_path / "images")},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_visual": "image",
            "doc_to_text": "question",
            "doc_to_target": "answer",
            "generation_kwargs": generation_kwargs,
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
        (tmp_path / "tasks").mkdir()
        (tmp_path / "tasks/our_questions.yaml").write_text(json.dumps(task))  # JSON is YAML
        return str(tmp_path / "tasks")

    return write


@pytest.mark.parametrize("kind", ["ours", "upcycled"])
def test_answers_and_scores(kind, checkpoints, model_class, tasks):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    model, processor = from_checkpoint(str(checkpoints[kind]))
    rows = [{"messages": [user(make_image(number), question)]} for number, question in enumerate(QUESTIONS)]
    whole = generate_answers(model, processor, rows, batch_size=1, max_new_tokens=16)
    stop = whole[1].strip()[5]
    expected = [answer.split(stop)[0].strip() for answer in whole]
    assert expected[1] != whole[1].strip()
    folder = tasks([expected[0], expected[1], "nothing"], max_new_tokens=16, temperature=0, top_p=1.0, until=[stop])
    results = simple_evaluate(
        model="sparse_moe_vlm",
        model_args=f"pretrained={checkpoints[kind]},dtype=float32",
        tasks=["our_questions"],
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        batch_size=2,
        device="cpu",
        log_samples=True,
    )
    samples = sorted(results["samples"]["our_questions"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0].strip() for sample in samples] == expected
    assert [sample["exact_match"] for sample in samples] == [1.0, 1.0, 0.0]
    assert results["results"]["our_questions"]["exact_match,none"] == pytest.approx(2 / 3)


def test_two_processes_share_the_questions(checkpoints, tasks, tmp_path):
    """The third question belongs to the first process. The other one answers a question twice, which does not count."""
    model, processor = from_checkpoint(str(checkpoints["ours"]))
    rows = [{"messages": [user(make_image(number), question)]} for number, question in enumerate(QUESTIONS)]
    expected = generate_answers(model, processor, rows, batch_size=1, max_new_tokens=6)
    folder = tasks([expected[0].strip(), "nothing", "nothing"], max_new_tokens=6, temperature=0)
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lmms_eval"]
    arguments = ["--model", "sparse_moe_vlm", "--model_args", f"pretrained={checkpoints['ours']},dtype=float32"]
    arguments += ["--tasks", "our_questions", "--include_path", folder, "--batch_size", "2", "--device", "cpu"]
    arguments += ["--log_samples", "--output_path", str(tmp_path / "results")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    run = subprocess.run(
        [sys.executable, "-m", *launch, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "Running on rank 1" in run.stdout + run.stderr
    (path,) = (tmp_path / "results").rglob("*samples*.jsonl")
    samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    assert [sample["doc_id"] for sample in samples] == [0, 1, 2]
    assert [sample["exact_match"] for sample in samples] == [1.0, 0.0, 0.0]


def test_requests(checkpoints, model_class):
    """Answers have the order of the requests, which batches change. Errors name the task and the document."""
    lm = model_class.create_from_arg_string(f"pretrained={checkpoints['ours']},max_new_tokens=5", {"batch_size": "2"})
    assert (lm.batch_size, lm.device, lm.rank, lm.world_size) == (2, torch.device("cpu"), 0, 1)
    lm.task_dict = {"task": {"test": [{"question": question, "number": i} for i, question in enumerate(QUESTIONS)]}}

    def messages(doc):
        image = {"type": "image", "url": make_image(doc["number"])}
        return [{"role": "user", "content": [image, {"type": "text", "text": doc["question"]}]}]

    def request(number, to_messages=messages, **arguments):
        args = (QUESTIONS[number], to_messages, arguments, number, "task", "test")
        return SimpleNamespace(args=args)

    rows = [{"messages": [user(make_image(number), question)]} for number, question in enumerate(QUESTIONS)]
    long = generate_answers(lm.model, lm.processor, rows, batch_size=1, max_new_tokens=5)
    short = generate_answers(lm.model, lm.processor, rows, batch_size=1, max_new_tokens=2)
    assert len(set(long)) == 3
    lm.model.train()
    requests = [request(2), request(0, max_new_tokens=2), request(0), request(1), request(1, max_new_tokens=2)]
    assert lm.generate_until(requests) == [long[2], short[0], long[0], long[1], short[1]]
    assert lm.model.training

    def audio(doc):
        return [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}]

    def section(doc):
        return [{"role": "user", "content": [{"type": "video", "url": "a.mp4", "start_time": 1.0}]}]

    with pytest.raises(ValueError, match="task, row 1 has audio"):
        lm.generate_until([request(1, audio)])
    with pytest.raises(ValueError, match="task, row 2 asks about a section of a video"):
        lm.generate_until([request(2, section)])
    with pytest.raises(NotImplementedError, match="loglikelihoods"):
        lm.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several rounds"):
        lm.generate_until_multi_round([])


def test_models_of_text(checkpoints, model_class):
    lm = model_class(str(checkpoints["our_text"]), max_new_tokens=4)
    lm.task_dict = {"task": {"test": ["Hello"]}}
    request = SimpleNamespace(
        args=("", lambda doc: [{"role": "user", "content": [{"type": "text", "text": doc}]}], {}, 0, "task", "test")
    )
    (expected,) = generate_answers(lm.model, lm.processor, [{"messages": [user("Hello")]}], max_new_tokens=4)
    assert lm.generate_until([request]) == [expected]
    assert expected


@pytest.mark.parametrize("batch_size", ["auto", 0, "1.5"])
def test_batch_sizes_are_positive_integers(batch_size, model_class):
    with pytest.raises(
        ValueError, match=f"`batch_size` must be a positive integer, but got {re.escape(repr(batch_size))}"
    ):
        model_class("none", batch_size=batch_size)
