"""A training run with `task: retrieval`: makes a retrieval model of the recipe's model, and trains it on pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from ...checks import check
from ..data import RetrievalCollator
from ..data.bad_rows import SkippedRows
from ..data.pairs import pairs_of
from ..data.sources import find_parts
from ..demo import scene_pairs
from ..hub.results import add_results_to_card
from .models import is_retrieval_model, load_config, retrieval_from_checkpoint
from .own_callbacks import early_stopping, options_of_callback
from .own_data import evaluation_image_root, has_evaluation
from .own_evaluation import DURING_TRAINING, RETRIEVAL, TASKS_OF_HUB, score_lines
from .processor_options import set_processor_options
from .recipe_run import TrainingRun
from .retrieval_metrics import RetrievalMetrics
from .run_data import ScenesData, name_of_evaluation

# Keys of `evaluation` that apply to pairs.
OF_EVALUATION = ("batch_size", *DURING_TRAINING)
# Keys of own data that apply to pairs.
KEYS = ("train", "eval", "split", "eval_split", "subset", "image_root", "eval_image_root", "on_bad_row")


class ScenePairs(ScenesData):
    """
    The built-in scenes as images with captions.

    Args:
        data (`Mapping[str, Any]`):
            The section `data` of a recipe: arguments of [`~toolbox.demo.load_scenes`].
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        self.grid = tuple(data.get("grid", (2, 2)))
        self.eval = scene_pairs(self.splits["test"], self.grid)

    @property
    def train(self) -> Dataset:
        """Rows to train on."""
        return scene_pairs(self.splits["train"], self.grid)

    def collator(self, processor: Any, model: PreTrainedModel) -> Any:
        """Returns the collator."""
        return RetrievalCollator(processor)


class OwnPairs:
    """
    Own data: images with captions.

    Args:
        data (`Mapping[str, Any]`):
            The section `data` of a recipe.
        skipped (`SkippedRows`):
            Where skipped rows are counted and listed.

    Raises:
        ValueError: If a key does not apply to pairs, or if no row can be used.
    """

    def __init__(self, data: Mapping[str, Any], skipped: SkippedRows) -> None:
        others = [key for key, value in data.items() if key not in KEYS and value not in (None, False)]
        check(not others, f"`data` has {others}, which `task: retrieval` does not support: it can have {list(KEYS)}.")
        self.data, self.skipped = data, skipped
        self.train = self._load(data["train"], data.get("split") or "train", data.get("image_root"))
        self.eval: Dataset | None = None
        if has_evaluation(data):
            root = evaluation_image_root(data)
            self.eval = self._load(data.get("eval") or data["train"], data.get("eval_split") or "train", root)

    def _load(self, path: str, split: str, image_root: str | None) -> Dataset:
        parts = find_parts(path, split, self.data.get("subset"), image_root)
        return pairs_of(parts, self.skipped if self.data.get("on_bad_row") == "skip" else None)

    @property
    def examples(self) -> list[dict[str, Any]]:
        """Rows from which a tokenizer is made: every caption is the answer to an empty question."""
        return [
            {"question": "", "answer": "\n".join(captions), "images": images}
            for captions, images in zip(self.train["captions"], self.train["images"], strict=True)
        ]

    def use(self, processor: Any) -> None:
        """Sets the processor. The rows are already validated."""

    def collator(self, processor: Any, model: PreTrainedModel) -> RetrievalCollator:
        """Returns the collator."""
        return RetrievalCollator(processor)


class RetrievalReport:
    """
    The recall of a model on the rows for evaluation.

    Args:
        data ([`ScenePairs`] or [`OwnPairs`]):
            The data of the run.
        evaluation (`Mapping[str, Any]`):
            The section `evaluation` of the recipe, which can have the keys in `OF_EVALUATION`.

    Raises:
        ValueError: If the section has other keys.
    """

    def __init__(self, data: Any, evaluation: Mapping[str, Any]) -> None:
        others = [key for key in evaluation if key not in OF_EVALUATION]
        known = ", ".join(f"`{key}`" for key in OF_EVALUATION)
        check(
            not others,
            f"`evaluation` has {others}, but `task: retrieval` only has {known} there. `--recipe retrieval` starts "
            "from a recipe without other keys.",
        )
        self.data, self.evaluation = data, evaluation
        self.scores: dict[str, float] | None = None

    def callbacks(self, arguments: Any, processor: Any) -> list[Any]:
        """Returns the callbacks of a training: those that evaluate during the training."""
        if self.data.eval is None or arguments.eval_strategy == "no":
            return []
        options = options_of_callback(self.evaluation, ("sample", "batch_size"))
        return [RetrievalMetrics(processor, self.data.eval, **options), *early_stopping(self.evaluation)]

    def evaluate(self, model: Any, processor: Any) -> dict[str, Any]:
        """Returns the figures of [`~toolbox.evaluation.evaluate_retrieval`] as `eval`, if there are rows."""
        from ..evaluation import evaluate_retrieval

        if self.data.eval is None:
            return {}
        self.scores = evaluate_retrieval(model, processor, self.data.eval, self.evaluation.get("batch_size", 64))
        return {"eval": self.scores}

    def add_to_card(self, model_dir: Path) -> None:
        """Adds the figures of own data to the `model-index` of the model card."""
        if self.scores is not None and isinstance(self.data, OwnPairs):
            add_results_to_card(
                model_dir,
                self.scores,
                dataset=name_of_evaluation(self.data.data),
                split=self.data.data.get("eval_split"),
                task=TASKS_OF_HUB[RETRIEVAL],
            )

    def print_scores(self) -> None:
        """Prints the figures."""
        if self.scores is None:
            print("\nThe model is not evaluated: name rows for evaluation with `data.eval` or `data.eval_split`.")
        else:
            lines = score_lines({f"{name:<28}": value for name, value in self.scores.items()})
            print(f"\nRetrieval among {len(self.data.eval)} rows for evaluation:\n{lines}")

    def draw(self, model: Any, collator: Any) -> list[Path]:
        """Draws nothing, since retrieval models give no answers."""
        return []


class RetrievalRun(TrainingRun):
    """A [`~toolbox.training.recipe_run.TrainingRun`] of a retrieval model."""

    def _load_data(self, number: int) -> Any:
        data = self.stages[number].data
        return ScenePairs(data) if self.skipped is None else OwnPairs(data, self.skipped)

    def _create(self, path: str) -> tuple[Any, Any]:
        model, processor = super()._create(path)
        return self._with_head(model, processor), processor

    def _load(self, path: str) -> tuple[Any, Any]:
        if is_retrieval_model(load_config(path)):
            return retrieval_from_checkpoint(path, dtype=self.recipe.dtype or "float32")
        model, processor = super()._load(path)
        return self._with_head(model, processor), processor

    def _with_head(self, model: Any, processor: Any) -> Any:
        from ..retrieval import to_retrieval

        set_processor_options(processor, self.recipe.processor)  # the prompt of an image depends on them
        return to_retrieval(model, processor, **self.recipe.retrieval)

    def _make_report(self) -> Any:
        return RetrievalReport(self.data, self.recipe.evaluation)

    def print_how_to_load(self) -> None:
        """Prints example code that embeds a text with the trained model, and the number of skipped rows."""
        print(f"\nWrote the model and the metrics to {self.output_dir}.\nEmbed texts and images:\n")
        print(HOW_TO_LOAD.format(model_dir=Path(self.model_dir)))
        if self.skipped is not None and (summary := self.skipped.summary()):
            print(f"\n{summary}")


HOW_TO_LOAD = """\
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer("{model_dir}", trust_remote_code=True)
    embeddings = encoder.encode(["a text", {{"image": "image.png"}}])"""
