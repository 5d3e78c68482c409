"""Runs programs in several processes."""

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
# At the exit of a busy interpreter, threads of torch sometimes end too late, and the process aborts.
LEAVE = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"


def run_in_processes(program: str, folder: Path, number: int = 2, timeout: float = 300) -> subprocess.CompletedProcess:
    """Writes the program to the folder and runs it with `torchrun`. The folder is its first argument."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    return _run(launcher, program, folder, timeout)


def launch(
    config_file: Path, program: str, folder: Path, *options: str, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Runs the program with `accelerate launch` in the same way."""
    # Port 0 means any free port. By default, all programs use the same one.
    launcher = ["accelerate.commands.launch", "--config_file", str(config_file), "--main_process_port", "0", *options]
    return _run(launcher, program, folder, timeout)


def run_alone(program: str, folder: Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """Writes the program to the folder and runs it in a process. The folder is its first argument."""
    script = folder / "script.py"
    script.write_text(program)
    return subprocess.run(
        [sys.executable, str(script), str(folder)],
        cwd=ROOT,
        env=_environment(folder),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def _environment(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}


def _run(launcher: list[str], program: str, folder: Path, timeout: float) -> subprocess.CompletedProcess:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(program) + LEAVE)
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, str(script), str(folder)],
        cwd=ROOT,
        env=_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher stops the processes that it has started
        output, errors = process.communicate()
        raise AssertionError(f"not done after {timeout} seconds: {output[-4000:]} {errors[-4000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
