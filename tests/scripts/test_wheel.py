"""The command as installed from a wheel, in an environment that cannot see the repository."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from modeling_sparse_moe_vlm.toolbox.commands.main import VERBS
from tests.scripts.conftest import train_arguments
from tests.support.processes import ROOT


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory) -> Path:
    """Programs of a virtual environment with the wheel. It uses the other installed packages of these tests."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "outputs", ".*", "tests", "docs")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip"]
    # With PYTHONPATH, pip would treat the metadata of a clone as an installed package.
    without_path = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", folder, source],
        check=True,
        env=without_path,
    )
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    (wheel,) = folder.glob("*.whl")
    install = [*pip, "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(install, check=True, env=without_path)
    (packages,) = folder.glob("venv/lib/*/site-packages")
    # Only the path of the packages, so that editable installs in it have no effect.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "venv/bin"


@pytest.fixture
def command(bin_folder, tmp_path):
    """Runs the command in an empty folder."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [bin_folder / "sparse-moe-vlm", *arguments],
            cwd=tmp_path,
            env=kept | environment,
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.slow
def test_help_is_fast(command):
    for arguments in ([], ["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)):
        result = command(*arguments, PYTHONPROFILEIMPORTTIME="1")
        assert result.returncode == 0, result.stderr
        assert "sparse-moe-vlm" in result.stdout
        imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
        assert "modeling_sparse_moe_vlm.toolbox.commands.main" in imported
        assert not imported & {"torch", "transformers", "datasets", "peft", "matplotlib"}, arguments


@pytest.mark.slow
def test_trains_and_uses_a_model(command, tmp_path):
    """The shell lines of the README's quickstart, with fewer steps, and other verbs with the same model."""
    lines = re.findall(r"^sparse-moe-vlm (?:train|generate) .+$", (ROOT / "README.md").read_text(), re.MULTILINE)
    training, *asking = (shlex.split(line)[1:] for line in lines)
    assert training == ["train", "--recipe", "quickstart"]
    assert asking
    arguments = [argument for argument in train_arguments(tmp_path, max_steps=1) if argument.startswith("--set")]
    result = command(*training, *arguments, "--json")
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout)) == {"training_seconds", "test", "test_style"}
    assert "active per image token" in result.stderr
    for line in asking:
        result = command(*line)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "outputs/quickstart/answers.png").exists()
    model = tmp_path / "outputs/quickstart/model"
    assert (model / "README.md").read_text().count("expert groups") == 1
    sizes = json.loads(command("info", "tiny", str(model), "--json").stdout)
    assert [size["model"] for size in sizes] == ["tiny", str(model)]
    assert sizes[0]["total"] > 1e6

    # The page needs files that are not Python.
    result = command("routing-report", str(model), "--num-examples", "2", "--num-drawn", "0")
    assert result.returncode == 0, result.stderr
    assert "prefers-color-scheme: dark" in (tmp_path / "routing-report.html").read_text()

    options = ["--model", "outputs/quickstart/model", "--recipe", "attention", "--set=training.save_steps=1"]
    result = command("lora", *arguments, *options)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "outputs/lora/attention/adapter/adapter_config.json").exists()


@pytest.mark.extensive
@pytest.mark.slow
def test_launchers_start_the_command(bin_folder, tmp_path):
    for number, program in enumerate(
        (["--no-python", bin_folder / "sparse-moe-vlm"], ["-m", "modeling_sparse_moe_vlm.toolbox.commands"])
    ):
        output_dir = tmp_path / str(number)
        torchrun = [bin_folder / "python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        arguments = [*train_arguments(output_dir, max_steps=1), "--set=training.use_cpu=true"]
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        result = subprocess.run(
            [*torchrun, *program, "train", *arguments],
            cwd=tmp_path,
            env=kept | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr[-8000:]
        assert result.stdout.count("Wrote the model") == 1
        assert (output_dir / "model/README.md").exists()


@pytest.mark.extensive
@pytest.mark.slow
def test_mistakes_end_with_exit_code_2(command):
    for arguments in (["train", "--recipe", "nope"], ["train", "--nope"], ["nope"], ["explain"]):
        result = command(*arguments)
        assert result.returncode == 2, arguments
        assert "Traceback" not in result.stderr
