"""
Runs a model on examples and prints how their tokens are distributed over its experts.

    sparse-moe-vlm routing-report --model outputs/demo/model --output expert_load.png
    sparse-moe-vlm routing-report --model outputs/demo/model --json > routing.json      # for `place --routing`

The model of the examples is written by `sparse-moe-vlm train`. The report has one row for each layer, group of experts
and modality. To use conversations of your own, write one to each line of a JSONL file:

    echo '{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "yes"}]}' > rows.jsonl
    sparse-moe-vlm routing-report --model outputs/demo/model --rows rows.jsonl

A conversation with images has one content part `{"type": "image"}` in its messages for each image, and a field
`"images": ["a.png"]`. Every conversation needs a turn of the assistant.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .mistakes import mistakes_in_one_line
from .options import add_json_option, add_model_option, trained_model

if TYPE_CHECKING:
    from ..routing import GroupRouting

CELL_SIZE = 16
BATCH_SIZE = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_option(parser)
    parser.add_argument("--rows", help="JSONL file of conversations (default: held-out scenes of the demo)")
    parser.add_argument("--num-examples", type=int, default=256, help="number of held-out scenes (default: 256)")
    parser.add_argument("--output", help="PNG file to draw the load of the experts to")
    add_json_option(parser)


def run(arguments: argparse.Namespace) -> None:
    from torch.utils.data import DataLoader

    from ...experts_config import experts_config_of
    from ..demo import conversations, scenes
    from ..extras import check_installed
    from ..routing import measure_routing, routing_statistics
    from ..routing.statistics import load_of_counts
    from ..training.models import from_checkpoint_with_experts

    with mistakes_in_one_line():
        if arguments.output:
            check_installed("matplotlib", "report", "--output")
        # The held-out scenes are images.
        model, processor = from_checkpoint_with_experts(
            trained_model(arguments.model), language_models=arguments.rows is not None
        )
        if arguments.rows is None:
            rows = conversations(scenes("test", arguments.num_examples, cell_size=CELL_SIZE))
        else:
            rows = read_rows(Path(arguments.rows))
        batches = DataLoader(rows, batch_size=BATCH_SIZE, collate_fn=_collator(processor))
        counts = measure_routing(model, batches)
        if counts is None:
            raise ValueError(f"{arguments.model} has no routed experts, so there is no routing to report.")
    config = experts_config_of(model.config)
    statistics = routing_statistics(config, counts)
    alarms = list(statistics.alarms().values())
    if arguments.output:
        from ..demo import drawings

        with mistakes_in_one_line():
            drawings.draw_expert_load(load_of_counts(config, counts), arguments.output)
    if arguments.json:
        print(json.dumps({"rows": [_as_json(row) for row in statistics.rows], "alarms": alarms}))
    else:
        print("\n".join([str(statistics), *alarms]))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """
    Reads a file of conversations.

    Args:
        path (`Path`):
            JSONL file with one conversation per line. Empty lines are ignored.

    Returns:
        `list[dict]`: Rows in the form that [`~toolbox.data.VisionLanguageCollator`] takes.

    Raises:
        ValueError: If the file is not text or contains no conversations, or if a line is not a JSON object with
            `messages`. The message names the line.
        OSError: If the file cannot be read.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a JSONL file: {error}.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict) or "messages" not in row:
            raise ValueError(f"{path}, line {number} must be an object with `messages`.")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} contains no conversations: write one JSON object with `messages` per line.")
    return rows


def _collator(processor: Any) -> Callable[[Sequence[Mapping[str, Any]]], Any]:
    """Makes batches for measuring routing. Chat templates need not mark the turns of the assistant."""
    from ..data import VisionLanguageCollator
    from ..data.rows import apply_chat_template, with_images

    if "{% generation" in str(processor.chat_template).replace("{%-", "{%"):
        return VisionLanguageCollator(processor)
    return lambda rows: apply_chat_template(
        processor, {number: with_images(row, number) for number, row in enumerate(rows)}, padding_side="right"
    )


def _as_json(row: GroupRouting) -> dict[str, Any]:
    """Returns the fields and figures of a row, with `None` in place of NaN."""
    values = asdict(row) | row.figures()
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}
