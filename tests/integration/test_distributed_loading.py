"""Tensor, expert and fully sharded parallelism over two and four processes, through the plans of the configuration."""

import json

import pytest
import torch

from tests.support.models import make_model
from tests.support.processes import run_in_processes

pytestmark = pytest.mark.newest

# The models cover all cases in which experts receive the sentinel id, and all modules in which experts can be.
MODELS = {
    "hybrid": {},
    "isolated": {"expert_groups": "isolated"},
    "top_p": {"expert_groups": "joint", "router": "top_p"},
    "pools": {"expert_pool": [0, 0], "learned_modality_priors": True},
    "pools of groups": {"expert_pool": [0, 0], "expert_groups": "isolated"},
}
SIZES = {
    2: [
        {"tp_size": 2},
        {"tp_size": 2, "ep_size": 2},
        {"fsdp_size": 2},
        {"fsdp_size": 2, "ep_size": 2},
    ],
    4: [
        {"tp_size": 4},
        {"tp_size": 2, "fsdp_size": 2, "ep_size": 4},
        {"fsdp_size": 4, "ep_size": 2},
    ],
}

SCRIPT = """
import json
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig
from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from tests.support.models import make_inputs
from tests.integration.test_distributed_loading import MODELS, SIZES
from tests.integration.test_trainer import make_rows
from tests.support.batches import collate

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
rows = make_rows(world_size)[::-1]  # every other row has no image, so with as many batches some ranks see none
whole_batch = collate(rows)
num_targets = int((whole_batch["labels"][:, 1:] != -100).sum())


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(model, path, sizes, experts):
    sharded = SparseMoeVlmForConditionalGeneration.from_pretrained(
        path, experts_implementation=experts, distributed_config=DistributedConfig(**sizes)
    ).train()
    num_batches = sizes.get("fsdp_size", 1)
    mine = slice(rank // (world_size // num_batches), None, num_batches)
    batch = collate(rows[mine])
    outputs = sharded(**batch, num_items_in_batch=num_targets)
    outputs.loss.backward()
    case = f"{path} {sizes} {experts}"
    length = batch["input_ids"].shape[1]
    expected = model.last_logits[mine][:, :length]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(full(outputs.logits)[real], expected[real], atol=1e-4, rtol=1e-4, msg=case)
    for name, parameter in sharded.named_parameters():
        # Sharded data parallelism averages over the batches.
        gradient = full(parameter.grad) * num_batches
        expected_gradient = model.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-3, msg=f"{case} {name}")
        # Every process has its part of every stack of experts.
        if ".experts." in name or "expert_pools" in name:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            assert world_size * local.numel() == expected_gradient.numel(), f"{case} {name}"
    sharded.eval()
    with torch.no_grad():
        logits = full(sharded(**batch).logits)
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=1e-4, msg=case)
    if experts == "grouped_mm":
        # All processes generate from the same inputs, with and without data parallelism.
        assert torch.equal(sharded.generate(**make_inputs(), max_new_tokens=4), model.answer), case


names, implementations = json.loads(Path(sys.argv[1], "cases.json").read_text())
for name in names:
    path = f"{sys.argv[1]}/{name}"
    for experts in implementations:
        model = SparseMoeVlmForConditionalGeneration.from_pretrained(path, experts_implementation=experts).train()
        outputs = model(**whole_batch, num_items_in_batch=num_targets)
        outputs.loss.backward()
        model.last_logits = outputs.logits.detach()
        model.answer = model.eval().generate(**make_inputs(), max_new_tokens=4)
        for sizes in SIZES[world_size]:
            if experts == "grouped_mm" or ("ep_size" in sizes and name == "isolated"):
                compare(model, path, sizes, experts)
print(f"rank {rank} is done")
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("world_size", "names", "implementations"),
    [
        (2, ["hybrid", "pools of groups"], ["grouped_mm"]),
        pytest.param(2, list(MODELS), ["eager", "grouped_mm", "batched_mm"], marks=pytest.mark.extensive),
        pytest.param(4, ["isolated", "top_p", "pools"], ["grouped_mm"], marks=pytest.mark.extensive),
    ],
    ids=["few", "2", "4"],
)
def test_every_plan_gives_the_logits_and_gradients_of_one_process(tmp_path, world_size, names, implementations):
    (tmp_path / "cases.json").write_text(json.dumps([names, implementations]))
    for name, fields in MODELS.items():
        model = make_model(
            vocab_size=100,
            num_experts=8,
            num_key_value_heads=4,
            moe_intermediate_size=32,  # grouped_mm needs rows of a multiple of 16 bytes
            **fields,
        )
        for parameter_name, parameter in model.named_parameters():
            if "modality_log_priors" in parameter_name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / name)
    result = run_in_processes(SCRIPT, tmp_path, world_size)
    assert result.returncode == 0, result.stderr[-12000:]
    assert result.stdout.count("is done") == world_size
