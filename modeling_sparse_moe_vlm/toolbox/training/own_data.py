"""A run's own data: training and evaluation rows from files, folders or the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...checks import check
from ..data import VisionLanguageCollator, load_rows
from ..data.bad_rows import SkippedRows

# Arguments of `load_rows` that a run sets itself.
_SET_BY_RUN = {"data", "skipped_file", "processor", "return"}
_OF_FILES = {"train": str, "eval": str | None, "eval_split": str | None, "eval_image_root": str | None}
_OF_BATCHES = {"max_image_tokens_per_batch": int | None, "packing": bool}
_OF_EVALUATION = ("eval", "eval_split")
LIMITS = ("max_length", "max_image_tokens")


def own_data_arguments() -> dict[str, Any]:
    """Returns the keys that the section `data` of a recipe can have for own data, with their types."""
    types = get_type_hints(load_rows)
    return _OF_FILES | {name: of for name, of in types.items() if name not in _SET_BY_RUN} | _OF_BATCHES


def is_own(data: Mapping[str, Any]) -> bool:
    """Whether the section `data` of a recipe describes own data, and not the built-in scenes."""
    return "train" in data


def check_own_data(data: Mapping[str, Any], max_steps: int) -> None:
    """
    Checks values that need no files.

    Args:
        data (`Mapping[str, Any]`):
            The section `data` of a recipe.
        max_steps (`int`):
            Number of training steps, or -1.

    Raises:
        ValueError: If a name is not a text, if the evaluation data are the training data, if a value has no effect, or
            if a stream has no number of steps.
    """
    names = ("train", "eval", "split", "eval_split", "subset", "image_root", "eval_image_root", "format", "on_bad_row")
    for name in names:
        value = data.get(name)
        check(
            isinstance(value, str) or (value is None and name != "train"),
            f"`data.{name}` must be a text, such as a path, but got {value!r}.",
        )
    if has_evaluation(data):
        (train, split), (evaluation, eval_split) = _train_source(data), _eval_source(data)
        check(
            train != evaluation or (split != eval_split and not Path(train).is_file()),
            f"`data.train` and the data for evaluation are the same ({train}): evaluate on rows that the model "
            "does not train on, in another file (`data.eval`) or in another split of a folder (`data.eval_split`).",
        )
    check(
        data.get("eval_image_root") is None or has_evaluation(data),
        "`data.eval_image_root` only has an effect with rows for evaluation: set `data.eval` or `data.eval_split`.",
    )
    sources = [data["train"], data.get("eval") or data["train"]]
    for key, source in zip(("split", "eval_split"), sources, strict=True):
        check(
            data.get(key) is None or not Path(source).is_file(),
            f"`data.{key}` only has an effect with a folder or a dataset of the Hub, but {source} is a file.",
        )
    check(
        data.get("subset") is None or not all(Path(source).exists() for source in sources),
        "`data.subset` only has an effect with a dataset of the Hub, but the data is local.",
    )
    check(
        not data.get("streaming") or max_steps > 0,
        "`data.streaming` needs `training.max_steps`, because a stream has no length.",
    )


def has_evaluation(data: Mapping[str, Any]) -> bool:
    """Whether the section `data` of a recipe names rows for evaluation."""
    return any(data.get(name) is not None for name in _OF_EVALUATION)


def needs_processor(data: Mapping[str, Any], processor: Any) -> bool:
    """
    Whether rows are validated with the processor: to apply limits, and for language models, which read no images.
    """
    has_limits = any(data.get(name) is not None for name in LIMITS)
    return has_limits or isinstance(processor, PreTrainedTokenizerBase)


def load_training_rows(
    data: Mapping[str, Any], skipped: SkippedRows | None, processor: Any | None = None
) -> Dataset | IterableDataset:
    """
    Loads the rows to train on.

    Args:
        data (`Mapping[str, Any]`):
            The section `data` of a recipe.
        skipped (`SkippedRows`, *optional*):
            Where skipped rows are counted and listed.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`, *optional*):
            Processor of the model. Without it, limits are not applied.

    Returns:
        `Dataset` or `IterableDataset`: The rows, as [`~toolbox.data.load_rows`] returns them.
    """
    return _load(data, data["train"], data.get("split") or "train", skipped, processor, bool(data.get("streaming")))


def load_evaluation_rows(data: Mapping[str, Any], skipped: SkippedRows | None, processor: Any) -> Dataset | None:
    """Loads the rows to evaluate on, in memory, or returns `None` if the recipe names none."""
    if not has_evaluation(data):
        return None
    path, split = data.get("eval") or data["train"], data.get("eval_split") or "train"
    data = dict(data) | {"image_root": evaluation_image_root(data)}
    return _load(data, path, split, skipped, processor, streaming=False)


def evaluation_image_root(data: Mapping[str, Any]) -> str | None:
    """Returns the folder of the images of the rows for evaluation, by default that of all rows."""
    return data.get("eval_image_root") or data.get("image_root")


def make_collator(data: Mapping[str, Any], processor: Any, model: PreTrainedModel) -> VisionLanguageCollator:
    """
    Returns the collator of own data. Limits of rows were applied when the rows were loaded.

    Raises:
        ValueError: If `packing` is set, and the model does not support it.
    """
    options = {key: data[key] for key in _OF_BATCHES if key in data}
    return VisionLanguageCollator(processor, **options, model=model if options.get("packing") else None)


def _train_source(data: Mapping[str, Any]) -> tuple[str, str]:
    return _normal(data["train"]), data.get("split") or "train"


def _eval_source(data: Mapping[str, Any]) -> tuple[str, str]:
    return _normal(data.get("eval") or data["train"]), data.get("eval_split") or "train"


def _normal(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() else path


def _load(
    data: Mapping[str, Any], path: Any, split: str, skipped: SkippedRows | None, processor: Any | None, streaming: bool
) -> Any:
    arguments = {
        key: value for key, value in data.items() if key not in {*_OF_FILES, *_OF_BATCHES, "split", "streaming"}
    }
    if processor is None or not needs_processor(data, processor):
        processor = None
        arguments = {key: value for key, value in arguments.items() if key not in LIMITS}
    return load_rows(path, split=split, streaming=streaming, skipped_file=skipped, processor=processor, **arguments)
