"""
Plans on which device each part of a mixture-of-experts model is stored.

    sparse-moe-vlm place large --dtype bfloat16 --max-memory 0=24GB 1=24GB cpu=64GB

To offload the experts that a trained model uses least, measure its routing first:

    sparse-moe-vlm routing-report --model outputs/demo/model --json > routing.json
    sparse-moe-vlm place outputs/demo/model --max-memory 0=7MB cpu=32GB --routing routing.json --output map.json

The model of the second example is written by `sparse-moe-vlm train`. `--output` writes a device map for
`from_pretrained(device_map=…)`. The plan needs only the configuration of the model, not its weights.

A routing file contains the output of `sparse-moe-vlm routing-report --json`, or counts by layer and expert, for each
modality or for all of them: `{"text": [[…], …], "image": [[…], …]}` or `[[…], …]`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .mistakes import mistakes_in_one_line
from .options import add_json_option

if TYPE_CHECKING:
    from ..placement import DeviceShare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help="built-in configuration (tiny, small, large), configuration file, folder of a checkpoint, or Hub name",
    )
    parser.add_argument(
        "--max-memory",
        nargs="+",
        required=True,
        metavar="DEVICE=SIZE",
        help="memory budget of each device, such as 0=80GB 1=80GB cpu=200GB disk=1TB",
    )
    parser.add_argument("--routing", help="JSON file with measured routing: the least used experts are offloaded first")
    parser.add_argument("--dtype", help="dtype of the weights, such as bfloat16 (default: that of the configuration)")
    parser.add_argument(
        "--num-expert-shards", type=int, help="number of shards of the experts of a layer, for models that have shards"
    )
    parser.add_argument("--output", help="JSON file to write the device map to")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> None:
    from ..placement import describe_placement, plan_expert_placement
    from ..training.models import load_config

    with mistakes_in_one_line():
        max_memory = dict(map(_budget, arguments.max_memory))
        config = load_config(arguments.model)
        if arguments.num_expert_shards is not None:
            _set_shards(config, arguments.num_expert_shards)
        routing = None if arguments.routing is None else _read_routing(Path(arguments.routing))
        device_map = plan_expert_placement(config, max_memory, routing, arguments.dtype)
        if arguments.output:
            Path(arguments.output).write_text(json.dumps(device_map, indent=2) + "\n")
    shares = describe_placement(config, device_map, routing, arguments.dtype)
    if arguments.json:
        devices = [
            {"device": s.device, "bytes": s.bytes, "expert_bytes": s.expert_bytes, "load": s.load} for s in shares
        ]
        print(json.dumps({"model": arguments.model, "devices": devices, "device_map": device_map}))
    else:
        print(_table(shares, device_map))


def _budget(text: str) -> tuple[int | str, str]:
    device, separator, size = text.partition("=")
    if not separator:
        raise ValueError(f"--max-memory: {text!r} is not a budget such as 0=80GB or cpu=200GB.")
    return int(device) if device.isdigit() else device, size


def _read_routing(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--routing: {path} is not a JSON file: {error}.") from error


def _set_shards(config: Any, number: int) -> None:
    if not hasattr(config, "num_expert_shards"):
        raise ValueError(f"--num-expert-shards: models of type {config.model_type!r} have none. Leave out this option.")
    config.num_expert_shards = number


def _table(shares: Sequence[DeviceShare], device_map: dict[str, int | str]) -> str:
    modalities = list(dict.fromkeys(modality for share in shares for modality in share.load))
    header = ["device", "entries", "GB", "experts' GB", *(f"load of {modality}" for modality in modalities)]
    rows = [header, ["---"] * len(header)]
    for share in shares:
        entries = [device for device in device_map.values() if device == share.device]
        loads = [share.load.get(modality, 0.0) for modality in modalities]
        rows.append(_row(str(share.device), len(entries), share.bytes, share.expert_bytes, loads))
    total, experts = sum(share.bytes for share in shares), sum(share.expert_bytes for share in shares)
    rows.append(_row("all", len(device_map), total, experts, [1.0] * len(modalities)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(device: str, entries: int, size: int, expert_size: int, loads: Sequence[float]) -> list[str]:
    return [device, str(entries), f"{size / 1e9:.3f}", f"{expert_size / 1e9:.3f}", *(f"{load:.1%}" for load in loads)]
