"""Model cards, which state what a model is, what it was made from and what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig, PreTrainedConfig

from ...experts_config import experts_config_of
from ...versions import SUPPORTED_TRANSFORMERS
from ..installed_code import use_installed_code
from ..shipped_files import shipped_root
from ..training.recipes import Recipe
from .parents import inherited_metadata, is_on_hub

SPLIT_NAMES = {"test": "Emoji scenes, held-out arrangements", "test_style": "Emoji scenes, held-out drawing style"}

# Type of the built-in data in results.
SCENES = "emoji-scenes"


def write_model_card(
    folder: str | Path,
    *,
    config: PreTrainedConfig | None = None,
    template: str | Path | None = None,
    metrics: dict[str, Any] | None = None,
    recipe: Recipe | None = None,
    base_model: str | Sequence[str] | None = None,
    start: Mapping[str, Any] | None = None,
    model_name: str | None = None,
) -> ModelCard:
    """
    Writes `README.md` into the folder of a model: of this package's architecture, upcycled, or exported as a class of
    Transformers; or of a PEFT adapter. Save the model and its processor there first.

    The card names the models that this one was made from, carries over their licence if their own cards (in their
    folders or on the Hub) name one, and has the parity receipt of an upcycled model.

    Args:
        folder (`str` or `Path`):
            Folder of the saved model.
        config (`PreTrainedConfig`, *optional*):
            Configuration of the model; by default, that in the folder.
        template (`str` or `Path`, *optional*):
            Jinja template; the package's own (`model_card.md`) by default.
        metrics (`dict`, *optional*):
            By split, `{"overall": {"model", "blind", "most_frequent_answer"}}` in percent, as measured.
        recipe ([`~toolbox.training.recipes.Recipe`], *optional*):
            What the model was trained with. By default, the `recipe.yaml` that the run saved, in the folder or, if the
            folder is called `model` or `adapter`, in the folder above.
        base_model (`str` or `Sequence[str]`, *optional*):
            The model that this one was made from (a name on the Hub, or a folder); of a model from parts, the language
            model and the vision encoder. By default, what the configuration of an upcycled model says.
        start (`Mapping[str, Any]`, *optional*):
            How the experts started. Only needed for a model from [`~toolbox.upcycling.to_native`], whose configuration
            does not say: `upcycled.config.experts_config.start`.
        model_name (`str`, *optional*):
            Name of the model; by default, that of the folder.

    Returns:
        `huggingface_hub.ModelCard`: `card.push_to_hub("user/name")` uploads it.

    Raises:
        OSError: If the folder has no configuration, or cannot be written to.

    Example:

    ```python
    >>> sparse.save_pretrained("smolvlm-moe")
    >>> processor.save_pretrained("smolvlm-moe")
    >>> write_model_card("smolvlm-moe")
    ```
    """
    # Not at the top, since upcycling writes model cards itself.
    from .adapter_card import is_adapter, make_adapter_card
    from .descriptions import CLASSIFICATION, OUR_TYPES, TASKS, describe
    from .sections import (
        datasets_of,
        figures_in,
        limits_text,
        recipe_text,
        saved_recipe,
        scores_text,
        training_text,
    )
    from .usage import usage

    folder = Path(folder)
    name = folder.resolve().name if model_name is None else model_name
    values = saved_recipe(folder) if recipe is None else yaml.safe_load(recipe.to_yaml())
    if config is None and is_adapter(folder):
        card = make_adapter_card(folder, name, template=template, recipe=values, base_model=base_model)
        card.text = re.sub(r"\n{3,}", "\n\n", card.text)
        return save_card(card, folder)
    if config is None:
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}: save the model and its processor there first.")
        use_installed_code(folder)
        config = AutoConfig.from_pretrained(folder)
    if start is None:
        start = getattr(experts_config_of(config), "start", None) or {}
    parents = _parents(base_model, start)
    description = describe(config, parents, start)
    task = TASKS.get(description.auto_class)
    is_ours = getattr(config, "tower_model_type", config.model_type) in OUR_TYPES
    is_built_in = is_ours and not parents and _is_of_scenes(values, metrics or {})
    metadata: dict[str, Any] = (
        {"license": "apache-2.0", "language": "en"} if is_built_in else inherited_metadata(parents)
    )
    results = _results(metrics or {})
    on_hub = [parent for parent in parents if is_on_hub(parent)]
    card_data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag=task,
        base_model=on_hub[0] if len(on_hub) == 1 else on_hub or None,
        base_model_relation=("finetune" if len(parents) == 1 else "merge") if on_hub else None,
        datasets=(datasets_of(values) if values is not None else []) or None,
        tags=description.tags,
        metrics=["exact_match"] if results else None,
        eval_results=_eval_results(results) or None,
        **metadata,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(template or shipped_root() / "model_card.md"),
        model_name=name,
        supported=SUPPORTED_TRANSFORMERS,
        description=description.text,
        facts=description.facts,
        origin=description.origin,
        is_upcycled=bool(start),
        needs_code=description.needs_code,
        usage=usage(
            folder,
            name,
            description.auto_class,
            reads_images=description.reads_images,
            generates=task is not None and description.auto_class != CLASSIFICATION,
            needs_code=description.needs_code,
            is_ours=is_ours,
        ),
        results=results,
        recipe=recipe_text(values) if values is not None else None,
        training=training_text(values, metrics or {}) if values is not None else None,
        figures=figures_in(folder),
        limits=limits_text(
            parents=parents,
            is_upcycled=bool(start),
            recipe=values,
            reads_images=description.reads_images,
            needs_code=description.needs_code,
        ),
        scores=scores_text([]),
        **description.variables,
    )
    card.text = re.sub(r"\n{3,}", "\n\n", card.text)  # empty lines of parts that the card does not have
    return save_card(card, folder)


def _is_of_scenes(recipe: Mapping[str, Any] | None, metrics: Mapping[str, Any]) -> bool:
    """Returns whether a model is known to be trained from scratch on the built-in scenes only."""
    from .sections import is_own_data  # see `write_model_card`

    if recipe is None:
        return any(split in metrics for split in SPLIT_NAMES)
    return not is_own_data(recipe) and str(recipe.get("model")).endswith(".json")


def save_card(card: ModelCard, folder: Path) -> ModelCard:
    """Writes a card to `README.md` in one step."""
    stage = folder / ".README.md.saving"
    card.save(stage)
    stage.replace(folder / "README.md")
    return card


def _parents(base_model: str | Sequence[str] | None, start: Mapping[str, Any]) -> list[str]:
    if base_model is None:
        return [start[key] for key in ("base_model", "vision_encoder") if key in start]
    return [base_model] if isinstance(base_model, str) else list(base_model)


def _results(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By split that was measured, its figures and its name."""
    return [
        {"split": split, "name": name} | metrics[split]["overall"]
        for split, name in SPLIT_NAMES.items()
        if split in metrics
    ]


def _eval_results(results: list[dict[str, Any]]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=SCENES,
            dataset_name=row["name"],
            dataset_split=row["split"],  # without it, the results of all splits would merge
            metric_type="exact_match",
            metric_value=round(row["model"], 1),
        )
        for row in results
    ]
