"""Adapters: the model that they were trained on, and their model cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .model_card import write_model_card
from .parents import README
from .push_errors import PushError
from .push_files import ADAPTER_CONFIG, PushedFiles, staged
from .push_private import check_no_tokens, is_local_path, name_in_cache

BASE = "base_model_name_or_path"
# Title of the empty template that PEFT saves with an adapter.
_EMPTY_CARD = "# Model Card for Model ID"


def name_base(found: PushedFiles, base_model: str | None) -> str:
    """
    Makes an adapter name its base model by its name on the Hub.

    Args:
        found ([`PushedFiles`]):
            The files, of which `adapter_config.json` is changed.
        base_model (`str`, *optional*):
            Name of the base model on the Hub. By default, the one that the adapter names.

    Returns:
        `str`: The name of the base model.

    Raises:
        PushError: If the adapter names a local path or nothing, and `base_model` is not given.
    """
    config = found.json(ADAPTER_CONFIG)
    named = config.get(BASE) or ""
    base = base_model or name_in_cache(named) or named
    if not base or is_local_path(base):
        reason = f"names a path of this machine ({base}) as" if base else "does not name"
        raise PushError(
            f"{ADAPTER_CONFIG} {reason} the base model of the adapter, so others cannot load it: upload the base model "
            "first, and pass its name on the Hub with `base_model=` (--base-model user/name)."
        )
    if base != named:
        found.add(ADAPTER_CONFIG, (json.dumps(config | {BASE: base}, indent=2) + "\n").encode())
        instead = f" instead of {named}" if named else ""
        found.notes.append(f"{ADAPTER_CONFIG}: names {base} as the base model{instead}")
    return base


def adapter_card(folder: Path, found: PushedFiles, repo_id: str, base: str) -> str:
    """
    Returns the model card of an adapter: that of the folder with the name of the base model in its metadata, or a new
    one if there is none or only the empty template of PEFT.
    """
    path = folder / README
    if path.is_file() and _EMPTY_CARD not in (text := path.read_text(encoding="utf-8")):
        check_no_tokens(README, text)
        card = ModelCard(text, ignore_metadata_errors=True)
        data: Any = card.data
        data.base_model = base
        old, new = "base_model:adapter:", f"base_model:adapter:{base}"
        data.tags = [new if tag.startswith(old) else tag for tag in data.tags or []] or None
        return str(card)
    found.notes.append(f"{README}: written from the configuration")
    with staged(folder, found) as stage:
        return str(write_model_card(stage, model_name=repo_id, base_model=base))
