"""Model card: the template filled with what was measured, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ...configuration_sparse_moe_vlm import SUPPORTED_TRANSFORMERS, SparseMoeVlmConfig
from ..shipped_files import shipped_root
from ..training.recipes import Recipe

SPLIT_NAMES = {"test": "Emoji scenes, held-out arrangements", "test_style": "Emoji scenes, held-out drawing style"}


def write_model_card(
    folder: str | Path,
    *,
    config: SparseMoeVlmConfig,
    template: str | Path | None = None,
    metrics: dict[str, Any] | None = None,
    recipe: Recipe | None = None,
) -> ModelCard:
    """
    Writes `README.md` into a model's folder.

    Args:
        folder (`str` or `Path`):
            Folder of the saved model.
        config (`SparseMoeVlmConfig`):
            Configuration of the model.
        template (`str` or `Path`, *optional*):
            Jinja template; the package's own (`model_card.md`) by default.
        metrics (`dict`, *optional*):
            By split, `{"overall": {"model", "blind", "most_frequent_answer"}}` in percent, as measured.
        recipe ([`~toolbox.training.recipes.Recipe`], *optional*):
            What the model was trained with.

    Returns:
        `huggingface_hub.ModelCard`
    """
    folder = Path(folder)
    metrics = metrics or {}
    results = [
        {"split": split, "name": name} | metrics[split]["overall"]
        for split, name in SPLIT_NAMES.items()
        if split in metrics
    ]
    card_data = ModelCardData(
        model_name=folder.name,
        license="apache-2.0",
        language="en",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["moe", "vision-language", "custom_code"],
        metrics=["exact_match"] if results else None,
        eval_results=[
            EvalResult(
                task_type="visual-question-answering",
                dataset_type="emoji-scenes",
                dataset_name=row["name"],
                dataset_split=row["split"],  # without it, the results of all splits would merge
                metric_type="exact_match",
                metric_value=round(row["model"], 1),
            )
            for row in results
        ]
        or None,
    )
    text_config = config.text_config
    card = ModelCard.from_template(
        card_data,
        template_path=str(template or shipped_root() / "model_card.md"),
        model_name=folder.name,
        supported=SUPPORTED_TRANSFORMERS,
        vision_model_type=config.vision_config.model_type,
        num_parameters=f"{config.num_parameters():,}",
        active_parameters={
            modality: f"{config.num_active_parameters(modality):,}" for modality in text_config.modalities
        },
        expert_groups=", ".join(
            f"{group['name']} ({group['num_experts']} × {group['intermediate_size']}"
            f"{', always on' if group['always_on'] else ''})"
            for group in text_config.expert_groups
        ),
        num_experts_per_tok=text_config.num_experts_per_tok,
        results=results,
        recipe=recipe.to_yaml().strip() if recipe is not None else None,
    )
    stage = folder / ".README.md.saving"
    card.save(stage)
    stage.replace(folder / "README.md")  # in one step
    return card
