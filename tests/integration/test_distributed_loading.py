"""Tensor, expert and fully sharded parallelism over two processes, through the plans of the configuration."""

import torch

from tests.conftest import make_model
from tests.processes import run_in_processes

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig
from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from tests.conftest import make_inputs

torch.set_num_threads(1)
dist.init_process_group("gloo")
for arrangement in ("joint", "hybrid", "isolated", "pools"):
    folder = f"{sys.argv[1]}/{arrangement}"
    whole = SparseMoeVlmForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = whole(**make_inputs()).logits
    for sizes in ({"tp_size": 2}, {"tp_size": 2, "ep_size": 2}, {"fsdp_size": 2}):
        sharded = SparseMoeVlmForConditionalGeneration.from_pretrained(
            folder, distributed_config=DistributedConfig(**sizes)
        ).eval()
        with torch.no_grad():
            logits = sharded(**make_inputs()).logits
        logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4, msg=f"{arrangement} {sizes}")
        # Every process holds half of every expert stack.
        for name, parameter in sharded.named_parameters():
            if ".experts." in name or "expert_pools" in name:
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                assert 2 * local.numel() == whole.get_parameter(name).numel(), (arrangement, sizes, name)
print(f"rank {dist.get_rank()} is done")
dist.destroy_process_group()
"""


def test_every_plan_gives_what_one_process_gives(tmp_path):
    for arrangement in ("joint", "hybrid", "isolated"):
        make_model(expert_groups=arrangement, vocab_size=100).save_pretrained(tmp_path / arrangement)
    pools = make_model(expert_pool=[0, 0], learned_modality_priors=True, vocab_size=100)
    for layer in pools.model.language_model.layers:
        torch.nn.init.normal_(layer.self_attn.modality_log_priors)
    pools.save_pretrained(tmp_path / "pools")
    result = run_in_processes(SCRIPT, tmp_path)
    assert result.returncode == 0, result.stderr[-12000:]
    assert result.stdout.count("is done") == 2
