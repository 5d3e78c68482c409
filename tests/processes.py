"""Programs that several processes run together."""

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
# At a busy interpreter's exit, threads of torch's are at times ended too late, and it aborts.
LEAVE = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"


def run_in_two_processes(program: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs the program under `torchrun`, written to the folder, which is also its first argument."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(program) + LEAVE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
