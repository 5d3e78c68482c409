"""
Makes a sparse mixture of experts of a dense model, with the same outputs.

    sparse-moe-vlm upcycle Qwen/Qwen3-VL-2B-Instruct --output outputs/qwen3-vl-sparse
    sparse-moe-vlm upcycle path/to/llava --output outputs/llava-sparse --expert-groups isolated --num-experts 8
    sparse-moe-vlm upcycle HuggingFaceTB/SmolLM2-135M --dry-run --expert-groups joint --start split --granularity 2
    sparse-moe-vlm upcycle path/to/gguf --gguf-file model-f16.gguf --output outputs/sparse --set router=sigmoid
    sparse-moe-vlm upcycle outputs/trained --native --output outputs/qwen3-moe
    sparse-moe-vlm upcycle --text Qwen/Qwen3-0.6B --vision google/siglip2-base-patch16-224 --output outputs/from-parts

The weights go from file to file, block by block. To compare the outputs, the dense model is loaded, and one sparse
block at a time; with --no-comparison it need not fit into memory. The folder gets a whole model, its processor and its
card, or nothing. --dry-run writes nothing and reads no weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .mistakes import mistakes_in_one_line
from .options import add_json_option, only_json
from .routing_report import read_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", nargs="?", help="dense model (with --native also an upcycled one): folder or name on the Hub"
    )
    parser.add_argument("--output", help="folder for the sparse model")
    parser.add_argument("--dry-run", action="store_true", help="only print what dense and sparse model cost")
    add_json_option(parser)
    parser.add_argument("--revision", help="branch, tag or commit of the source on the Hub")
    parser.add_argument("--gguf-file", metavar="FILE", help="GGUF file in the source")
    parser.add_argument("--text", metavar="MODEL", help="with --vision, in place of a source: a language model")
    parser.add_argument("--vision", metavar="ENCODER", help="with --text: a vision encoder")
    parser.add_argument("--dtype", default="auto", help="type of the weights, by default the source's")
    parser.add_argument("--max-shard-size", default="50GB", help="largest size of a file of weights, 50GB by default")
    parser.add_argument("--native", action="store_true", help="save as the library's own class of sparse models")
    parser.add_argument("--parity-bound", type=float, help="largest relative difference of the outputs; inf for any")
    parser.add_argument("--no-comparison", action="store_true", help="compare sparse blocks with dense ones only")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in the output folder")
    experts = parser.add_argument_group("experts")
    experts.add_argument(
        "--expert-groups", default="hybrid", metavar="GROUPS", help="hybrid, joint, isolated, or a JSON list of groups"
    )
    experts.add_argument("--num-experts", type=int, metavar="N", help="routed experts of a layer, 8 by default")
    experts.add_argument(
        "--num-experts-per-tok",
        type=int,
        default=2,
        metavar="K",
        help="routed experts of a token, 2 by default",
    )
    experts.add_argument("--start", help="copy, split, residual or drop; by default an exact one that fits the groups")
    experts.add_argument("--granularity", type=int, metavar="G", help="how many times finer routed experts are")
    experts.add_argument("--drop-ratio", type=float, help="share of neurons that are drawn again, with --start drop")
    experts.add_argument("--layers", help="layers that become sparse, such as 0-11,20; by default all")
    experts.add_argument("--router-init", default="random", help="random, or data: made of the inputs on --data")
    experts.add_argument("--data", metavar="ROWS", help="conversations (JSONL): for data, and to compare on")
    experts.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="another field of the experts' configuration"
    )
    experts.add_argument("--seed", type=int, default=0, help="seed of all that is drawn")


def run(arguments: argparse.Namespace) -> None:
    from ..upcycling.checkpoints import plan_checkpoint, upcycle_checkpoint
    from ..upcycling.native_checkpoint import export_checkpoint, is_upcycled_checkpoint, plan_export
    from ..upcycling.output_folder import check_files
    from ..upcycling.parts_checkpoint import upcycle_parts_checkpoint
    from ..upcycling.upcycle import check_arguments

    with only_json(arguments.json), mistakes_in_one_line():
        _check_usage(arguments)
        request = _request(arguments)
        rows = [] if arguments.data is None else read_rows(Path(arguments.data))
        how = {"router_init": arguments.router_init, "seed": arguments.seed, "rows": rows, **request}
        of_source = {"revision": arguments.revision, "gguf_file": arguments.gguf_file, "native": arguments.native}
        of_files = {name: getattr(arguments, name) for name in ("dtype", "max_shard_size", "overwrite")}
        is_export = arguments.native and arguments.gguf_file is None
        is_export = is_export and is_upcycled_checkpoint(arguments.source, arguments.revision)
        if is_export:
            _check_export(arguments)
        if arguments.dry_run:
            check_arguments(arguments.router_init, arguments.seed, parity_bound=arguments.parity_bound)
            check_files(arguments.output, arguments.source, **of_files)
            if is_export:
                made = plan_export(arguments.source, revision=arguments.revision)
            else:
                made = plan_checkpoint(arguments.source, **of_source, **how)
            print("dry run: nothing was written", file=sys.stderr)
        elif is_export:
            made = export_checkpoint(arguments.source, arguments.output, revision=arguments.revision, **of_files)
        elif arguments.source is None:
            made = upcycle_parts_checkpoint(arguments.text, arguments.vision, arguments.output, **of_files, **how)
        else:
            made = upcycle_checkpoint(
                arguments.source,
                arguments.output,
                compare=not arguments.no_comparison,
                parity_bound=arguments.parity_bound,
                **of_source,
                **of_files,
                **how,
            )
    print(json.dumps(made.to_dict()) if arguments.json else str(made))


def _check_usage(arguments: argparse.Namespace) -> None:
    """Raises `ValueError` where options do not go together."""
    parts = [name for name in ("text", "vision") if getattr(arguments, name) is not None]
    if (arguments.source is None) != bool(parts):
        raise ValueError("give either a source, or --text (and --vision) in its place.")
    if parts == ["vision"]:
        raise ValueError("--vision needs --text, a language model.")
    if arguments.output is None and not arguments.dry_run:
        raise ValueError("--output is needed: a folder for the sparse model (or --dry-run).")
    of_source = ("revision", "gguf_file", "native", "no_comparison", "parity_bound", "dry_run")
    given = [name for name in of_source if getattr(arguments, name) not in (None, False)]
    if parts and given:
        raise ValueError(f"--{given[0].replace('_', '-')} does not go with --text.")
    if arguments.router_init == "data" and arguments.data is None:
        raise ValueError("--router-init data needs --data, a file of conversations.")


def _check_export(arguments: argparse.Namespace) -> None:
    """Raises `ValueError` for options that say how to upcycle, where a model is upcycled already."""
    usual = {"expert_groups": "hybrid", "num_experts_per_tok": 2, "router_init": "random", "seed": 0, "set": []}
    of_upcycling = ("num_experts", "start", "granularity", "drop_ratio", "layers", "data", "parity_bound")
    usual |= dict.fromkeys(of_upcycling) | {"no_comparison": False}
    for name, value in usual.items():
        if getattr(arguments, name) != value:
            raise ValueError(
                f"{arguments.source} is upcycled already, and --native saves it as the library's own class: leave out "
                f"--{name.replace('_', '-')}."
            )


def _request(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `upcycle` is asked for."""
    fields = dict(_field(text) for text in arguments.set)
    named = {
        "expert_groups": _expert_groups(arguments.expert_groups),
        "num_experts": arguments.num_experts,
        "num_experts_per_tok": arguments.num_experts_per_tok,
        "start": arguments.start,
        "granularity": arguments.granularity,
        "drop_ratio": arguments.drop_ratio,
        "layers": None if arguments.layers is None else _layers(arguments.layers),
    }
    options = {*vars(arguments), "compare", "rows"}
    for name in fields.keys() & options:
        raise ValueError(f"--set {name}=…: it is not a field of the experts' configuration, but an option: see --help.")
    return {name: value for name, value in named.items() if value is not None} | fields


def _field(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise ValueError(f"--set: {text!r} is not of the form FIELD=VALUE.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _expert_groups(text: str) -> str | list[dict[str, Any]]:
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        groups = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--expert-groups is not JSON: {error}.") from error
    if not (isinstance(groups, list) and all(isinstance(group, dict) for group in groups)):
        raise ValueError("--expert-groups must be the name of an arrangement, or a JSON list of objects.")
    return groups


def _layers(text: str) -> list[int]:
    layers: list[int] = []
    for part in text.split(","):
        first, separator, last = part.strip().partition("-")
        if not (first.isdigit() and (last.isdigit() or not separator)):
            raise ValueError(f"--layers: {part!r} is not a layer or a range of layers, such as 3 or 0-11.")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers:
            raise ValueError(f"--layers: {part!r} holds no layer: write {last}-{first}.")
        layers += numbers
    return layers
