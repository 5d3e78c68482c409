"""Evaluation of a model on rows of one's own data, next to the same model without the images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..data.rows import row_name
from ..evaluation_mode import evaluating
from .generation import answer_batch
from .prediction_files import AnswerFiles, fingerprint_of_rows
from .scores import references_of, score_answers, score_rows, text_of

ANSWER, BLIND = "prediction", "prediction_without_images"
NUM_SAMPLES = 1000  # of the bootstrap
_MEDIA = ("images", "videos")  # columns of rows


@dataclass
class Evaluation:
    """
    The scores of a model.

    Args:
        scores (`dict[str, float]`):
            The value of each metric.
        blind (`dict[str, float]`, *optional*):
            The values of the same model without the images. `None` if it was not measured.
        intervals (`dict[str, tuple[float, float]]`):
            The 95 % confidence interval of each metric that is a mean over rows.
    """

    scores: dict[str, float]
    blind: dict[str, float] | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Returns the scores as a dict that can be written as JSON."""
        intervals = {name: list(interval) for name, interval in self.intervals.items()}
        return {"scores": self.scores, "intervals": intervals} | ({} if self.blind is None else {"blind": self.blind})


def evaluate_rows(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Sequence[dict[str, Any]],
    metrics: Sequence[str],
    folder: str | Path,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    blind: bool = True,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    share: bool = True,
) -> Evaluation | None:
    """
    Generates the answers of a model to rows, and scores them. Rows are answered in batches of similar length, the
    longest first, so that missing memory shows at once. `sparse-moe-vlm evaluate` and the end of a training run
    (`sparse-moe-vlm train --data`) both score models with this function.

    The folder gets `predictions.jsonl`, with the question, prediction, right answers and scores of each row, and
    `run.json`, which says what the predictions belong to.

    Args:
        model (`PreTrainedModel`):
            Image-text-to-text model, or language model for rows without images.
        processor (`ProcessorMixin`):
            Its processor or tokenizer.
        rows (`Sequence[dict]`):
            Rows of [`~toolbox.data.load_rows`]. The last message of each must be from the assistant.
        metrics (`Sequence[str]`):
            Names of metrics, as [`score_answers`] takes them.
        folder (`str` or `Path`):
            Folder for the predictions.
        batch_size (`int`, *optional*, defaults to 16):
            Number of rows per batch.
        max_new_tokens (`int`, *optional*, defaults to 64):
            Largest number of tokens of an answer.
        blind (`bool`, *optional*, defaults to `True`):
            Whether to also measure the model without the images, if there are images.
        resume (`bool`, *optional*, defaults to `False`):
            Whether to keep the predictions of an interrupted evaluation in the folder.
        identity (`Mapping`, *optional*):
            What identifies the model, as values of JSON. A difference prevents resuming.
        share (`bool`, *optional*, defaults to `True`):
            Whether several processes share the batches. All of them must then call this function. With `False`, the
            process that calls it answers all rows.

    Returns:
        `Evaluation`: The scores. If several processes share the batches, `None` in all of them except the first.

    Raises:
        ValueError: If there are no rows, if an argument or row is invalid, or if the predictions in the folder belong
            to another model or other data. The message names the row.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
    texts = texts_of_rows(rows)
    state = PartialState() if share else _OneProcess()
    owner = dict(identity or {}) | {
        "data": fingerprint_of_rows(texts),
        "rows": len(texts),
        "max_new_tokens": max_new_tokens,
    }
    files = AnswerFiles(Path(folder), owner, state.process_index)
    if (not resume or not files.check_owner()) and state.is_main_process:
        files.start()
    state.wait_for_everyone()
    with_images = [number for number, row in enumerate(texts) if row["num_images"]]
    jobs = [(ANSWER, list(range(len(texts))))] + ([(BLIND, with_images)] if blind and with_images else [])
    known = {name: files.read(name) for name, _ in jobs}
    state.wait_for_everyone()  # before a process adds to the files that the others read
    with evaluating(model):
        for name, numbers in jobs:
            batches = _batches([n for n in numbers if n not in known[name]], texts, batch_size)
            own = batches[state.process_index :: state.num_processes]
            title = "Answering" if name == ANSWER else "Answering without images"
            for batch in tqdm(own, desc=title, unit="batch", disable=not state.is_main_process):
                chosen = {n: rows[n] if name == ANSWER else without_images(rows[n]) for n in batch}
                answers = answer_batch(model, processor, chosen, max_new_tokens=max_new_tokens)
                files.add(name, dict(zip(batch, answers, strict=True)))
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    predictions = files.read(ANSWER)
    answers = [predictions[n] for n in range(len(texts))]
    references = [references_of(row) for row in texts]
    of_rows = score_rows(metrics, answers, references)
    evaluation = Evaluation(score_answers(metrics, answers, references), intervals=confidence_intervals(of_rows))
    without: dict[int, str] = {}
    if len(jobs) > 1:
        without = files.read(BLIND)
        # Rows without images have the same answer in both.
        guesses = [without.get(n, answer) for n, answer in enumerate(answers)]
        evaluation.blind = score_answers(metrics, guesses, references)
    files.write_predictions(
        {
            "source": row.get("source"),
            "row": row.get("row"),
            "question": row["question"],
            ANSWER: answers[n],
            **({BLIND: without[n]} if n in without else {}),
            "references": references[n],
            "scores": of_rows[n],
        }
        for n, row in enumerate(texts)
    )
    return evaluation


class _OneProcess:
    """Takes the place of a `PartialState` in a process that does not work with others."""

    process_index, num_processes, is_main_process = 0, 1, True

    def wait_for_everyone(self) -> None:
        """Waits for no other process."""


def without_images(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row without its images, videos and their places. A message that only had these has an empty text."""
    messages = []
    for message in row["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = [part for part in content if part["type"] == "text"] or [{"type": "text", "text": ""}]
        messages.append({**message, "content": content})
    return {**row, "messages": messages, "images": [], **({"videos": []} if "videos" in row else {})}


def most_frequent_reference(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the most frequent right answer of rows, with one answer per row: the text of its last assistant turn."""
    answers = Counter(references_of({"messages": row["messages"]})[0] for row in rows)
    return answers.most_common(1)[0][0]


def confidence_intervals(rows: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """
    Returns the 95 % confidence interval of the mean of each metric, by a bootstrap over the rows with 1,000 samples.
    The seed is fixed, so that equal scores have equal intervals.
    """
    intervals = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        rng = np.random.default_rng(0)
        means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(NUM_SAMPLES)]
        low, high = np.percentile(means, [2.5, 97.5])
        intervals[name] = (float(low), float(high))
    return intervals


def result_table(results: Mapping[str, Evaluation], guesses: Mapping[str, float] | None = None) -> str:
    """
    Formats the scores of models side by side.

    Args:
        results (`Mapping[str, Evaluation]`):
            The scores of each model, by name.
        guesses (`Mapping[str, float]`, *optional*):
            The scores of the most frequent answer of the training data.

    Returns:
        `str`: A table with a line per model and per baseline, and a column per metric.
    """
    metrics = list(next(iter(results.values())).scores)
    lines = [["model", *metrics]]
    for name, result in results.items():
        cells = []
        for metric in metrics:
            low, high = result.intervals.get(metric, (None, None))
            cells.append(f"{result.scores[metric]:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]"))
        lines.append([name, *cells])
        if result.blind is not None:
            lines.append([f"{name}, without images", *(f"{result.blind[metric]:.2f}" for metric in metrics)])
    if guesses is not None:
        lines.append(["most frequent answer", *(f"{guesses[metric]:.2f}" for metric in metrics)])
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Returns the lines of a table as text, with columns of the same width."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def texts_of_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Returns the texts of rows that are to be evaluated. No image is decoded.

    Args:
        rows (`Sequence[dict]`):
            Rows of [`~toolbox.data.load_rows`].

    Returns:
        `list[dict]`: The rows without `images` and `videos`, with the number of both as `num_images` and the last text
        of the user as `question`.

    Raises:
        ValueError: If there are no rows, or if the last message of a row is not from the assistant. The message names
            the row.
    """
    if not len(rows):
        raise ValueError("there are no rows to evaluate.")
    table: Any = rows
    if isinstance(rows, Dataset):
        table = rows.remove_columns([name for name in _MEDIA if name in rows.column_names])
    texts = []
    for number in range(len(table)):
        row = table[number]
        messages = row["messages"]
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"{row_name(row, number)}: the last message must be from the assistant, since it is the right answer."
            )
        questions = [text_of(message) for message in messages if message["role"] == "user"]
        parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
        num_images = sum(part["type"] in ("image", "video") for part in parts)
        kept = {key: value for key, value in row.items() if key not in _MEDIA}
        texts.append(kept | {"num_images": num_images, "question": questions[-1] if questions else ""})
    return texts


def _batches(numbers: list[int], texts: list[dict[str, Any]], batch_size: int) -> list[list[int]]:
    """Returns batches of rows, the longest first. Images count before texts, because they have the most tokens."""

    def length(number: int) -> tuple[int, int]:
        row = texts[number]
        return row["num_images"], sum(len(text_of(message)) for message in row["messages"][:-1])

    ordered = sorted(numbers, key=length, reverse=True)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
