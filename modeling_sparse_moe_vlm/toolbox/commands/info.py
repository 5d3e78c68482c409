"""
Prints how many parameters a model has, in total and active for each token, without creating weights.

    sparse-moe-vlm info tiny small large                        # the built-in configurations
    sparse-moe-vlm info tiny --json
    sparse-moe-vlm info Qwen/Qwen3-30B-A3B                      # any Transformers model, from the Hub

Active parameters are those that one token uses, which can differ between text tokens and image tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .mistakes import mistakes_in_one_line
from .options import add_json_option

if TYPE_CHECKING:
    from ..model_size import ModelSize

COLUMNS = ("model", "parameters", "active per text token", "active per image token", "weights in bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "configs",
        nargs="+",
        metavar="model",
        help="built-in configuration (tiny, small, large), configuration file, folder of a checkpoint, or Hub name",
    )
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> None:
    from ..model_size import model_size
    from ..training.models import load_config

    with mistakes_in_one_line():
        sizes = [(name, model_size(load_config(name))) for name in arguments.configs]
    if arguments.json:
        print(json.dumps([{"model": name, "total": size.total, "active": size.active} for name, size in sizes]))
    else:
        print(_table(sizes))


def _table(sizes: list[tuple[str, ModelSize]]) -> str:
    from ..model_size import short

    rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for name, size in sizes:
        active = [short(size.active[modality]) if modality in size.active else "–" for modality in ("text", "image")]
        rows.append([Path(name).stem, short(size.total), *active, f"{short(2 * size.total)}B"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
