"""Sections of model cards about memory, training, evaluations and limits. They contain only what is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult

from ..upcycling.costs import DTYPES, short
from .parents import is_on_hub, link_to

# Text of a card without results, which results replace.
NOTHING_MEASURED = "\n## Measured\n\nNothing was measured when this model was saved.\n"
# Comments around the table of results in a card.
SCORES, END_OF_SCORES = "<!-- scores -->", "<!-- end of scores -->"
# Figures that runs and reports write, with their titles.
FIGURES = {
    "expert_load.png": "Load of the experts by layer and modality",
    "routing_report.png": "Routing of the tokens by layer and modality",
    "answers.png": "Answers to held-out questions",
}
# Heading of the section that follows the figures in the template.
LIMITS = "## Limits and risks\n"
RECIPE = "recipe.yaml"
_DATA_FILES = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".zip", ".tar"}


def memory_rows(num_parameters: int) -> dict[str, str]:
    """Returns the memory of the weights by dtype, as rows of a table."""
    return {f"weights in {dtype}": f"{short(num_parameters * size)}B" for dtype, size in DTYPES.items()}


def saved_recipe(folder: Path) -> dict[str, Any] | None:
    """Returns the recipe of a run that a model was saved by, or `None` if there is none in its folder or beside it."""
    places = [folder / RECIPE] + [folder.parent / RECIPE] * (folder.name in ("model", "adapter"))
    for path in places:
        if path.is_file():
            recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
            return recipe if isinstance(recipe, dict) else None
    return None


def without_paths(value: Any) -> Any:
    """Returns a value of a recipe with only the last part of every path outside the current folder."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    is_elsewhere = (isinstance(value, str) and value.startswith(("/", "~", "..", "\\"))) or _has_drive(value)
    return str(value).replace("\\", "/").rstrip("/").rpartition("/")[2] if is_elsewhere else value


def _has_drive(value: Any) -> bool:
    return isinstance(value, str) and value[1:3] in (":\\", ":/")


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Returns a recipe as YAML, without the paths of a machine."""
    return yaml.safe_dump(without_paths(recipe), sort_keys=False, allow_unicode=True).strip()


def training_text(recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Describes the data and the time of a training in sentences."""
    sources = list(dict.fromkeys(section["train"] for section in _data_of(recipe) if "train" in section))
    own = [link_to_data(source) for source in sources if isinstance(source, str)]
    lines = [
        f"Trained on {', '.join(own)}." if own else "Trained on the built-in scenes: emoji on a grid, with questions."
    ]
    stages = [str(stage["name"]) for stage in recipe.get("stages") or [] if "name" in stage]
    if stages:
        lines.append(f"Stages: {', '.join(stages)}.")
    if "training_seconds" in metrics:
        lines.append(f"The training took {metrics['training_seconds']:,} seconds.")
    return " ".join(lines)


def is_own_data(recipe: Mapping[str, Any]) -> bool:
    """Returns whether a recipe trains on own data instead of the built-in scenes."""
    return any("train" in section for section in _data_of(recipe))


def datasets_of(recipe: Mapping[str, Any]) -> list[str]:
    """Returns the names of the datasets on the Hub that a recipe trains or evaluates with."""
    names = [
        section[key] for section in _data_of(recipe) for key in ("train", "eval") if isinstance(section.get(key), str)
    ]
    return list(dict.fromkeys(name for name in names if _is_dataset(name)))


def _data_of(recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [recipe.get("data") or {}, *(stage.get("data") or {} for stage in recipe.get("stages") or [])]


def link_to_data(name: str) -> str:
    """Returns the name of data in Markdown, with a link if they are on the Hub."""
    if _is_dataset(name):
        return f"[{name}](https://huggingface.co/datasets/{name})"
    return f"`{without_paths(name)}`"


def _is_dataset(name: str) -> bool:
    return "/" in name and is_on_hub(name) and Path(name).suffix.lower() not in _DATA_FILES


def figures_in(folder: Path) -> dict[str, str]:
    """Returns the figures in the folder of a model, by the name of their file, with their titles."""
    return {name: title for name, title in FIGURES.items() if (folder / name).is_file()}


def limits_text(
    *, parents: Sequence[str], is_upcycled: bool, recipe: Mapping[str, Any] | None, reads_images: bool, needs_code: bool
) -> str:
    """Lists the limits and risks that follow from how a model was made and runs."""
    lines = ["Answers can be wrong. Nothing in the model checks or filters them."]
    if parents or is_upcycled:
        named = " and ".join(link_to(parent) for parent in parents if parent) or "its dense model"
        lines.append(f"It has the limits and biases of {named}: read what is known about them first.")
    if is_upcycled and recipe is None:
        lines.append("No training after upcycling is recorded.")
    if recipe is not None:
        lines.append("It has the limits and biases of the data that it was trained on.")
    if reads_images and needs_code:
        lines.append(
            "Tokens are routed by their modality. If you pass `inputs_embeds` with merged image features, also pass "
            "`mm_token_type_ids`."
        )
    return "\n".join(f"- {line}" for line in lines)


def scores_text(results: Iterable[EvalResult]) -> str:
    """Returns the section with the results of evaluations, between the comments by which it is found again."""
    rows = [
        f"| {result.dataset_name} | {result.dataset_split or ''} | {result.metric_type} | {result.metric_value} |"
        for result in results
    ]
    table = ["", "## Evaluation", "", "| data | split | metric | value |", "| --- | --- | --- | --- |", *rows, ""]
    return "\n".join([SCORES, *(table if rows else []), END_OF_SCORES])


def with_scores(text: str, results: Iterable[EvalResult]) -> str:
    """Returns the text of a card with the section of these results. Texts without this section stay the same."""
    before, start, rest = text.partition(SCORES)
    _, end, after = rest.partition(END_OF_SCORES)
    if not (start and end):
        return text
    return before.replace(NOTHING_MEASURED, "") + scores_text(results) + after
