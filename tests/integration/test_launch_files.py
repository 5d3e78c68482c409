"""
Training on the CPU with the launch files equals training in one process, even if a process sees no image. The saved
models are complete.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer
from tests.support.models import make_model
from tests.support.processes import ROOT, launch
from tests.support.small_training import train

pytestmark = [pytest.mark.slow, pytest.mark.extensive]

CONFIGURATIONS = ROOT / "configuration/accelerate"
SPARSE = "modeling_sparse_moe_vlm.toolbox.training.trainer import SparseMoeTrainer as Trainer"
PLAIN = "transformers import Trainer"
# By name: launch file, number of processes, sizes of `DistributedConfig`, number of batches per step, trainer.
LAUNCHES = {
    "ddp": ("ddp.yaml", 2, None, PLAIN),
    "fsdp2": ("fsdp2.yaml", 2, None, SPARSE),
    "fsdp2 while loading": ("expert_parallel.yaml", 2, {"fsdp_size": 2}, PLAIN),
    "experts": ("expert_parallel.yaml", 2, {"fsdp_size": 2, "ep_size": 2}, SPARSE),
    "everything": ("expert_parallel.yaml", 4, {"tp_size": 2, "fsdp_size": 2, "ep_size": 4, "dp": 2}, PLAIN),
}

SCRIPT = """
import sys
from pathlib import Path
import torch
from tests.support.small_training import train
from {trainer}

torch.set_num_threads(1)
folder = Path(sys.argv[1])
train(folder.parent / "start", folder, {sizes}, Trainer)
"""

FRESH = """
import sys
import torch
from transformers import AutoModelForImageTextToText

for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(f"{folder}/model", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    state, expected = model.state_dict(), torch.load(f"{folder}/tensors.pt")
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), f"{folder} {name}"
print("all are whole")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the initial model, and with the result of training in one process."""
    folder = tmp_path_factory.mktemp("runs")
    # Router losses are computed from the tokens of each process, so they are recorded but not trained on. The biases of
    # the routers are updated with the tokens of all processes.
    model = make_model(
        vocab_size=100,
        expert_groups="isolated",
        num_experts=8,
        output_router_logits=True,
        router_aux_loss_coef=0.0,
        router_bias_update_rate=0.05,
    )
    model.save_pretrained(folder / "start")
    for name, trainer_class in (("alone", SparseMoeTrainer), ("alone, plain", Trainer)):
        (folder / name).mkdir()
        train(folder / "start", folder / name, trainer_class=trainer_class)
    return folder


def launched(runs: Path, name: str) -> Path:
    """Returns the folder of a launch, and runs the launch first if it has not run yet."""
    folder = runs / name
    if not folder.exists():
        config_file, number, sizes, trainer = LAUNCHES[name]
        folder.mkdir()
        options = ["--mixed_precision", "no", "--num_processes", str(number)]
        result = launch(CONFIGURATIONS / config_file, SCRIPT.format(trainer=trainer, sizes=sizes), folder, *options)
        assert result.returncode == 0, result.stderr[-8000:]
    return folder


@pytest.mark.parametrize("name", LAUNCHES)
def test_training(runs, name):
    folder = launched(runs, name)
    alone = runs / ("alone" if LAUNCHES[name][-1] == SPARSE else "alone, plain")
    losses = json.loads((folder / "losses.json").read_text())
    assert losses == pytest.approx(json.loads((alone / "losses.json").read_text()), rel=1e-4)
    expected = torch.load(alone / "tensors.pt")
    for tensor_name, tensor in torch.load(folder / "tensors.pt").items():
        torch.testing.assert_close(tensor, expected[tensor_name], atol=1e-5, rtol=1e-4, msg=tensor_name)


def test_a_new_process_loads_the_saved_model(runs, tmp_path):
    folders = [str(launched(runs, name)) for name in LAUNCHES]
    (tmp_path / "script.py").write_text(FRESH)
    result = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), *folders],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "all are whole" in result.stdout, result.stderr[-8000:]
