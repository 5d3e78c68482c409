"""Errors in one of several processes are reported, and end the job instead of letting the others wait."""

import time

import pytest

from tests.support.models import make_model
from tests.support.processes import run_in_processes

pytestmark = pytest.mark.slow

REFUSED = """
import os, resource, sys
import torch
import torch.distributed as dist
from transformers.distributed.configuration_utils import DistributedConfig
from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration

torch.set_num_threads(1)
dist.init_process_group("gloo")


def load(name, **sizes):
    return SparseMoeVlmForConditionalGeneration.from_pretrained(
        f"{sys.argv[1]}/{name}", distributed_config=DistributedConfig(**sizes)
    )


for name, sizes in (
    ("odd group", {"fsdp_size": 2, "ep_size": 2}),
    ("odd heads", {"tp_size": 2}),
    ("cut off", {"fsdp_size": 2, "ep_size": 2}),
):
    try:
        load(name, **sizes)
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", flush=True)
model = load("good", fsdp_size=2, ep_size=2)  # the processes still work together
if dist.get_rank() == 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # as if the disk were full
model.save_pretrained(f"{sys.argv[1]}/saved")
print("never said")
"""

TRAINING = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from tests.support import small_training

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=5))
batches = []


def collate(rows):
    batches.append(rows)
    if os.environ["RANK"] == "1" and len(batches) == 3:
        {failure}
    return collate_as_usual(rows)


collate_as_usual, small_training.collate = small_training.collate, collate
folder = Path(sys.argv[1])
sizes = {{"fsdp_size": 2, "ep_size": 2}}
small_training.train(folder / "good", folder, sizes)
print("never said")
"""


@pytest.mark.extensive
def test_models_that_cannot_be_split_and_incomplete_checkpoints(tmp_path):
    groups = [
        {"name": "text", "num_experts": 4, "modalities": ["text"]},
        {"name": "image", "num_experts": 3, "modalities": ["image"]},
    ]
    make_model(expert_groups=groups, num_experts=None).save_pretrained(tmp_path / "odd group")
    make_model(num_attention_heads=3, num_key_value_heads=3, head_dim=8).save_pretrained(tmp_path / "odd heads")
    for name in ("cut off", "good"):
        make_model().save_pretrained(tmp_path / name)
    weights = tmp_path / "cut off" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = run_in_processes(REFUSED, tmp_path)
    assert result.returncode != 0
    assert "never said" not in result.stdout
    assert "File too large" in result.stderr  # the error of the system about the limit
    assert not list((tmp_path / "saved").glob("*.safetensors*"))
    for message in (
        "odd group: the 3 experts of the group 'image' cannot be divided evenly among 2 processes",
        "odd heads: `num_attention_heads` (3) cannot be divided evenly among 2 processes",
        f"cut off: {weights} is incomplete",
    ):
        assert result.stdout.count(message) == 2, result.stdout + result.stderr[-4000:]


@pytest.mark.extensive
def test_a_process_that_dies(tmp_path):
    make_model().save_pretrained(tmp_path / "good")
    result = run_in_processes(TRAINING.format(failure="os.kill(os.getpid(), signal.SIGKILL)"), tmp_path, timeout=120)
    assert result.returncode != 0
    assert "never said" not in result.stdout
    assert "SIGKILL" in result.stderr


@pytest.mark.extensive
def test_a_process_that_hangs(tmp_path):
    """The other processes wait for it until the timeout of the process group."""
    make_model().save_pretrained(tmp_path / "good")
    start = time.monotonic()
    result = run_in_processes(TRAINING.format(failure="time.sleep(600)"), tmp_path, timeout=120)
    assert time.monotonic() - start < 100
    assert result.returncode != 0
    assert "never said" not in result.stdout
    assert "Timed out waiting 5000ms" in result.stderr, result.stderr[-4000:]
