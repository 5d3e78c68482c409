"""The data of a run: the built-in scenes, or own data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel

from ..data import VisionLanguageCollator
from ..data.bad_rows import SkippedRows, process_number
from ..demo import conversations, load_scenes, scene_pairs
from .own_data import has_evaluation, load_evaluation_rows, load_training_rows, make_collator, needs_processor


class ScenesData:
    """
    The built-in scenes.

    Args:
        data (`Mapping[str, Any]`):
            The section `data` of a recipe: arguments of [`~toolbox.demo.load_scenes`].
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.splits = load_scenes(**data)
        self.eval: Dataset | None = None

    @property
    def examples(self) -> Dataset:
        """Rows from which a tokenizer is made."""
        return self.splits["train"]

    @property
    def train(self) -> Dataset:
        """Rows to train on."""
        return conversations(self.splits["train"])

    def use(self, processor: Any) -> None:
        """Sets the processor, by which rows are validated. Scenes need no validation."""

    def collator(self, processor: Any, model: PreTrainedModel) -> VisionLanguageCollator:
        """Returns the collator."""
        return VisionLanguageCollator(processor)


class OwnRows:
    """
    Own data.

    Args:
        data (`Mapping[str, Any]`):
            The section `data` of a recipe.
        skipped (`SkippedRows`):
            Where skipped rows are counted and listed.
    """

    def __init__(self, data: Mapping[str, Any], skipped: SkippedRows | None) -> None:
        self.data, self.skipped = data, skipped
        self._train: Dataset | IterableDataset | None = None
        self.eval: Dataset | None = None

    @property
    def examples(self) -> Dataset | IterableDataset:
        """Rows from which a tokenizer is made, before limits apply."""
        self._train = load_training_rows(self.data, self.skipped)
        return self._train

    @property
    def train(self) -> Dataset | IterableDataset:
        """Rows to train on."""
        assert self._train is not None
        return self._train

    @property
    def format(self) -> str:
        """Format of the rows for evaluation."""
        assert self.eval is not None
        return self.eval.reader.format  # type: ignore[attr-defined]

    @property
    def name(self) -> str:
        """Name of the rows for evaluation in the model card."""
        return name_of_evaluation(self.data)

    def use(self, processor: Any) -> None:
        """Loads the rows, and validates them with the processor where this is needed."""
        if self._train is None or needs_processor(self.data, processor):
            self._train = load_training_rows(self.data, self.skipped, processor)
        if has_evaluation(self.data):
            self.eval = load_evaluation_rows(self.data, self.skipped, processor)

    def collator(self, processor: Any, model: PreTrainedModel) -> VisionLanguageCollator:
        """Returns the collator. Packing runs the model to check that it supports packed rows."""
        return make_collator(self.data, processor, model)


class SceneCaptions(OwnRows):
    """
    The built-in scenes with a description of each image, as if they were own data.

    Args:
        data (`Mapping[str, Any]`):
            The section `data` of a recipe: arguments of [`~toolbox.demo.load_scenes`].
    """

    name = "scenes"

    def __init__(self, data: Mapping[str, Any]) -> None:
        splits, grid = load_scenes(**data), tuple(data.get("grid", (2, 2)))
        pairs = {name: scene_pairs(splits[split], grid) for name, split in (("train", "train"), ("eval", "test"))}
        super().__init__(pairs, skipped=None)


def name_of_evaluation(data: Mapping[str, Any]) -> str:
    """Returns the name of the rows for evaluation of the section `data` of a recipe, for model cards."""
    path = data.get("eval") or data["train"]
    return Path(path).resolve().stem if Path(path).exists() else path


def new_skipped_rows(output_dir: Path, resume: bool) -> SkippedRows:
    """Returns the list of skipped rows of a run, in `skipped_rows.jsonl`. A resumed run extends it."""
    path = output_dir / "skipped_rows.jsonl"
    if process_number() == 0 and not resume:
        path.unlink(missing_ok=True)
    PartialState().wait_for_everyone()
    return SkippedRows(path)
