"""
Measures the memory of rows with paths of images, in memory and streaming, by the number of rows.

    python scripts/data_memory.py
    python scripts/data_memory.py --rows 1000 2000 --json

Each measurement runs in its own process, which loads a JSONL file whose rows share a few images and reads all rows. The
figures are the private memory of the process (`RssAnon` of Linux) in MiB, without what importing the libraries takes:
after loading, and the largest one after each tenth of the rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

NUM_IMAGES = 4
MODES = ("in memory", "streaming")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 50_000, 100_000], help="numbers of rows")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for number in arguments.rows:
            file = write_rows(Path(folder), number)
            for mode in MODES:
                command = [sys.executable, __file__, "--measure", str(file), mode]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                result = {"rows": number, "mode": mode, **json.loads(output.splitlines()[-1])}
                results.append(result)
                print(f"{number:>7} rows {mode:<9}: {result['loaded']:6.1f} MiB loaded, {result['read']:6.1f} MiB read")
    if arguments.json:
        print(json.dumps({"rows": results}))


def write_rows(folder: Path, number: int) -> Path:
    """Writes a file of rows that share a few images."""
    from PIL import Image

    for i in range(NUM_IMAGES):
        Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(folder / f"{i}.png")
    file = folder / f"{number}.jsonl"
    with file.open("w") as lines:
        for i in range(number):
            row = {"image": f"{i % NUM_IMAGES}.png", "question": f"What is in image {i}?", "answer": f"a shade of {i}"}
            lines.write(f"{json.dumps(row)}\n")
    return file


def measure(file: str, mode: str) -> dict[str, float]:
    """Loads and reads all rows of a file. Returns the private memory in MiB, after loading and at most in reading."""
    from datasets import disable_progress_bars

    from modeling_sparse_moe_vlm.toolbox.data import load_rows

    disable_progress_bars()
    with open(file) as lines:
        tenth = max(sum(1 for _ in lines) // 10, 1)
    next(iter(load_rows(file, streaming=True)))  # imports what reading needs
    before = private_memory()
    rows = load_rows(file, streaming=mode == "streaming")
    loaded = private_memory() - before
    read = 0.0
    for number, row in enumerate(rows):
        assert row["images"][0].size == (32, 32)
        if number % tenth == tenth - 1:
            read = max(read, private_memory() - before)
    return {"loaded": round(loaded, 1), "read": round(read, 1)}


def private_memory() -> float:
    """Returns the private memory of this process in MiB: not the pages of mapped files, which the system can drop."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1]) / 1024


if __name__ == "__main__":
    main()
