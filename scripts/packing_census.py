"""
Lists which model types support packed rows. Run it in a clone::

    python scripts/packing_census.py
    python scripts/packing_census.py llava qwen3_vl

It runs a tiny random model of each type on rows of text. The collator checks the model itself, also with images.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from transformers import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' tiny models

from tests.support.packing_census import census


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types (default: all)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    counts = Counter()
    for model_type, outcome, reason in census(arguments.types or None):
        print(f"{model_type:28} {outcome:26} {reason}".rstrip(), flush=True)
        counts[outcome] += 1
    print(", ".join(f"{outcome}: {count}" for outcome, count in counts.items()))


if __name__ == "__main__":
    main()
