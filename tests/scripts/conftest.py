"""How scripts are run: in a process of their own, or faster in that of the tests."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# A run of seconds: few pictures, and what the recipe spends processes on left out.
SMALL_RUN = {
    "data.num_train": 44,
    "data.num_heldout": 11,
    "training.max_steps": 2,
    "training.per_device_train_batch_size": 4,
    "training.logging_steps": 1,
    "training.save_steps": 2,
    "training.dataloader_num_workers": 0,
    "training.dataloader_persistent_workers": "false",
}


def train_arguments(output_dir: Path, **changes) -> list[str]:
    """Arguments of a small run of train.py; changes as `max_steps=4` are those of its `training`."""
    values = SMALL_RUN | {f"training.{key}": value for key, value in changes.items()}
    return ["--output-dir", str(output_dir), *(f"--set={key}={value}" for key, value in values.items())]


def run_train(cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPTS / "train.py", *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """Output folder of a small run in a process of its own, started outside the repository, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    result = run_train(folder, *train_arguments(folder / "output"))
    assert result.returncode == 0, result.stderr
    return folder / "output", result.stdout


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs a script in this process and returns what it printed."""

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        return capsys.readouterr().out

    return run
