"""Tensor, expert and fully sharded parallelism of upcycled models, in two processes."""

import pytest

from tests.support.processes import run_in_processes
from tests.support.upcycled import make_dense, make_upcycled

MODELS = {
    "llava": ("llava", {"expert_groups": "isolated"}),
    "llama": ("llama", {"expert_groups": "hybrid"}),
    "qwen3_vl": ("qwen3_vl", {"expert_groups": "joint", "layers": [1]}),
    "pools": ("llava", {"expert_groups": "isolated", "expert_pool": [0, 0], "pool_start": "first"}),
}
SIZES = [{"tp_size": 2}, {"tp_size": 2, "ep_size": 2}, {"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}]

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig
from modeling_sparse_moe_vlm import modeling_upcycled
from tests.support.upcycled import make_inputs, make_rows
from tests.support.batches import collate
from tests.toolbox.upcycling.test_processes_of_upcycled import MODELS, SIZES

CLASSES = {
    "llava": modeling_upcycled.UpcycledLlavaForConditionalGeneration,
    "qwen3_vl": modeling_upcycled.UpcycledQwen3VLForConditionalGeneration,
    "llama": modeling_upcycled.UpcycledLlamaForCausalLM,
}
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


for name, (kind, _) in MODELS.items():
    path, rows = f"{sys.argv[1]}/{name}", make_rows(kind, 4)
    model = CLASSES[kind].from_pretrained(path).train()
    # Both have an image: a base model whose tower only runs in some processes waits for the others under FSDP.
    batches = [collate(rows[:2]), collate(rows[2:])]
    losses = [model(**batch).loss for batch in batches]
    answer = model.eval().generate(**make_inputs(kind), max_new_tokens=4, do_sample=False)
    model.train()
    for sizes in SIZES:
        case = f"{name} {sizes}"
        spread = CLASSES[kind].from_pretrained(path, distributed_config=DistributedConfig(**sizes)).train()
        mine = [rank] if "fsdp_size" in sizes else [0]
        loss = spread(**batches[mine[0]]).loss
        torch.testing.assert_close(full(loss), losses[mine[0]], atol=1e-4, rtol=1e-4, msg=case)
        loss.backward()
        model.zero_grad()
        everywhere = [0, 1] if "fsdp_size" in sizes else [0]
        (sum(model(**batches[number]).loss for number in everywhere) / len(everywhere)).backward()
        for key, parameter in spread.named_parameters():
            expected = model.get_parameter(key).grad
            if expected is not None or parameter.grad is not None:
                expected = torch.zeros_like(model.get_parameter(key)) if expected is None else expected
                gradient = torch.zeros_like(expected) if parameter.grad is None else full(parameter.grad)
                difference = (gradient - expected).abs().max()
                assert difference <= 1e-4 + 1e-3 * expected.abs().max(), f"{case} {key} {difference}"
            if ".experts." in key or "expert_pools" in key:
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                assert 2 * local.numel() == model.get_parameter(key).numel(), f"{case} {key}"
        spread.eval()
        found = spread.generate(**make_inputs(kind), max_new_tokens=4, do_sample=False)
        assert torch.equal(found, answer), case
print(f"rank {rank} is done")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.extensive
def test_every_plan_has_the_loss_gradients_and_answer_of_one_process(tmp_path):
    for name, (kind, fields) in MODELS.items():
        dense = make_dense(kind, vocab_size=100)
        fields = fields | {"output_router_logits": True, "router_aux_loss_coef": 0.1}
        model = make_upcycled(kind, dense=dense, **fields)
        model.save_pretrained(tmp_path / name)
    result = run_in_processes(SCRIPT, tmp_path)
    assert result.returncode == 0, result.stderr[-12000:]
    assert result.stdout.count("is done") == 2
