"""`evaluate MODEL DATA` for retrieval models: recall and median rank on images with captions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data_options import RETRIEVAL
from .mistakes import mistakes_in_one_line
from .options import is_given, only_json, shown_option

if TYPE_CHECKING:
    from ..evaluation.retrieval import RetrievalRanks

# Options that only apply to models that generate answers.
OF_ANSWERS = ("format", "metrics", "max_new_tokens", "no_blind", "train_data", "train_image_root", "resume")
DIRECTIONS = ("image_to_text", "text_to_image")


def are_retrieval_models(arguments: argparse.Namespace, paths: Mapping[str, str]) -> bool:
    """
    Returns whether the models are retrieval models.

    Args:
        arguments (`argparse.Namespace`):
            Arguments of the command.
        paths (`Mapping[str, str]`):
            Paths of the models, by name.

    Raises:
        ValueError: If there are models of both kinds, or if `--task` or another option does not apply to them.
    """
    from transformers import AutoConfig

    from ..installed_code import use_installed_code
    from ..training.models import is_retrieval_model

    of_kind: dict[bool, list[str]] = {True: [], False: []}
    for name, path in paths.items():
        use_installed_code(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=arguments.trust_remote_code)
        of_kind[is_retrieval_model(config)].append(name)
    if of_kind[True] and of_kind[False]:
        raise ValueError(
            f"retrieval models ({', '.join(of_kind[True])}) and models that generate answers "
            f"({', '.join(of_kind[False])}) have different metrics: evaluate them in separate calls."
        )
    if not of_kind[True]:
        if arguments.task == RETRIEVAL:
            raise ValueError(
                f"`--task {RETRIEVAL}` needs a retrieval model, but {of_kind[False][0]} generates answers. Train one "
                f"with `sparse-moe-vlm train --task {RETRIEVAL}`."
            )
        return False
    if arguments.task not in (None, RETRIEVAL):
        raise ValueError(
            f"`--task {arguments.task}` needs a model that generates answers, but {of_kind[True][0]} is a retrieval "
            "model."
        )
    for option in OF_ANSWERS:
        if is_given(arguments, option):
            raise ValueError(
                f"{shown_option(option)} has no effect on retrieval models: leave it out. Their data are images with "
                "captions, and their metrics are recall and median rank."
            )
    return True


def run_on_pairs(arguments: argparse.Namespace, paths: Mapping[str, str], data: str, folder: Path) -> None:
    """
    Evaluates retrieval models on images with captions, prints recall and median rank, and writes them to a folder.

    Args:
        arguments (`argparse.Namespace`):
            Arguments of the command.
        paths (`Mapping[str, str]`):
            Paths of the models, by name.
        data (`str`):
            File, folder or dataset of the Hub.
        folder (`Path`):
            Folder to write to.
    """
    from accelerate import PartialState

    from ..data.loading import new_skipped_rows
    from ..data.pairs import load_pairs
    from ..evaluation.retrieval import rank_rows
    from ..training.models import retrieval_from_checkpoint
    from ..training.own_evaluation import TASKS_OF_HUB
    from .evaluate_data import find_parts_of_split, short_names, update_card, with_adapter, write_report

    with only_json(arguments.json), mistakes_in_one_line():
        is_first = PartialState().is_main_process
        split, _ = find_parts_of_split(arguments, data)
        skipped = new_skipped_rows(arguments.bad_rows)
        rows = load_pairs(
            data,
            split=split,
            subset=arguments.subset,
            image_root=arguments.image_root,
            on_bad_row=arguments.on_bad_row or "error",
            skipped_file=skipped,
        )
        named_split = None if Path(data).is_file() else split  # a file has no splits
        num_skipped = skipped.counts.total()
        if arguments.max_rows is not None:
            rows = rows.select(range(min(arguments.max_rows, len(rows))))
        if is_first:
            of_split = "" if named_split is None else f", split {named_split}"
            print(f"data: {data}{of_split}, images with captions: {len(rows)} rows, {num_skipped} skipped")
        names = short_names(list(paths))
        results: dict[str, dict[str, float]] = {}
        for model, path in paths.items():
            network, processor = retrieval_from_checkpoint(path, arguments.trust_remote_code)
            network = with_adapter(network, arguments.adapter)
            batch_size = 64 if arguments.batch_size is None else arguments.batch_size
            ranks = rank_rows(network, processor, rows, batch_size, share=True)
            results[names[model]] = ranks.figures()
            if is_first:
                _write_ranks(folder / names[model] / "ranks.jsonl", rows, ranks)
                if arguments.update_card:
                    update_card(arguments, path, results[names[model]], data, named_split, TASKS_OF_HUB[RETRIEVAL])
            del network  # before the next model is loaded
    if not is_first:
        return
    report: dict[str, Any] = {
        "data": {
            "source": data,
            "split": named_split,
            "rows": len(rows),
            "images": len(ranks.image_to_text),
            "captions": len(ranks.text_to_image),
            "skipped": num_skipped,
        },
        "models": {name: {"scores": scores} for name, scores in results.items()},
    }
    write_report(folder, report)
    print(json.dumps(report) if arguments.json else recall_table(results))


def recall_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """
    Formats the figures of models side by side.

    Args:
        results (`Mapping[str, Mapping[str, float]]`):
            The figures of each model, by name.

    Returns:
        `str`: A table with two lines per model, one for each direction, and a column per metric.
    """
    from ..evaluation.own_data import aligned

    metrics = [name.partition("/")[2] for name in next(iter(results.values())) if name.startswith(DIRECTIONS[0])]
    lines = [["model", "direction", *metrics]]
    for name, scores in results.items():
        for direction in DIRECTIONS:
            values = (scores[f"{direction}/{metric}"] for metric in metrics)
            lines.append([name, direction, *(f"{value:.2f}" for value in values)])
    return aligned(lines)


def _write_ranks(path: Path, rows: Any, ranks: RetrievalRanks) -> None:
    """Writes a file with the ranks of each row."""
    entries: dict[int, dict[str, Any]] = {}
    texts = rows.remove_columns(["images", "negatives"])
    for caption, (row, image) in enumerate(zip(ranks.of_row, ranks.of_image, strict=True)):
        if row not in entries:
            text = texts[row]
            entries[row] = {
                "source": text["source"],
                "row": text["row"],
                "captions": text["captions"],
                "image_to_text": ranks.image_to_text[image],
                "text_to_image": [],
            }
        entries[row]["text_to_image"].append(ranks.text_to_image[caption])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries.values()), encoding="utf-8"
    )
