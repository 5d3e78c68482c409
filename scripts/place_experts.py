"""
Plans where the parts of a mixture-of-experts model lie, from its configuration alone: a device map for
`from_pretrained(device_map=…)`.

    python scripts/place_experts.py configuration/models/large.json --max-memory 0=24GB 1=24GB cpu=64GB
    python scripts/place_experts.py outputs/model --max-memory 0=8GB cpu=32GB --routing routing.json --output map.json

A routing file has counts by layer and expert, `{"text": [[…], …], "image": [[…], …]}` or `[[…], …]`, or the rows of
`routing_statistics`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

import modeling_sparse_moe_vlm  # noqa: F401  (registers our configurations)
from modeling_sparse_moe_vlm.toolbox.placement import DeviceShare, describe_placement, plan_expert_placement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint, or a configuration file (JSON) with its `model_type`")
    parser.add_argument(
        "--max-memory",
        nargs="+",
        required=True,
        metavar="DEVICE=SIZE",
        help="budgets: 0=80GB 1=80GB cpu=200GB disk=1TB",
    )
    parser.add_argument("--routing", help="JSON file with measured routing: hot experts go to the fast devices")
    parser.add_argument("--dtype", help="type of the weights, e.g. bfloat16; by default the configuration's")
    parser.add_argument("--num-expert-shards", type=int, help="shards per stack of experts, where the model has them")
    parser.add_argument("--output", help="where to write the device map (JSON)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()

    try:
        max_memory = dict(map(_budget, arguments.max_memory))
        config = AutoConfig.from_pretrained(arguments.model)
        if arguments.num_expert_shards is not None:
            _set_shards(config, arguments.num_expert_shards)
        routing = None if arguments.routing is None else json.loads(Path(arguments.routing).read_text())
        device_map = plan_expert_placement(config, max_memory, routing, arguments.dtype)
        if arguments.output:
            Path(arguments.output).write_text(json.dumps(device_map, indent=2) + "\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))
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
        raise ValueError(f"--max-memory: {text!r} is no budget such as 0=80GB or cpu=200GB.")
    return int(device) if device.isdigit() else device, size


def _set_shards(config: PreTrainedConfig, number: int) -> None:
    if not hasattr(config, "num_expert_shards"):
        raise ValueError(f"--num-expert-shards: models of type {config.model_type!r} have none.")
    config.num_expert_shards = number


def _table(shares: Sequence[DeviceShare], device_map: dict[str, int | str]) -> str:
    modalities = list(dict.fromkeys(modality for share in shares for modality in share.load))
    header = ["device", "entries", "GB", "experts' GB", *(f"load of {modality}" for modality in modalities)]
    rows = [header, ["---"] * len(header)]
    total = DeviceShare("all", sum(s.bytes for s in shares), sum(s.expert_bytes for s in shares), {})
    for share in [*shares, total]:
        entries = [device for device in device_map.values() if share is total or device == share.device]
        loads = [f"{1.0 if share is total else share.load.get(modality, 0.0):.1%}" for modality in modalities]
        sizes = [f"{share.bytes / 1e9:.3f}", f"{share.expert_bytes / 1e9:.3f}"]
        rows.append([str(share.device), str(len(entries)), *sizes, *loads])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
