"""Scores and figures of a model that was trained on the built-in scenes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader

from ..data import VisionLanguageCollator
from ..demo import conversations
from ..evaluation import generate_answers
from ..evaluation.by_kind import SPLIT_TITLES, example_answers, score_by_kind, score_table
from ..evaluation.metrics.exact_match.exact_match import is_right
from ..expert_modules import our_experts_config
from ..extras import check_installed
from ..routing import expert_load

NUM_DRAWN_ANSWERS = 12
NUM_ROUTED_ROWS = 256
ROUTED_BATCH = 64


class ScenesReport:
    """
    The answers of a model to questions about held-out scenes.

    Args:
        data (`Mapping[str, Dataset]`):
            The splits of [`~toolbox.demo.load_scenes`].
        output_dir (`Path`):
            Folder for the figures.
    """

    def __init__(self, data: Mapping[str, Dataset], output_dir: Path) -> None:
        self.data, self.output_dir = data, output_dir
        self.heldout = [split for split in SPLIT_TITLES if split in data]
        self.answers: dict[str, list[str]] = {}
        self.scores: dict[str, Any] = {}

    def callbacks(self, arguments: Any, processor: Any) -> list[Any]:
        """Returns the callbacks of a training. Scenes are evaluated after the training."""
        return []

    def evaluate(self, model: Any, processor: Any) -> dict[str, Any]:
        """Answers the questions, and returns the scores of [`~toolbox.evaluation.by_kind.score_by_kind`] by split."""
        for split in self.heldout:
            rows = self.data[split]
            lengths = [
                len(ids) + 1 for ids in processor.tokenizer(rows["answer"][:])["input_ids"]
            ]  # with the end token
            limit = max(32, *lengths)  # descriptions of many cells are longer than usual answers
            self.answers[split] = generate_answers(model, processor, conversations(rows), max_new_tokens=limit)
            self.scores[split] = score_by_kind(self.data["train"], rows, self.answers[split])
        return self.scores

    def add_to_card(self, model_dir: Path) -> None:
        """Does nothing: the card is written with the scores on the built-in data."""

    def print_scores(self) -> None:
        """Prints the scores, and the answers to some questions."""
        for split in self.heldout:
            print(f"\nExact match in percent, {SPLIT_TITLES[split]}:\n{score_table(self.scores[split])}")
        print("\nQuestions from held-out arrangements (blind: the best guess from the question alone):")
        print(example_answers(self.data["train"], self.data["test"], self.answers["test"]))

    def draw(self, model: Any, collator: VisionLanguageCollator) -> list[Path]:
        """
        Writes `scene.png` (an image to ask about). If matplotlib is installed, also writes `answers.png` and
        `expert_load.png` (the load of the experts).

        Returns:
            `list[Path]`: The figures for the model card, which are all but `scene.png`.
        """
        test, answers = self.data["test"], self.answers["test"]
        test[0]["image"].save(self.output_dir / "scene.png")
        try:
            check_installed("matplotlib", "report", "Drawing `answers.png` and `expert_load.png`")
        except ValueError as error:
            print(error)
            return []
        from ..demo import drawings

        is_correct = [is_right(answer, row) for answer, row in zip(answers, test["answer"], strict=True)]
        shown = drawings.some_of_each(is_correct, NUM_DRAWN_ANSWERS)
        num_wrong = sum(not is_correct[i] for i in shown)
        drawings.draw_answers(
            [test[i] for i in shown],
            [answers[i] for i in shown],
            self.output_dir / "answers.png",
            title=f"{sum(is_correct)} of {len(test)} held-out questions answered correctly. "
            f"Shown: {len(shown) - num_wrong} correct and {num_wrong} wrong answers.",
        )
        rows = conversations(test.select(range(min(NUM_ROUTED_ROWS, len(test)))))
        batches = DataLoader(rows, batch_size=ROUTED_BATCH, collate_fn=collator)
        has_groups = our_experts_config(model.config) is not None
        load = expert_load(model.eval(), batches) if has_groups else {}
        figures = [self.output_dir / "answers.png"]
        if load:
            figures.append(self.output_dir / "expert_load.png")
            drawings.draw_expert_load(load, figures[-1])
        else:
            print("`expert_load.png` is not written: the model has no routed experts of this package.")
        return figures


def resizing_note(model: Any, size: tuple[int, int]) -> str | None:
    """
    Returns a note if a model resizes images of a given size.

    Args:
        model (`PreTrainedModel`):
            The model.
        size (`tuple[int, int]`):
            Width and height of an image.

    Returns:
        `str`: The note, or `None` if the image has the size of the model or the model accepts any size.
    """
    side = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    is_native = getattr(model.config, "image_sizing", "fixed") == "native"
    if not isinstance(side, int) or is_native or size == (side, side):
        return None
    return f"Note: images of {size[0]}×{size[1]} pixels are resized to the {side}×{side} of the model."
