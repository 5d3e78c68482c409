"""Scores of a model that was trained on own data, and an example to ask it about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from ..evaluation import evaluate_rows
from ..evaluation.own_data import texts_of_rows
from ..hub.results import add_results_to_card
from .own_callbacks import callbacks_of
from .own_evaluation import DURING_TRAINING, TASKS_OF_HUB, metrics_of, score_lines, task_of
from .run_data import OwnRows


class OwnReport:
    """
    The answers of a model to the rows for evaluation.

    Args:
        data ([`~toolbox.training.run_data.OwnRows`]):
            The data of the run.
        output_dir (`Path`):
            Folder for the predictions.
        task (`str`, *optional*):
            Task, which chooses the metrics.
        evaluation (`Mapping[str, Any]`):
            The section `evaluation` of the recipe.

    Raises:
        ValueError: If a metric is unknown, or if a row for evaluation has no right answer. The message names the row.
    """

    def __init__(self, data: OwnRows, output_dir: Path, task: str | None, evaluation: Mapping[str, Any]) -> None:
        self.data, self.output_dir, self.evaluation = data, output_dir, evaluation
        self.task = task
        self.metrics: list[str] = []
        if data.eval is not None:
            self.metrics = metrics_of(task, data.format, evaluation)
            texts_of_rows(data.eval)  # finds rows that cannot be scored before the training
        self.options = {key: value for key, value in evaluation.items() if key not in ("metrics", *DURING_TRAINING)}
        self.scores: dict[str, float] | None = None

    def callbacks(self, arguments: TrainingArguments, processor: Any) -> list[TrainerCallback]:
        """Returns the callbacks of a training: those that evaluate during the training."""
        return callbacks_of(self.evaluation, arguments, processor, self.data.eval, self.metrics)

    def evaluate(self, model: Any, processor: Any) -> dict[str, Any]:
        """
        Scores the answers as `sparse-moe-vlm evaluate` does, and writes them to `predictions.jsonl`. Called by one
        process.

        Returns:
            `dict[str, Any]`: The scores as `eval`, or nothing without rows for evaluation.
        """
        if self.data.eval is None:
            return {}
        evaluation = evaluate_rows(
            model, processor, self.data.eval, self.metrics, self.output_dir, blind=False, share=False, **self.options
        )
        assert evaluation is not None
        self.scores = evaluation.scores
        return {"eval": self.scores}

    def add_to_card(self, model_dir: Path) -> None:
        """Adds the scores to the `model-index` of the model card."""
        if self.scores is not None:
            add_results_to_card(
                model_dir,
                self.scores,
                dataset=self.data.name,
                split=self.data.data.get("eval_split"),
                task=TASKS_OF_HUB.get(task_of(self.task, self.data.format), "image-text-to-text"),
            )

    def print_scores(self) -> None:
        """Prints the scores."""
        if self.scores is None:
            print("\nThe model is not evaluated: name rows for evaluation with `data.eval` or `data.eval_split`.")
        else:
            assert self.data.eval is not None
            print(f"\nScores on {len(self.data.eval)} rows for evaluation:\n{score_lines(self.scores)}")

    def draw(self, model: Any, collator: Any) -> list[Path]:
        """Writes `example.png`, the first image of the first row."""
        if (image := self._first_row()["images"][:1]) != []:
            image[0].convert("RGB").save(self.output_dir / "example.png")
        return []

    def example(self) -> tuple[str, Path | None]:
        """Returns the question of the first row, and the image that it is about, if it has one."""
        row = self._first_row()
        users = [message for message in row["messages"] if message["role"] == "user"]
        texts = [part["text"] for part in users[0]["content"] if part["type"] == "text"] if users else []
        return "".join(texts), self.output_dir / "example.png" if row["images"] else None

    def _first_row(self) -> dict[str, Any]:
        return next(iter(self.data.train if self.data.eval is None else self.data.eval))
