"""Starts servers of other packages, in processes of their own."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STARTED_WITHIN = 180  # seconds


def script(name: str) -> str:
    """Returns the path of a command that is installed beside the interpreter."""
    return str(Path(sys.executable).with_name(name))


def environment(folder: Path) -> dict[str, str]:
    """Returns the environment of a process that does not find this clone and does not reach the Hub."""
    names = ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return kept | {"HOME": str(folder), "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@contextmanager
def running(*command: str, folder: Path, path: str) -> Iterator[str]:
    """Runs a server with `--port` and yields its address when it answers requests for the path."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=folder, env=environment(folder), stdout=output, stderr=output
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}{path}", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + STARTED_WITHIN
    while process.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"the server does not answer: {log.read_text()[-4000:]}")
