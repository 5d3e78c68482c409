"""What the benchmarks share: interleaved timing, and one form of report.

Every benchmark prints a table and, with `--json`, as its last line one object::

    {"benchmark", "device", "versions", "rows": [{"case", "metric", "ours", "peer", "ratio", "bar", "holds"}], "holds"}

`ratio` is ours / peer, of medians measured in turn in one process; `bar` is the largest ratio that holds, or null.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

MIN_REPETITIONS = 7


@dataclass
class Row:
    """One comparison: `ours` and `peer` in seconds (or bytes), and the largest ratio that is good enough."""

    case: str
    metric: str
    ours: float
    peer: float
    bar: float | None = None

    @property
    def ratio(self) -> float:
        return self.ours / self.peer

    @property
    def holds(self) -> bool:
        return self.bar is None or self.ratio <= self.bar


def parse_arguments(description: str | None, *, repetitions: int = 15, **own: dict[str, object]) -> argparse.Namespace:
    """
    `--json`, `--quick`, `--repetitions` and `--device`, and what a benchmark has of its own: by the option's name, the
    arguments of `add_argument`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, within a minute")
    parser.add_argument(
        "--repetitions", type=int, default=repetitions, help=f"timed runs of each, at least {MIN_REPETITIONS}"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, options in own.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    arguments = parser.parse_args()
    if arguments.repetitions < MIN_REPETITIONS:
        parser.error(f"--repetitions must be at least {MIN_REPETITIONS}")
    return arguments


def time_interleaved(runs: dict[str, Callable[[], object]], device: str, repetitions: int) -> dict[str, float]:
    """
    Median seconds of each run. The runs take turns, each time in another order, so that a drift of the machine and what
    the run before left in the caches meet all alike.

    Args:
        runs (`dict[str, Callable]`): What is timed, by name.
        device (`str`): `"cuda"` waits for the device around each run.
        repetitions (`int`): Timed runs of each; two more come first, to warm up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for repetition in range(-2, repetitions):
        for name in order.sample(list(runs), len(runs)):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            runs[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def report(benchmark: str, device: str, rows: list[Row], as_json: bool) -> None:
    """Prints the table and, if asked, the JSON object."""
    print(f"\n{benchmark} on {device_name(device)}")
    print(f"{'case':<44}{'metric':<34}{'ours':>11}{'peer':>11}{'ratio':>8}{'bar':>7}  holds")
    for row in rows:
        bar = "" if row.bar is None else f"{row.bar:.2f}"
        print(
            f"{row.case:<44}{row.metric:<34}{row.ours:>11.4g}{row.peer:>11.4g}{row.ratio:>8.3f}{bar:>7}  "
            f"{'' if row.bar is None else 'yes' if row.holds else 'NO'}"
        )
    if as_json:
        print_json(benchmark, device, [asdict(row) | {"ratio": row.ratio, "holds": row.holds} for row in rows])


def print_json(benchmark: str, device: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Prints the JSON object, with what a benchmark adds to it; what is not a number cannot be in it."""
    result = {
        "benchmark": benchmark,
        "device": device_name(device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": rows,
        "holds": all(row["holds"] for row in rows),
    }
    print(json.dumps(result | more, allow_nan=False))
