"""The memory that upcycling a checkpoint takes, in a separate process."""

import json
import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.processes import ROOT

MEGABYTE = 1e6
SLACK = 64 * MEGABYTE  # for the allocator and the libraries
PROGRAM = """
import json, sys
from pathlib import Path
from modeling_sparse_moe_vlm.toolbox.upcycling.checkpoints import plan_checkpoint, upcycle_checkpoint

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

dense, output, compare = sys.argv[1:]
plan = plan_checkpoint(dense)
before = peak()
upcycle_checkpoint(dense, output, compare=compare == "compare")
sizes = {"dense": plan.dense.bytes["float32"], "sparse": plan.sparse.bytes["float32"]}
print(json.dumps({"peak": peak() - before, **sizes}))
"""


@pytest.mark.extensive
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("compare", ["compare", "blocks"])
def test_at_most_the_dense_model_and_one_sparse_layer(compare, tmp_path):
    num_layers = 24
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    arguments = [sys.executable, "-c", PROGRAM, tmp_path / "dense", tmp_path / "sparse", compare]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    layer = 4 * 3 * 256 * 1024 * 9  # eight routed experts, and one that is always on
    assert figures["sparse"] > figures["dense"] + 20 * layer
    # While a stack is written, it is in memory twice: as a whole, and split into experts.
    bound = 2 * layer if compare == "blocks" else figures["dense"] + layer
    assert figures["peak"] < bound + SLACK, figures
