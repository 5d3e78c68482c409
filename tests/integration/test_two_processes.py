"""Two processes train as one does with the same global batch, router losses included, on any mixture of rows."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support import upcycled
from tests.support.own_data import figures, make_trainer, tensors, write_own_data
from tests.support.processes import ROOT, launch
from tests.support.processors import make_speaking_model

pytestmark = [pytest.mark.slow, pytest.mark.newest]

# Of a global batch of 4 rows, the processes have 2 each: images and texts, texts, images, texts and images.
WITHOUT_IMAGE = (2, 3, 4, 5, 6, 7, 12, 13)
# Packed, each process has 4 rows. One of them is long, so that the others fit into another sequence.
PACKED = {"num_rows": 24, "without_image": (2, 3, 4, 5, 6, 7, 12, 13, 14, 15), "long": (1, 5, 9, 13, 17, 21)}
# A batch of the first process has no good row, then one of the second, then one of both.
BAD = (*range(4), *range(12, 24))
SKIPPED = {"num_rows": 40, "bad": BAD, "broken": BAD[::2], "without_image": (4, 5, 8, 24, 25, 26, 27), "long": (9, 33)}
COEFFICIENTS = {
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.1,
    "router_local_entropy_coef": 0.2,
    "router_global_entropy_coef": 0.3,
}
SETTINGS = {"max_steps": 6, "logging_steps": 1, "save_steps": 3, "optim": "sgd", "lr_scheduler_type": "constant"}
RUNS = {
    "streaming": {"streaming": True, "shuffle": False},
    "with workers": {"streaming": True, "dataloader_num_workers": 2},
    "accumulated": {"streaming": True, "gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1},
    "upcycled": {"streaming": True, "shuffle": False, "model": "upcycled"},
    "packed": {"streaming": True, "packing": True},
}
MORE_RUNS = {
    # Otherwise, Accelerate repeats rows at the end of an epoch, so that all processes have equal batches.
    "in memory": {"dataloader_drop_last": True},
    "packed in memory": {"packing": True, "dataloader_drop_last": True, "gradient_accumulation_steps": 2},
    "packed, with workers": {"packing": True, "streaming": True, "dataloader_num_workers": 2},
    "packed, upcycled": {"packing": True, "streaming": True, "shuffle": False, "model": "upcycled"},
    "skipped": {"data": "skipped", "streaming": True, "shuffle": False, "model": "biased"},
    "packed, skipped": {
        "packing": True,
        "streaming": True,
        "shuffle": False,
        "dataloader_num_workers": 2,
        "data": "skipped",
    },
    "packed, smoothed": {"packing": True, "streaming": True, "label_smoothing_factor": 0.1},
}
MODELS = {
    "own": make_speaking_model,
    "upcycled": upcycled.make_speaking,
    "biased": partial(make_speaking_model, router="sigmoid", router_bias_update_rate=0.05),
}
RESUMED = ("with workers", "packed", *MORE_RUNS)


def run(name: str, folder: Path, number: int, resume: str | None = None):
    """Trains in one of `number` processes."""
    output = folder / str(number) / name
    kwargs = SETTINGS | (RUNS | MORE_RUNS)[name]
    torch.manual_seed(0)
    model = MODELS[kwargs.pop("model", "own")](**COEFFICIENTS)
    data = kwargs.pop("data", "packed" if "packing" in kwargs else ".")
    trainer = make_trainer(
        folder / data / "data",
        output,
        model,
        skipped_file=folder / f"{name}, {number}.jsonl",
        learning_rate=0.05,
        max_grad_norm=0.0,
        per_device_train_batch_size=(4 if data == "." else 8) // number,
        per_device_eval_batch_size=1,
        **kwargs,
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(output / resume))
    return trainer


PROGRAM = """
import json, sys
from pathlib import Path
import torch
from tests.integration.test_two_processes import RESUMED, run
from tests.support.own_data import figures, tensors

torch.set_num_threads(1)
folder = Path(sys.argv[1])
for name in json.loads((folder / "runs.json").read_text()):
    trainer = run(name, folder, 2)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        (folder / f"{name}.json").write_text(json.dumps(figures(trainer)))
        torch.save(tensors(trainer), folder / f"{name}.pt")
    if name == "streaming":  # the two files have unequal numbers of good rows
        loss = trainer.evaluate(trainer.train_dataset)["eval_loss"]
        (folder / f"evaluated {trainer.accelerator.process_index}.json").write_text(json.dumps(loss))
    if name in RESUMED:
        resumed = run(name, folder, 2, "checkpoint-3")
        assert figures(resumed) == figures(trainer), (figures(resumed), figures(trainer))
        assert all(torch.equal(tensor, tensors(trainer)[name]) for name, tensor in tensors(resumed).items())
"""


@pytest.mark.parametrize("runs", [RUNS, pytest.param(MORE_RUNS, marks=pytest.mark.extensive)], ids=["runs", "more"])
def test_two_processes_equal_one(tmp_path, runs):
    write_own_data(tmp_path, 16, bad=(8,), without_image=WITHOUT_IMAGE)
    write_own_data(tmp_path / "packed", bad=(8,), **PACKED)
    write_own_data(tmp_path / "skipped", **SKIPPED)
    (tmp_path / "runs.json").write_text(json.dumps(list(runs)))
    result = launch(ROOT / "configuration/accelerate/ddp.yaml", PROGRAM, tmp_path, "--mixed_precision", "no")
    assert result.returncode == 0, result.stderr[-12000:]
    evaluated = [json.loads(file.read_text()) for file in tmp_path.glob("evaluated *.json")]
    assert len(evaluated) == (2 if "streaming" in runs else 0)
    assert len(set(evaluated)) <= 1
    for name in runs:
        whole = run(name, tmp_path, 1)
        logged = json.loads((tmp_path / f"{name}.json").read_text())
        expected = figures(whole)
        if name == "streaming":  # of 15 rows, one is evaluated twice
            assert evaluated[0] == pytest.approx(whole.evaluate(whole.train_dataset)["eval_loss"], rel=0.1)
        assert [entry["step"] for entry in logged] == [entry["step"] for entry in expected]
        for entry, other in zip(logged, expected):
            assert {"loss", "aux_loss", "z_loss", "grad_norm"} <= other.keys() or "loss" not in other
            for key, value in other.items():
                if "aux_loss" in key or "z_loss" in key or key in ("loss", "grad_norm"):
                    assert entry[key] == pytest.approx(value, rel=2e-4, abs=2e-4), (name, other["step"], key)
        for tensor_name, tensor in torch.load(tmp_path / f"{name}.pt").items():
            message = f"{name}: {tensor_name}"
            torch.testing.assert_close(tensor, tensors(whole)[tensor_name], atol=1e-5, rtol=1e-4, msg=message)
        if "skipped" in name:
            for number in (1, 2):
                lines = (tmp_path / f"{name}, {number}.jsonl").read_text().splitlines()
                skipped = [(entry["source"][-7], entry["row"], entry["kind"]) for entry in map(json.loads, lines)]
                kinds = {i: "broken image" if i in SKIPPED["broken"] else "missing file" for i in BAD}
                assert sorted(skipped) == [(str(i // 20), i % 20, kinds[i]) for i in BAD]
            assert expected[2]["loss"] == logged[2]["loss"] == 0.0
        if "packed" in name:
            rows = list(whole.train_dataset)[4:8] if "skipped" in name else whole.train_dataset.take(4)
            assert whole.data_collator(list(rows))["input_ids"].shape[0] < 4
