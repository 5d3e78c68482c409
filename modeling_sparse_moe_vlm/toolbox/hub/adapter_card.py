"""Model cards of PEFT adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModel
from transformers.utils import cached_file

from ...checkpoint_integrity import read_header
from ..shipped_files import shipped_root
from .descriptions import CAUSAL_LM, CLASSIFICATION, IMAGE_TEXT, TASKS
from .parents import inherited_metadata, is_on_hub, is_without_network, link_to
from .sections import datasets_of, figures_in, limits_text, recipe_text, scores_text, training_text

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Auto class of a model by the end of the name of its class.
_BY_ENDING = {
    "ForCausalLM": CAUSAL_LM,
    "ForConditionalGeneration": IMAGE_TEXT,
    "ForSequenceClassification": CLASSIFICATION,
    "Retrieval": AutoModel.__name__,
    "Model": AutoModel.__name__,
}


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder contains a PEFT adapter, and not a model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def make_adapter_card(
    folder: Path,
    name: str,
    *,
    template: str | Path | None = None,
    recipe: Mapping[str, Any] | None = None,
    base_model: str | Sequence[str] | None = None,
) -> ModelCard:
    """
    Makes the card of an adapter.

    Args:
        folder (`Path`):
            Folder of the adapter.
        name (`str`):
            Name of the adapter.
        template (`str` or `Path`, *optional*):
            Jinja template.
        recipe (`Mapping[str, Any]`, *optional*):
            The recipe that the adapter was trained with.
        base_model (`str` or `Sequence[str]`, *optional*):
            The model that the adapter belongs to; by default, what the configuration of the adapter says.

    Returns:
        `huggingface_hub.ModelCard`: The card.
    """
    adapter = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    given = [base_model] if isinstance(base_model, str) else list(base_model or [])
    parents = given or [adapter["base_model_name_or_path"]] * bool(adapter.get("base_model_name_or_path"))
    revision = adapter.get("revision")
    base = _config_of(parents[0], revision) if parents else {}
    needs_code = "auto_map" in base or not base
    auto_class = _auto_class(adapter, base)
    reads_images = auto_class == IMAGE_TEXT or "vision_config" in base
    on_hub = [parent for parent in parents if is_on_hub(parent)]
    is_lora = adapter.get("peft_type", "LORA") == "LORA"
    data = ModelCardData(
        model_name=name,
        library_name="peft",
        pipeline_tag=TASKS.get(auto_class) if base else None,
        base_model=on_hub[0] if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        datasets=(datasets_of(recipe) if recipe is not None else []) or None,
        tags=[*["lora"] * is_lora, *["moe"] * bool(adapter.get("target_parameters"))] or None,
        **inherited_metadata(parents),
    )
    of_base = link_to(parents[0]) if parents else "its base model"
    shown = parents[0] if on_hub else "path/to/base"
    options = [f'revision="{revision}"'] * bool(revision) + ["trust_remote_code=True"] * needs_code
    kind = f"A LoRA adapter of rank {adapter.get('r')}" if is_lora else f"An adapter ({adapter['peft_type']})"
    card = ModelCard.from_template(
        data,
        template_path=str(template or shipped_root() / "model_card.md"),
        model_name=name,
        description=f"{kind} for {of_base}.",
        facts=_facts(adapter, folder / ADAPTER_WEIGHTS),
        is_adapter=True,
        is_upcycled=True,
        needs_code=needs_code,
        usage=_USAGE.format(auto_class=auto_class, arguments=", ".join([f'"{shown}"', *options]), name=name),
        recipe=None if recipe is None else recipe_text(recipe),
        training=None if recipe is None else training_text(recipe, {}),
        figures=figures_in(folder),
        limits=limits_text(
            parents=parents,
            is_upcycled=False,
            recipe=recipe,
            reads_images=reads_images and bool(base),
            needs_code=needs_code,
        ),
        scores=scores_text([]),
    )
    return card


def _facts(adapter: Mapping[str, Any], weights: Path) -> str:
    rows = {"type": adapter.get("peft_type"), "rank": adapter.get("r"), "alpha": adapter.get("lora_alpha")}
    if weights.is_file():
        shapes = [entry["shape"] for entry in read_header(weights)[0].values()]
        rows["parameters"] = f"{sum(math.prod(shape) for shape in shapes):,}"
    for key in ("target_modules", "target_parameters"):
        value = adapter.get(key)
        names = [value] if isinstance(value, str) else sorted(value or [])
        if names:
            rows[key.replace("_", " ")] = ", ".join(f"`{name}`" for name in names)
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items() if value)])


def _auto_class(adapter: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """
    Returns the name of the auto class that loads the base model. The task of an adapter for sequence classification
    decides. `CAUSAL_LM` does not: it is also the usual task of adapters for models with images.
    """
    task = adapter.get("task_type")
    if task == "SEQ_CLS":
        return CLASSIFICATION
    of_base = base.get("architectures") or [""]
    name = (adapter.get("auto_mapping") or {}).get("base_model_class") or of_base[0]
    for ending, auto_class in _BY_ENDING.items():
        if name.endswith(ending):
            return auto_class
    return CAUSAL_LM if task == "CAUSAL_LM" and "vision_config" not in base else IMAGE_TEXT


def _config_of(base: str, revision: str | None) -> dict[str, Any]:
    """Returns the configuration of a model in a folder or on the Hub. Empty if it cannot be read."""
    try:
        path = cached_file(
            base,
            "config.json",
            revision=revision,
            local_files_only=is_without_network(),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


_USAGE = """\
```python
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained({arguments})
model = PeftModel.from_pretrained(base, "{name}")
```"""
