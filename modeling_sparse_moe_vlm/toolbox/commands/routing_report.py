"""
Reports how a model distributes the tokens of a dataset over its experts, as a table and as an HTML page.

    sparse-moe-vlm routing-report outputs/demo/model                                # held-out scenes of the demo
    echo '{"question": "How many legs does a spider have?", "answer": "8"}' > rows.jsonl
    sparse-moe-vlm routing-report outputs/demo/model rows.jsonl --output report.html
    sparse-moe-vlm routing-report Qwen/Qwen3-VL-30B-A3B-Instruct images/ --max-rows 500
    sparse-moe-vlm routing-report outputs/demo/model --output expert_load.png       # only the load of the experts
    sparse-moe-vlm routing-report outputs/demo/model --json > routing.json          # for `place --routing`

The model is any mixture of experts: a model of this package (`sparse-moe-vlm train` writes the one of the examples), an
upcycled model, or one of Transformers. The data is a file, a folder or a dataset of the Hub in any format that
`sparse-moe-vlm train --check` reads.

The page is a single file. It shows the load of the experts by layer and modality, the entropy of the routers, which
experts are chosen together, the experts of the tokens of some images, the attention to these images, and the rows whose
routing differs most. The table has one row for each layer, group of experts and modality.

`--model` and `--rows` are older forms of the two arguments; `--rows` takes a JSONL file with one conversation per line.
With them, the command writes a page only if `--output` names one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data_options import FORMAT_NAMES
from .mistakes import mistakes_in_one_line
from .options import (
    DEMO_MODEL,
    add_json_option,
    check_output,
    check_source_options,
    check_unused,
    is_given,
    shown_option,
    trained_model,
)

if TYPE_CHECKING:
    from ..routing import GroupRouting, RoutingCounts
    from ..routing.report import RoutingReport

CELL_SIZE = 16
BATCH_SIZE = 16
NUM_EXAMPLES = 256
NUM_DRAWN = 4
PAGE = "routing-report.html"
PAGE_SUFFIXES = (".html", ".htm")
OPTIONS_OF_DATA = ("format", "image_root", "split", "subset", "max_rows", "on_bad_row", "bad_rows")
SCENES = "held-out scenes of the demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model_name", nargs="?", metavar="model", help=f"folder or name on the Hub (default: {DEMO_MODEL})"
    )
    parser.add_argument("data", nargs="?", help=f"file, folder or dataset of the Hub (default: {SCENES})")
    parser.add_argument("--model", help="the model, instead of the first argument")
    parser.add_argument("--rows", help="JSONL file of conversations, instead of the data")
    parser.add_argument("--num-examples", type=int, help=f"number of held-out scenes (default: {NUM_EXAMPLES})")
    parser.add_argument(
        "--output", help=f"HTML page to write (default: {PAGE}), or PNG file to draw the load of the experts to"
    )
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"rows at a time (default: {BATCH_SIZE})")
    drawn = f"rows with images to draw on the page (default: {NUM_DRAWN})"
    parser.add_argument("--num-drawn", type=int, help=drawn)
    add_json_option(parser)
    data = parser.add_argument_group("data")
    data.add_argument("--format", help=f"format of the data: {', '.join(FORMAT_NAMES)} (default: recognised)")
    data.add_argument("--image-root", help="folder of the images (default: the folder of the file that names them)")
    data.add_argument("--split", help="split of a folder or of a dataset of the Hub (default: train)")
    data.add_argument("--subset", help="subset of a dataset of the Hub")
    data.add_argument("--max-rows", type=int, help="read only so many rows (default: all)")
    data.add_argument("--on-bad-row", choices=("error", "skip"), help="whether bad rows are an error (default: error)")
    data.add_argument("--bad-rows", metavar="FILE", help="JSONL file to which skipped rows are written")


def run(arguments: argparse.Namespace) -> None:
    from ..extras import check_installed
    from ..training.models import from_checkpoint

    with mistakes_in_one_line():
        _check(arguments)
        output = _output(arguments)
        if output is not None:
            check_output(output, "output")
        is_page = output is not None and Path(output).suffix.lower() in PAGE_SUFFIXES
        if not is_page and arguments.num_drawn != 0:
            check_unused(arguments, ("num_drawn",), f"an HTML page: name it with `--output {PAGE}`")
        if output is not None and not is_page:
            check_installed("matplotlib", "report", "--output")
        name = arguments.model_name or arguments.model or DEMO_MODEL
        has_data = arguments.data is not None or arguments.rows is not None
        # The held-out scenes are images.
        model, processor = from_checkpoint(trained_model(name), language_models=has_data)
        rows, data_name = _rows(arguments)
        num_drawn = NUM_DRAWN if arguments.num_drawn is None else arguments.num_drawn
        report = _measure(model, processor, rows, name, data_name, arguments.batch_size, num_drawn, with_page=is_page)
        if output is not None:
            _write(report, output, is_page)
    statistics = _statistics(model, report)
    alarms = list(statistics.alarms().values())
    if arguments.json:
        print(json.dumps({"rows": [_as_json(row) for row in statistics.rows], "alarms": alarms}))
    else:
        print("\n".join([str(statistics), *alarms]))
        if is_page:
            print(output)


def _check(arguments: argparse.Namespace) -> None:
    """Raises an error if arguments contradict each other or are out of range."""
    for positional, option, given in (("model_name", "model", "the model is"), ("data", "rows", "the data is")):
        if getattr(arguments, positional) is not None and getattr(arguments, option) is not None:
            raise ValueError(f"{given} given twice: as an argument, and as `--{option}`.")
    if arguments.data is None:
        for option in OPTIONS_OF_DATA:
            if is_given(arguments, option):
                raise ValueError(f"{shown_option(option)} only has an effect if the data is an argument.")
    else:
        check_source_options(arguments, arguments.data)
    if arguments.data is not None or arguments.rows is not None:
        check_unused(arguments, ("num_examples",), "the held-out scenes: limit your own data with `--max-rows`")
    if arguments.on_bad_row != "skip":
        check_unused(arguments, ("bad_rows",), "`--on-bad-row skip`")
    for option in ("num_examples", "batch_size", "max_rows"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ValueError(f"{shown_option(option)} must be at least 1, but got {value}.")
    if arguments.num_drawn is not None and arguments.num_drawn < 0:
        raise ValueError(f"`--num-drawn` must be at least 0, but got {arguments.num_drawn}.")


def _output(arguments: argparse.Namespace) -> str | None:
    """Returns the file to write. By default, it is a page if the model is an argument."""
    if arguments.output or arguments.model_name is None or arguments.json:
        return arguments.output
    return PAGE


def _rows(arguments: argparse.Namespace) -> tuple[Sequence[Mapping[str, Any]], str]:
    """Returns the rows and the name of the data."""
    from ..data import load_rows
    from ..demo import conversations, scenes

    if arguments.rows is not None:
        return read_rows(Path(arguments.rows)), arguments.rows
    if arguments.data is None:
        return conversations(scenes("test", arguments.num_examples or NUM_EXAMPLES, cell_size=CELL_SIZE)), SCENES
    rows = load_rows(
        arguments.data,
        arguments.format,
        split=arguments.split or "train",
        subset=arguments.subset,
        image_root=arguments.image_root,
        on_bad_row=arguments.on_bad_row or "error",
        skipped_file=arguments.bad_rows,
        max_rows=arguments.max_rows,
    )
    return rows, arguments.data  # type: ignore[return-value]  # not a stream


def _measure(
    model: Any,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    name: str,
    data_name: str,
    batch_size: int,
    num_drawn: int,
    with_page: bool,
) -> RoutingReport:
    import torch

    from ..routing.report import routing_report

    device = torch.accelerator.current_accelerator()
    return routing_report(
        model if device is None else model.to(device),
        processor,
        rows,
        model_name=name,
        data_name=data_name,
        collate=_collator(processor),
        batch_size=batch_size,
        num_examples=num_drawn if with_page else 0,
        num_unusual=3 if with_page else 0,
    )


def _write(report: RoutingReport, output: str, is_page: bool) -> None:
    """Writes the page, or draws the load of the experts."""
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    if is_page:
        Path(output).write_text(report.to_html(), encoding="utf-8")
        return
    from ..demo import drawings
    from ..routing.layout import load_by_modality

    drawings.draw_expert_load(load_by_modality(report.layout, report.counts), output)


def _statistics(model: Any, report: RoutingReport) -> Any:
    """Returns the statistics by place: layers that share experts are one place."""
    from ...experts_config import experts_config_of
    from ..expert_modules import our_experts_config
    from ..routing import routing_statistics

    counts: RoutingCounts = report.counts
    if our_experts_config(model.config) is None:
        return report.statistics
    return routing_statistics(experts_config_of(model.config), counts)


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
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a text can contain other ends of lines
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


def _collator(processor: Any) -> Callable[[Sequence[Mapping[str, Any]]], Any] | None:
    """
    Returns what makes batches for measuring routing. Chat templates need not mark the turns of the assistant; those
    that do are checked for answers.
    """
    from ..data import VisionLanguageCollator

    if "{% generation" in str(processor.chat_template).replace("{%-", "{%"):
        return VisionLanguageCollator(processor)
    return None


def _as_json(row: GroupRouting) -> dict[str, Any]:
    """Returns the fields and figures of a row, with `None` in place of NaN."""
    values = asdict(row) | row.figures()
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}
