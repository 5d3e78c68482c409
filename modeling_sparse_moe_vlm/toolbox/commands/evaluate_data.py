"""`evaluate MODEL DATA`: evaluates models on one's own data."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..shipped_files import working_root
from .data_options import RETRIEVAL, TASK_NAMES
from .mistakes import mistakes_in_one_line
from .options import check_output, check_source_options, check_unused, only_json, trained_model

if TYPE_CHECKING:
    from ..data.bad_rows import SkippedRows
    from ..data.sources import Part
    from ..evaluation import Evaluation

# Options that only apply to own data.
OF_DATA = (
    *("format", "image_root", "split", "subset", "on_bad_row", "bad_rows", "max_rows", "task", "metrics", "adapter"),
    *("batch_size", "max_new_tokens", "no_blind", "train_data", "train_image_root", "output_dir"),
    *("resume", "update_card", "trust_remote_code"),
)
# Options that only apply to the built-in scenes.
OF_SCENES = ("recipe", "set")
# Splits to try, if none is named.
SPLITS = ("test", "validation", "train")
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("your own data")
    group.add_argument("paths", nargs="*", metavar="MODEL DATA", help="model and data, or several models with --data")
    group.add_argument("--data", help="data: file, folder or dataset of the Hub")
    group.add_argument("--format", help="format of the data, as for `train --check` (default: recognised)")
    group.add_argument("--image-root", help="folder of the images (default: the folder of the file that names them)")
    group.add_argument("--split", help=f"split of the data (default: the first of {', '.join(SPLITS)} that exists)")
    group.add_argument("--subset", help="subset of a dataset of the Hub")
    group.add_argument("--on-bad-row", choices=("error", "skip"), help="whether bad rows are an error (default: error)")
    group.add_argument("--bad-rows", metavar="FILE", help="JSONL file to which skipped rows are written")
    group.add_argument("--max-rows", type=int, help="number of rows to evaluate (default: all)")
    tasks = (*TASK_NAMES, RETRIEVAL)
    group.add_argument("--task", choices=tasks, help="task, which chooses metrics (default: by format and model)")
    group.add_argument("--metrics", help="metrics, separated by commas (default: those of the task)")
    group.add_argument("--adapter", help="PEFT adapter to load into the model")
    group.add_argument("--batch-size", type=int, help="rows per batch (default: 16, for retrieval 64)")
    group.add_argument("--max-new-tokens", type=int, help="longest answer, in tokens (default: 64)")
    group.add_argument("--no-blind", action="store_true", help="do not measure the model without the images")
    group.add_argument("--train-data", help="training data, for the baseline of the most frequent answer")
    group.add_argument("--train-image-root", help="folder of the images of `--train-data` (default: `--image-root`)")
    group.add_argument("--output-dir", help="folder to write to (default: outputs/evaluation)")
    group.add_argument("--resume", action="store_true", help="keep the predictions of an interrupted evaluation")
    group.add_argument("--update-card", action="store_true", help="write the scores to the cards of the models")
    group.add_argument("--trust-remote-code", action="store_true", help="allow running code from the model's folder")


def models_and_data(arguments: argparse.Namespace) -> tuple[list[str], str] | None:
    """
    Returns the models and the data of the arguments, or `None` if the built-in data is meant.

    Raises:
        ValueError: If the arguments do not name both models and data, or if an option has no effect.
    """
    if arguments.data is None and not arguments.paths:
        check_unused(arguments, OF_DATA, "own data: `evaluate MODEL DATA`")
        return None
    if arguments.paths and arguments.model is not None:
        raise ValueError(
            f"got a model both as {arguments.paths[0]} and with `--model {arguments.model}`: leave out `--model`."
        )
    check_unused(arguments, OF_SCENES, "the built-in scenes, which `evaluate` uses without data")
    if arguments.on_bad_row != "skip":
        check_unused(arguments, ("bad_rows",), "`--on-bad-row skip`")
    if arguments.train_data is None:
        check_unused(arguments, ("train_image_root",), "`--train-data`")
    if arguments.data is not None:
        models = list(arguments.paths) or ([arguments.model] if arguments.model else [])
        if not models:
            raise ValueError(
                "`--data` needs a model, which is a folder or a name on the Hub: `evaluate MODEL DATA`, or `evaluate "
                "MODEL MODEL --data DATA`."
            )
        return models, arguments.data
    if len(arguments.paths) != 2:
        raise ValueError(
            f"got {len(arguments.paths)} paths: pass one model and the data (`evaluate MODEL DATA`), or name the data "
            "with `--data` (`evaluate MODEL MODEL --data DATA`). A model is a folder or a name on the Hub. The given "
            f"paths: {', '.join(arguments.paths)}."
        )
    return [arguments.paths[0]], arguments.paths[1]


def run_on_data(arguments: argparse.Namespace, models: list[str], data: str) -> None:
    """Evaluates models on data, prints the scores and writes them to the output folder."""
    from accelerate import PartialState

    from ..data.loading import new_skipped_rows
    from ..evaluation.own_data import evaluate_rows, result_table
    from ..evaluation.scores import check_metrics
    from ..training.own_evaluation import TASK_OF_FORMAT, TASKS_OF_HUB, metrics_of
    from .evaluate_pairs import are_retrieval_models, run_on_pairs

    folder = Path(arguments.output_dir or working_root() / "outputs" / "evaluation")
    with only_json(arguments.json), mistakes_in_one_line():
        if arguments.adapter and len(models) > 1:
            raise ValueError("`--adapter` only works with one model: evaluate the models one by one.")
        if arguments.max_rows is not None and arguments.max_rows < 1:
            raise ValueError(f"`--max-rows` must be at least 1, but got {arguments.max_rows}.")
        paths = {name: trained_model(name) for name in models}
        check_output(folder, "output_dir", is_folder=True)
        _check_folders(arguments, paths, data, folder)
        is_retrieval = are_retrieval_models(arguments, paths)
    if is_retrieval:
        run_on_pairs(arguments, paths, data, folder)
        return
    with only_json(arguments.json), mistakes_in_one_line():
        chosen = check_metrics([name.strip() for name in arguments.metrics.split(",")]) if arguments.metrics else None
        split, format_name = _find_split(arguments, data)
        task = arguments.task or TASK_OF_FORMAT.get(format_name)
        metrics = chosen or metrics_of(task, format_name, {})
        skipped = new_skipped_rows(arguments.bad_rows)
        rows = _load(arguments, data, split, skipped, arguments.image_root)
        named_split = None if Path(data).is_file() else split  # a file has no splits
        num_skipped = skipped.counts.total()
        if arguments.max_rows is not None:
            rows = rows.select(range(min(arguments.max_rows, len(rows))))
        if PartialState().is_main_process:
            of_split = "" if named_split is None else f", split {named_split}"
            print(f"data: {data}{of_split}, format {format_name}: {len(rows)} rows, {num_skipped} skipped")
        guesses = _guesses(arguments, rows, metrics, skipped)
        sizes = {"batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens}
        sizes = {name: value for name, value in sizes.items() if value is not None}
        results: dict[str, Evaluation] = {}
        names = short_names(models)
        for model in models:
            name = names[model]
            network, processor, identity = _load_model(arguments, paths[model])
            result = evaluate_rows(
                network,
                processor,
                rows,
                metrics,
                folder / name,
                blind=not arguments.no_blind,
                resume=arguments.resume,
                identity=identity,
                **sizes,
            )
            if result is not None:
                results[name] = result
                if arguments.update_card:
                    task_of_hub = TASKS_OF_HUB.get(task or "", "image-text-to-text")
                    update_card(arguments, paths[model], result.scores, data, named_split, task_of_hub)
            del network  # before the next model is loaded
        if not results:
            return  # the main process does the rest
    report: dict[str, Any] = {
        "data": {
            "source": data,
            "split": named_split,
            "format": format_name,
            "rows": len(rows),
            "skipped": num_skipped,
        },
        "models": {name: result.as_dict() for name, result in results.items()},
    }
    if guesses is not None:
        report["most_frequent_answer"] = guesses
    write_report(folder, report)
    print(json.dumps(report) if arguments.json else result_table(results, guesses))


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes `results.json` and prints to stderr where it is."""
    (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"Wrote the scores and the results of each row to {folder}.", file=sys.stderr)


def _check_folders(arguments: argparse.Namespace, paths: Mapping[str, str], data: str, folder: Path) -> None:
    """Raises an error if a model, an adapter or an option does not fit the kind of its path."""
    from ..model_names import check_model_name

    names = short_names(list(paths))
    for name, path in paths.items():
        if (folder / names[name]).resolve() == Path(path).resolve():
            raise ValueError(
                f"`--output-dir {folder}` would write the predictions into the folder of the model ({path}): choose "
                "another folder."
            )
        if Path(path).is_file():
            raise ValueError(
                f"{name} is a file, not a trained model: a model is a folder or a name on the Hub. Write "
                "`evaluate MODEL DATA`."
            )
        if arguments.update_card and not Path(arguments.adapter or path).is_dir():
            raise ValueError(
                f"`--update-card` needs a model in a local folder, but {arguments.adapter or path} is not a folder."
            )
    adapter = None if arguments.adapter is None else Path(arguments.adapter)
    if adapter is not None and adapter.is_dir() and not (adapter / "adapter_config.json").exists():
        raise ValueError(f"{adapter} is not a PEFT adapter: it has no `adapter_config.json`.")
    if arguments.adapter is not None:
        check_model_name(arguments.adapter, file="adapter_config.json", kind="PEFT adapter")
    check_source_options(arguments, data)


def _find_split(arguments: argparse.Namespace, data: str) -> tuple[str, str]:
    """Returns the split and the name of the format."""
    from ..data.loading import format_of

    split, parts = find_parts_of_split(arguments, data)
    return split, format_of(parts, arguments.format).name


def find_parts_of_split(arguments: argparse.Namespace, data: str) -> tuple[str, list[Part]]:
    """Returns the split of the arguments, by default the first of `SPLITS` that the data has, and its parts."""
    from ..data.sources import find_parts

    tried = [arguments.split] if arguments.split else SPLITS
    failure: ValueError | None = None
    for split in tried:
        try:
            return split, find_parts(data, split, arguments.subset, arguments.image_root)
        except ValueError as error:
            if re.search("has no split|Unknown split", str(error)) is None:
                raise
            failure = failure or error
    assert failure is not None
    raise failure


def _load(arguments: argparse.Namespace, data: str, split: str, skipped: SkippedRows, image_root: str | None) -> Any:
    from ..data import load_rows

    return load_rows(
        data,
        arguments.format,
        split=split,
        subset=arguments.subset,
        image_root=image_root,
        on_bad_row=arguments.on_bad_row or "error",
        skipped_file=skipped,
    )


def _load_model(arguments: argparse.Namespace, path: str) -> tuple[Any, Any, dict[str, Any]]:
    """Returns a model on its device, its processor, and what identifies it."""
    from transformers import PreTrainedTokenizerBase

    from ..evaluation.prediction_files import fingerprint_of_model
    from ..training.models import from_checkpoint

    model, processor = from_checkpoint(path, arguments.trust_remote_code, language_models=True)
    if isinstance(processor, PreTrainedTokenizerBase):
        # A model that was not trained on conversations continues the texts of all messages.
        processor.chat_template = processor.chat_template or PLAIN_TEMPLATE
    revision = getattr(model.config, "_commit_hash", None)
    identity = {"model": path, "weights": fingerprint_of_model(path, revision), "adapter": arguments.adapter}
    if arguments.adapter:
        identity["adapter_weights"] = fingerprint_of_model(arguments.adapter)
    return with_adapter(model, arguments.adapter), processor, identity


def with_adapter(model: Any, adapter: str | None) -> Any:
    """Returns a model on its device, with a PEFT adapter if there is one."""
    from accelerate import PartialState

    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.to(PartialState().device)


def _guesses(
    arguments: argparse.Namespace, rows: Any, metrics: list[str], skipped: SkippedRows
) -> dict[str, float] | None:
    """Returns the scores of the most frequent answer of the training data, if there is training data."""
    if arguments.train_data is None:
        return None
    from ..evaluation import references_of, score_answers
    from ..evaluation.own_data import most_frequent_reference

    image_root = arguments.train_image_root or arguments.image_root
    train = _load(arguments, arguments.train_data, "train", skipped, image_root).remove_columns(["images", "videos"])
    guess = most_frequent_reference(list(train))
    references = [references_of(row) for row in rows.remove_columns(["images", "videos"])]
    return score_answers(metrics, [guess] * len(references), references)


def update_card(
    arguments: argparse.Namespace, path: str, scores: Mapping[str, float], data: str, split: str | None, task: str
) -> None:
    """
    Writes the scores of a model, or of the adapter of the arguments, to its card.

    Args:
        arguments (`argparse.Namespace`):
            Arguments of the command.
        path (`str`):
            Folder of the model.
        scores (`Mapping[str, float]`):
            The value of each metric.
        data (`str`):
            The data.
        split (`str`, *optional*):
            Split of the data.
        task (`str`):
            Task of the Hub.

    """
    from ..hub import add_results_to_card

    folder = Path(arguments.adapter or path)
    name = Path(data).resolve().stem if Path(data).exists() else data
    add_results_to_card(folder, scores, dataset=name, split=split, task=task)


def short_names(models: list[str]) -> dict[str, str]:
    """Returns the last part of the name of each model, with more parts where these are not unique."""
    names: dict[str, str] = {}
    for model in dict.fromkeys(models):
        parts = Path(model).resolve().parts if Path(model).exists() else Path(model).parts
        length = 1
        while "-".join(parts[-length:]) in names.values() and length < len(parts):
            length += 1
        names[model] = "-".join(parts[-length:])
    return names
