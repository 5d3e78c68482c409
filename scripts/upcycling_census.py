"""
Writes a table of the model types that can be upcycled. Run it in a clone::

    python scripts/upcycling_census.py --output docs/upcycling_types.md
    python scripts/upcycling_census.py llava qwen3
"""

import argparse
import sys
from pathlib import Path

from transformers import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' tiny models

from tests.support.upcycling_census import KINDS, census, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types (default: all)")
    parser.add_argument("--output", type=Path, help="file for the table (default: stdout)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    entries = []
    for kind in KINDS:
        for entry in census(kind, arguments.types or None):
            figures = " ".join(f"{start} {difference:.1e}" for start, difference in entry.differences.items())
            print(f"{kind:15} {entry.model_type:28} {entry.outcome:18} {figures or entry.reason}", file=sys.stderr)
            entries.append(entry)
    if arguments.output:
        arguments.output.write_text(table(entries), encoding="utf-8")
    else:
        print(table(entries))


if __name__ == "__main__":
    main()
