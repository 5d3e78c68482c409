"""
Turns a dense model into a sparse mixture-of-experts model with the same outputs.

    sparse-moe-vlm upcycle HuggingFaceTB/SmolVLM-256M-Instruct --output outputs/smolvlm-sparse
    sparse-moe-vlm upcycle Qwen/Qwen3-VL-2B-Instruct --output outputs/isolated --expert-groups isolated --num-experts 4
    sparse-moe-vlm upcycle HuggingFaceTB/SmolLM2-135M --dry-run --expert-groups joint --start split --granularity 2

--dry-run prints what both models cost, and reads no weights. Otherwise, the weights are converted block by block, from
file to file. Then the outputs of both models are compared. For that, the dense model is loaded, and one sparse block at
a time. With --no-comparison, the dense model does not have to fit into memory. The output folder receives the complete
model with its processor and its model card, or nothing if there is an error.

A GGUF file (with the package gguf), a model as a class of Transformers, and a model from a language model and a vision
encoder:

    sparse-moe-vlm upcycle path/to/gguf --gguf-file model-f16.gguf --output outputs/sparse --set router=sigmoid
    sparse-moe-vlm upcycle Qwen/Qwen3-0.6B --output outputs/qwen3-moe --expert-groups joint --native
    sparse-moe-vlm upcycle --text Qwen/Qwen3-0.6B --vision google/siglip2-base-patch16-224 --output outputs/from-parts
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .mistakes import mistakes_in_one_line
from .options import add_json_option, check_unused, is_given, only_json
from .routing_report import read_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="?",
        help="dense model: folder or name on the Hub; with --native, it can also be an upcycled model",
    )
    parser.add_argument("--output", help="folder to write the sparse model to")
    parser.add_argument("--dry-run", action="store_true", help="print the costs of both models, and write nothing")
    add_json_option(parser)
    parser.add_argument("--revision", help="branch, tag or commit of the source on the Hub")
    parser.add_argument("--gguf-file", metavar="FILE", help="name of a GGUF file in the source")
    parser.add_argument("--text", metavar="MODEL", help="language model to build a model from, instead of a source")
    parser.add_argument("--vision", metavar="ENCODER", help="vision encoder to build a model from, with --text")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights (default: that of the source)")
    parser.add_argument("--max-shard-size", default="50GB", help="largest size of a weights file (default: 50GB)")
    parser.add_argument("--native", action="store_true", help="save as a class of Transformers, such as Mixtral")
    parser.add_argument("--parity-bound", type=float, help="largest allowed relative difference of the outputs, or inf")
    parser.add_argument(
        "--no-comparison", action="store_true", help="compare only the blocks of both models, not the outputs"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model in the output folder")
    experts = parser.add_argument_group("experts")
    experts.add_argument(
        "--expert-groups",
        default="hybrid",
        metavar="GROUPS",
        help="hybrid, joint, isolated, or a JSON list of groups (default: hybrid)",
    )
    experts.add_argument("--num-experts", type=int, metavar="N", help="routed experts per layer (default: 8)")
    experts.add_argument(
        "--num-experts-per-tok",
        type=int,
        default=2,
        metavar="K",
        help="routed experts per token (default: 2)",
    )
    experts.add_argument("--start", help="copy, split, residual or drop (default: an exact start that fits the groups)")
    experts.add_argument(
        "--granularity", type=int, metavar="G", help="number of parts of a split block, with --start split"
    )
    experts.add_argument("--drop-ratio", type=float, help="share of neurons to reinitialise, with --start drop")
    experts.add_argument("--layers", help="layers to make sparse, such as 0-11,20 (default: all)")
    experts.add_argument(
        "--router-init", default="random", help="random, or data: from the inputs of --data (default: random)"
    )
    experts.add_argument(
        "--data", metavar="ROWS", help="JSONL file of conversations, for --router-init data and the comparison"
    )
    experts.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="set another field of the configuration of the experts",
    )
    experts.add_argument("--seed", type=int, default=0, help="seed of all random values (default: 0)")


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
    """Raises `ValueError` if options cannot be combined."""
    parts = [name for name in ("text", "vision") if getattr(arguments, name) is not None]
    if (arguments.source is None) != bool(parts):
        raise ValueError("give either a source, or --text (and --vision) instead of it.")
    if parts == ["vision"]:
        raise ValueError("--vision needs --text, a language model.")
    if arguments.output is None and not arguments.dry_run:
        raise ValueError("--output is needed: a folder for the sparse model (or --dry-run).")
    of_source = ("revision", "gguf_file", "native", "no_comparison", "parity_bound", "dry_run")
    given = [name for name in of_source if is_given(arguments, name)]
    if parts and given:
        raise ValueError(f"--{given[0].replace('_', '-')} cannot be combined with --text.")
    if arguments.no_comparison:
        check_unused(arguments, ("parity_bound",), "the comparison: leave out `--no-comparison`")
        if arguments.router_init != "data":
            check_unused(arguments, ("data",), "`--router-init data` or the comparison: leave out `--no-comparison`")
    if arguments.router_init == "data" and arguments.data is None:
        raise ValueError("--router-init data needs --data, a file of conversations.")


def _check_export(arguments: argparse.Namespace) -> None:
    """Raises `ValueError` for options of upcycling if the source is already an upcycled model."""
    usual = {"expert_groups": "hybrid", "num_experts_per_tok": 2, "router_init": "random", "seed": 0, "set": []}
    of_upcycling = ("num_experts", "start", "granularity", "drop_ratio", "layers", "data", "parity_bound")
    usual |= dict.fromkeys(of_upcycling) | {"no_comparison": False}
    for name, value in usual.items():
        if getattr(arguments, name) != value:
            raise ValueError(
                f"{arguments.source} is upcycled already, and --native only exports it to a class of Transformers: "
                f"leave out --{name.replace('_', '-')}."
            )


def _request(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `upcycle`."""
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
            raise ValueError(f"--layers: {part!r} contains no layer: write {last}-{first}.")
        layers += numbers
    return layers
