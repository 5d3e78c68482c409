"""
Prints how many parameters models have, in total and per token of each modality, without making any weights.

    python scripts/count_parameters.py configuration/models/*.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from modeling_sparse_moe_vlm import SparseMoeVlmConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="configuration files, or folders of checkpoints")
    configs = parser.parse_args().configs
    print("| model | parameters | active per text token | active per image token | weights in bfloat16 |")
    print("| --- | --- | --- | --- | --- |")
    for path in configs:
        config = SparseMoeVlmConfig.from_pretrained(path)
        total = config.num_parameters()
        active = [config.num_active_parameters(modality) for modality in ("text", "image")]
        numbers = " | ".join(_short(number) for number in (total, *active))
        print(f"| {Path(path).stem} | {numbers} | {_short(2 * total)}B |")


def _short(number: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


if __name__ == "__main__":
    main()
