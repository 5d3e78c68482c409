"""Results of evaluations in the metadata (`model-index`) of model cards."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from .model_card import SCENES, save_card, write_model_card
from .sections import FIGURES, LIMITS, with_scores


def add_results_to_card(
    folder: str | Path, scores: Mapping[str, float], *, dataset: str, split: str | None, task: str
) -> ModelCard:
    """
    Writes measured scores to the `model-index` of a model card. Scores of the same metric on the same data are
    replaced, and everything else in the card stays. A folder without `README.md` gets a new card.

    Args:
        folder (`str` or `Path`):
            Folder of the model.
        scores (`Mapping[str, float]`):
            The value of each metric.
        dataset (`str`):
            Name of the data.
        split (`str`, *optional*):
            Split of the data.
        task (`str`):
            Task of the Hub, such as `"visual-question-answering"`.

    Returns:
        `huggingface_hub.ModelCard`: The card, which is saved in the folder.

    Raises:
        OSError: If the folder has no configuration, or cannot be written to.
        ValueError: If the card in the folder has metadata that cannot be read.
    """
    folder = Path(folder)
    path = folder / "README.md"
    card = ModelCard.load(path) if path.exists() else write_model_card(folder)
    results = [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^\w.-]+", "-", dataset).strip("-").lower() or "data",
            dataset_name=dataset,
            dataset_split=split,
            metric_type=metric,
            metric_value=round(value, 2),
        )
        for metric, value in scores.items()
    ]
    new = {_key(result) for result in results}
    data: Any = card.data
    data.model_name = data.model_name or folder.resolve().name
    data.eval_results = [result for result in data.eval_results or [] if _key(result) not in new] + results
    shown = [result for result in data.eval_results if result.dataset_type != SCENES]
    card.text = with_scores(card.text, shown)
    data.metrics = list(dict.fromkeys([*(data.metrics or []), *scores]))
    return save_card(card, folder)


def add_figures_to_card(folder: Path, figures: Sequence[Path]) -> None:
    """
    Shows figures of a run in a model card, before its limits. They are copied to the folder of the model, so that
    [`push_checkpoint`] uploads them.

    Args:
        folder (`Path`):
            Folder of the model, with its card.
        figures (`Sequence[Path]`):
            The files, with names in `FIGURES` of [`~toolbox.hub.sections`].
    """
    if not figures:
        return
    card = ModelCard.load(folder / "README.md")
    for path in figures:
        shutil.copyfile(path, folder / path.name)
        shown = f"![{FIGURES[path.name]}]({path.name})\n\n"
        if shown not in card.text:
            card.text = card.text.replace(LIMITS, shown + LIMITS, 1)
    save_card(card, folder)


def _key(result: EvalResult) -> tuple[str | None, ...]:
    return result.task_type, result.dataset_type, result.dataset_split, result.metric_type
