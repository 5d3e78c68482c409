"""
Runs the numeric tests and every benchmark on a GPU, and writes one table.

    python scripts/gpu.py

`make gpu` installs the package and then runs this script. If torch finds no GPU, everything runs on the CPU with small
sizes (`--quick`), so that the command itself is tested.

Results go to `outputs/gpu/<device>-<date>/`: the JSON object and the log of every benchmark, and `table.md` for all of
them. An interrupted run resumes: steps that have finished do not run again, unless you pass `--again`. If a test or a
benchmark fails, the others still run, and the exit code is 1. A ratio above its bar is shown, but is not a failure.
Everything ends within `--minutes`. Run the command again for the steps that are left then.

Benchmarks that train models (`expert_pools`, `upcycling`, `modality_ablation`) compare quality, which does not depend
on the device, and take long. They always run with `--quick` here. Run their own scripts for the full benchmarks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import harness
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
KEYS = ("benchmark", "device", "versions", "rows", "holds")
ROW_KEYS = ("case", "metric", "ours", "peer", "ratio", "bar", "holds")
TESTS = "tests"
SHOWN_LINES = 20  # of the output of a failed step


@dataclass(frozen=True)
class Benchmark:
    """
    One run of a benchmark.

    Args:
        name (`str`): Name of the run.
        script (`str`): Name of the script in `scripts/benchmarks/`.
        options (`tuple[str, ...]`): Options of a full run, in addition to `--json` and `--device`.
        needs_gpu (`bool`): Whether the sizes are only for a GPU.
        is_long (`bool`): Whether it always runs with `--quick`.
        limit (`int`): Seconds after which it is stopped.
    """

    name: str
    script: str
    options: tuple[str, ...] = ()
    needs_gpu: bool = False
    is_long: bool = False
    limit: int = 150


BENCHMARKS = (
    Benchmark("moe_layer", "moe_layer"),
    Benchmark("expert_lora_large", "expert_lora", ("--size", "large"), needs_gpu=True),
    Benchmark("attention_readout", "attention_readout"),
    Benchmark("expert_offload", "expert_offload"),
    Benchmark("throughput", "throughput"),
    Benchmark("expert_lora", "expert_lora"),
    Benchmark("packing", "packing"),
    Benchmark("expert_pools", "expert_pools", is_long=True),
    Benchmark("upcycling", "upcycling", is_long=True),
    Benchmark("modality_ablation", "modality_ablation", is_long=True),
    Benchmark("quantization", "quantization", is_long=True),
)
TESTS_LIMIT = 300


class Failure(Exception):
    """A step has failed. The message says how."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    folder = options.output or ROOT / "outputs/gpu" / folder_name(options.device, options.quick)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{harness.device_name(options.device)}; results go to {folder}")
    for problem in missing_requirements():
        print(f"warning: {problem}")
    failures: dict[str, str] = {}
    deadline = time.monotonic() + 60 * options.minutes
    try:
        for name in options.only:
            try:
                run_step(name, folder, options, deadline)
            except Failure as failure:
                failures[name] = str(failure)
                print(f"{name} FAILED: {failure}", flush=True)
    finally:  # also after an interrupt
        table = make_table(folder, options, failures)
        (folder / "table.md").write_text(table)
        print(f"\n{table}")
    return 1 if failures else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device",
        type=harness.known_device,
        default=harness.default_device(),
        help="device to run on (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="use small sizes; always set on the CPU")
    parser.add_argument("--again", action="store_true", help="also run steps that have finished before")
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.5, help="time limit of all steps (default: %(default)s)")
    steps = [TESTS, *(benchmark.name for benchmark in BENCHMARKS)]
    parser.add_argument(
        "--only", nargs="+", choices=steps, metavar="STEP", help=f"run only these steps: some of {', '.join(steps)}"
    )
    options = parser.parse_args(arguments)
    on_gpu = harness.is_cuda(options.device)
    options.quick = options.quick or not on_gpu
    if options.only is None:
        gpu_sizes = {benchmark.name for benchmark in BENCHMARKS if benchmark.needs_gpu}
        options.only = [step for step in steps if step not in gpu_sizes or not options.quick]
    return options


def folder_name(device: str, quick: bool) -> str:
    """Returns a name from the device and the date. Results of small sizes have a separate folder."""
    slug = re.sub(r"[^a-z0-9]+", "-", harness.device_name(device).lower()).strip("-")
    return f"{slug}-{date.today().isoformat()}{'-quick' if quick else ''}"


def missing_requirements() -> list[str]:
    """Returns the requirements of the package that are missing here or have the wrong version."""
    problems = []
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        requirement = Requirement(text)
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            problems.append(f"{text} is required, but is not installed")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{text} is required, but {found} is installed")
    return problems


def run_step(name: str, folder: Path, options: argparse.Namespace, deadline: float) -> None:
    """Runs the tests or a benchmark, unless it has finished before, and writes its JSON object."""
    benchmark = next((each for each in BENCHMARKS if each.name == name), None)
    command = tests_command(options.device, folder) if benchmark is None else benchmark_command(benchmark, options)
    path = folder / f"{name}.json"
    if not options.again and has_finished(path, command):
        print(f"{name}: finished before", flush=True)
        return
    path.unlink(missing_ok=True)
    start = time.monotonic()
    limit = min(TESTS_LIMIT if benchmark is None else benchmark.limit, int(deadline - start))
    if limit <= 0:
        raise Failure("there was no time left")
    print(f"{name} …", flush=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if benchmark is not None and harness.is_cuda(options.device):
        environment["CUDA_VISIBLE_DEVICES"] = visible_gpu(options.device)
    printed = run(command, folder / f"{name}.log", environment, limit)
    result = read_tests(printed) if benchmark is None else read_result(printed)
    seconds = round(time.monotonic() - start, 1)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result | {"command": command, "seconds": seconds}, indent=1))
    unfinished.replace(path)
    print(f"{name}: {seconds:.0f} s", flush=True)


def tests_command(device: str, folder: Path) -> list[str]:
    workers = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadgroup"] if is_installed("pytest-xdist") else []
    return [sys.executable, "-m", "pytest", str(ROOT / "tests"), "-m", "numeric", "--device", device, *workers]


def benchmark_command(benchmark: Benchmark, options: argparse.Namespace) -> list[str]:
    # The process sees only one GPU, which is the first one.
    device = "cuda" if harness.is_cuda(options.device) else options.device
    command = [sys.executable, str(ROOT / f"scripts/benchmarks/{benchmark.script}.py"), "--json", "--device", device]
    return [*command, "--quick"] if options.quick or benchmark.is_long else [*command, *benchmark.options]


def is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def visible_gpu(device: str) -> str:
    """Returns the value of `CUDA_VISIBLE_DEVICES` with which a process sees only this GPU."""
    index = int(device.partition(":")[2] or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index].strip() if visible else str(index)


def has_finished(path: Path, command: list[str]) -> bool:
    try:
        return json.loads(path.read_text())["command"] == command
    except (OSError, ValueError, KeyError):
        return False


def run(command: list[str], log: Path, environment: dict[str, str], limit: int) -> str:
    """
    Runs a command. If it does not end in time, its child processes are stopped as well.

    Returns:
        `str`: The standard output of the command.

    Raises:
        Failure: If the command fails, or does not end within `limit` seconds.
    """
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        try:
            printed, _ = process.communicate(timeout=limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # also stops its child processes
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Failure(f"it did not end within {limit} s; see {log}") from error
            raise
    with log.open("a") as file:
        file.write(printed)
    if process.returncode != 0:
        lines = log.read_text().splitlines()[-SHOWN_LINES:]
        raise Failure(f"exit code {process.returncode}; see {log}\n" + "\n".join(f"    {line}" for line in lines))
    return printed


def read_tests(printed: str) -> dict[str, Any]:
    """Returns the numbers of passed and skipped tests, from the last line that pytest prints."""
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|skipped)", printed.splitlines()[-1])}
    if not counts.get("passed"):
        raise Failure("no test passed")
    return {"passed": counts["passed"], "skipped": counts.get("skipped", 0)}


def read_result(printed: str) -> dict[str, Any]:
    """
    Returns the JSON object that a benchmark prints as its last line.

    Raises:
        Failure: If the line is not JSON, or does not have the format that all benchmarks share.
    """
    lines = printed.splitlines()
    try:
        result = json.loads(lines[-1] if lines else "", parse_constant=_refuse)
    except ValueError as error:
        raise Failure(
            f"the last line is not JSON ({error}): {lines[-1] if lines else 'nothing was printed'}"
        ) from error
    missing = [key for key in KEYS if not isinstance(result, dict) or key not in result]
    if missing:
        raise Failure(f"the JSON object has no {', '.join(missing)}")
    if not result["rows"]:
        raise Failure("the JSON object has no rows")
    for row in result["rows"]:
        if missing := [key for key in ROW_KEYS if key not in row]:
            raise Failure(f"the row {row} has no {', '.join(missing)}")
    if result["holds"] != all(row["holds"] for row in result["rows"]):
        raise Failure("`holds` must be true if and only if it is true in all rows")
    return result


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def make_table(folder: Path, options: argparse.Namespace, failures: dict[str, str]) -> str:
    """Returns all results of a folder as a Markdown table."""
    results = {}
    for name in [TESTS, *(benchmark.name for benchmark in BENCHMARKS)]:
        path = folder / f"{name}.json"
        if path.exists():
            results[name] = json.loads(path.read_text())
    versions = ", ".join(f"{name} {number}" for name, number in harness.versions(options.device).items())
    lines = [f"# {harness.device_name(options.device)}", "", versions, ""]
    if options.quick:
        lines += ["Small sizes (`--quick`): the times and memory sizes are not meaningful.", ""]
    if TESTS in results:
        tests = results.pop(TESTS)
        lines += [f"Numeric tests: {tests['passed']} passed, {tests['skipped']} skipped.", ""]
    lines += [f"**{name} failed**: {message.splitlines()[0]}\n" for name, message in failures.items()]
    lines += [
        "| benchmark | case | metric | ours | peer | ratio | bar | holds |",
        "| --- | --- | --- |" + " ---: |" * 4 + " --- |",
    ]
    for name, result in results.items():
        for row in result["rows"]:
            figures = (_shown(row[key]) for key in ("ours", "peer", "ratio", "bar"))
            holds = "" if row["bar"] is None else "yes" if row["holds"] else "**no**"
            lines.append(f"| {name} | {row['case']} | {row['metric']} | {' | '.join(figures)} | {holds} |")
    return "\n".join(lines) + "\n"


def _shown(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.4g}"


if __name__ == "__main__":
    sys.exit(main())
