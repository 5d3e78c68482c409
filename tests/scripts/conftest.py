"""Fixtures that run scripts: in a separate process, or in the process of the tests, which is faster."""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

from modeling_sparse_moe_vlm.toolbox.commands.main import main
from tests.support.processes import ROOT, launch
from tests.support.small_run import SMALL_RUN

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

# Accelerate shards models on the CPU only if it is made to treat the CPU as a GPU.
IN_TWO_PROCESSES = """
import os, runpy, sys
import torch
from accelerate import DistributedType, PartialState
from transformers import TrainingArguments

torch.set_num_threads(1)


def start_processes(arguments, start=TrainingArguments.__post_init__):
    start(arguments)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


TrainingArguments.__post_init__ = start_processes
sys.argv = {argv}
runpy.run_path({path!r}, run_name="__main__")
"""


def train_arguments(output_dir: Path, **changes) -> list[str]:
    """Returns the arguments of a small run of train.py. `changes` are values of its section `training`."""
    values = SMALL_RUN | {f"training.{key}": value for key, value in changes.items()}
    return ["--output-dir", str(output_dir), *(f"--set={key}={value}" for key, value in values.items())]


def run_train(cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPTS / "train.py", *arguments], cwd=cwd, capture_output=True, text=True)


def run_in_two_processes(folder: Path, launch_file: str, script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a script in two processes, as `accelerate launch` does with a launch file of this repository."""
    folder.mkdir(exist_ok=True)
    argv = [script, *arguments, "--set=training.use_cpu=true"]
    program = IN_TWO_PROCESSES.format(argv=argv, path=str(SCRIPTS / script))
    options = ["--mixed_precision", "no", "--num_processes", "2"]
    return launch(ROOT / "configuration/accelerate" / launch_file, program, folder, *options, timeout=120)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """Output folder and printed text of a small run, which is started outside of the repository in a new process."""
    base = tmp_path_factory.getbasetemp()
    # The workers of pytest-xdist have neighbouring folders and share one run.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained"
    printed = folder / "printed.txt"
    with FileLock(f"{folder}.lock"):
        if not printed.exists():
            folder.mkdir(exist_ok=True)
            result = run_train(folder, *train_arguments(folder / "output"))
            assert result.returncode == 0, result.stderr
            printed.write_text(result.stdout)
    return folder / "output", printed.read_text()


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs a script in this process and returns what it printed."""

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def run_verb(capsys):
    """Runs a verb of the command in this process and returns what it printed."""

    def run(*arguments) -> str:
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def load_benchmark(monkeypatch):
    """Imports a benchmark by name, each time as a new module."""
    monkeypatch.syspath_prepend(SCRIPTS / "benchmarks")

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"benchmarks/{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # dataclasses look up their module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def load_gpu(monkeypatch):
    """Imports gpu.py, each time as a new module."""
    monkeypatch.syspath_prepend(SCRIPTS)

    def load() -> ModuleType:
        spec = importlib.util.spec_from_file_location("gpu", SCRIPTS / "gpu.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "gpu", module)
        spec.loader.exec_module(module)
        return module

    return load
