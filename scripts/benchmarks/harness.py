"""Timing, memory measurement and reports, shared by the benchmarks.

Every benchmark accepts `--json`, `--quick` and `--device`. It prints a table and, with `--json`, a JSON object as the
last line::

    {"benchmark", "device", "versions", "rows": [{"case", "metric", "ours", "peer", "ratio", "bar", "holds"}], "holds"}

`ratio` is ours / peer. `bar` is the largest acceptable ratio, or null if there is no limit. `peer` and `ratio` are null
if there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

MIN_REPETITIONS = 7
LIBRARIES = ("torch", "transformers", "accelerate", "peft")
DEMO = "outputs/demo/model"
# The option `--model` of benchmarks of a trained model: see `find_demo`.
MODEL_OPTION = {"default": DEMO, "help": "path to a checkpoint, or its name on the Hub (default: %(default)s)"}


@dataclass
class Row:
    """
    One comparison.

    Args:
        case (`str`): The measured case, including its sizes.
        metric (`str`): Name of the metric.
        ours (`float`): Our result, in seconds, bytes or as a loss.
        peer (`float`): Result of the implementation that ours is compared with.
        bar (`float`, *optional*): The largest acceptable ratio.
    """

    case: str
    metric: str
    ours: float
    peer: float
    bar: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.ours / self.peer if self.peer else None

    @property
    def holds(self) -> bool:
        return self.bar is None or (self.ratio is not None and self.ratio <= self.bar)

    def as_dict(self) -> dict[str, Any]:
        figures = asdict(self)
        bar = figures.pop("bar")
        return figures | {"ratio": self.ratio, "bar": bar, "holds": self.holds}


def parse_arguments(description: str | None, *, repetitions: int = 15, **own: dict[str, Any]) -> argparse.Namespace:
    """
    Reads the options of a benchmark that measures speed: those of [`make_parser`] and `--repetitions`.

    Args:
        description (`str`): Text for `--help`.
        repetitions (`int`): Default of `--repetitions`.
        **own (`dict[str, Any]`): Further options: arguments of `add_argument`, by name of the option.
    """
    parser = make_parser(description, **own)
    parser.add_argument(
        "--repetitions",
        type=int,
        default=repetitions,
        help=f"number of timed runs of each variant, at least {MIN_REPETITIONS}",
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repetitions = MIN_REPETITIONS
    if arguments.repetitions < MIN_REPETITIONS:
        parser.error(f"--repetitions must be at least {MIN_REPETITIONS}")
    return arguments


def make_parser(description: str | None, **own: dict[str, Any]) -> argparse.ArgumentParser:
    """Returns a parser with the options of every benchmark (`--json`, `--quick`, `--device`) and further options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print a JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="use small sizes, which take less than a minute")
    parser.add_argument(
        "--device",
        type=known_device,
        default=default_device(),
        help="device to run on, such as cpu, cuda or cuda:1 (default: %(default)s)",
    )
    for name, options in own.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return parser


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def known_device(name: str) -> str:
    """Returns the name of a device if it can be measured here. Otherwise, raises `argparse.ArgumentTypeError`."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{name}: only cpu and cuda can be measured")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{name}: torch {torch.__version__} finds no such GPU")
    return name


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def time_interleaved(runs: dict[str, Callable[[], object]], device: str, repetitions: int) -> dict[str, float]:
    """
    Returns the median seconds of each run. The runs alternate in a random order, so that changes in the speed of the
    machine and the state of the caches affect all of them equally.

    Args:
        runs (`dict[str, Callable]`): The functions to time, by name.
        device (`str`): Device on which they run.
        repetitions (`int`): Number of timed runs of each function, after two untimed runs to warm up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for repetition in range(-2, repetitions):
        for name in order.sample(list(runs), len(runs)):
            elapsed = seconds_of(runs[name], device)
            if repetition >= 0:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Returns the seconds of one run, measured with CUDA events on a GPU and with the clock otherwise."""
    if is_cuda(device):
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000  # from milliseconds
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_memory(run: Callable[[], object], device: str) -> int:
    """Returns the peak memory of a run, in bytes: allocated on the GPU, otherwise resident in this process (Linux)."""
    if is_cuda(device):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    run()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def device_name(device: str) -> str:
    if is_cuda(device):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.upper()}, {torch.get_num_threads()} threads"


def versions(device: str) -> dict[str, str | None]:
    """Returns the versions of the installed libraries, and of CUDA if it is used."""
    found: dict[str, str | None] = {"cuda": torch.version.cuda} if is_cuda(device) else {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def report(benchmark: str, arguments: argparse.Namespace, rows: list[Row]) -> None:
    """Prints the table and, with `--json`, the JSON object."""
    print(f"\n{benchmark} on {device_name(arguments.device)}")
    width = 2 + max(len(row.case) for row in rows)
    print(f"{'case':<{width}}{'metric':<34}{'ours':>11}{'peer':>11}{'ratio':>8}{'bar':>7}  holds")
    for row in rows:
        bar = "" if row.bar is None else f"{row.bar:.2f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        print(
            f"{row.case:<{width}}{row.metric:<34}{row.ours:>11.4g}{row.peer:>11.4g}{ratio:>8}{bar:>7}  "
            f"{'' if row.bar is None else 'yes' if row.holds else 'NO'}"
        )
    if arguments.quick:
        print("\nThese are the sizes of a quick test: the times and memory sizes are not meaningful.")
    if arguments.json:
        print_json(benchmark, arguments.device, [row.as_dict() for row in rows])


def print_json(benchmark: str, device: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Prints the JSON object, with further entries of a benchmark. Raises `ValueError` for NaN and infinity."""
    result = {
        "benchmark": benchmark,
        "device": device_name(device),
        "versions": versions(device),
        "rows": rows,
        "holds": all(row["holds"] for row in rows),
    }
    print(json.dumps(result | more, allow_nan=False))


def find_demo(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """
    Sets `arguments.model` to `None` with `--quick` if the default model does not exist: a random model stands for it.
    Without `--quick`, this is an error.
    """
    if arguments.model != DEMO or Path(DEMO).exists():
        return
    if not arguments.quick:
        parser.error(f"there is no {DEMO} yet: run `make demo`, or pass a checkpoint with --model")
    print(f"There is no {DEMO}: the model is a random one, and the figures are not meaningful.", file=sys.stderr)
    arguments.model = None
