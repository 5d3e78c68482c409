"""The models that a model was made from: links to them, and the licence that it inherits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import cached_file

README = "README.md"

_without_network = ContextVar("_without_network", default=False)


@contextmanager
def without_network() -> Iterator[None]:
    """Context manager in which model cards are read from folders and the cache only."""
    previous = _without_network.set(True)
    try:
        yield
    finally:
        _without_network.reset(previous)


def is_without_network() -> bool:
    """Returns whether the caller is in [`without_network`]."""
    return _without_network.get()


def is_on_hub(name: str) -> bool:
    """Returns whether a name is that of a model on the Hub, and not a local path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def link_to(name: str) -> str:
    """Returns the name of a model in Markdown, with a link if it is on the Hub. Of a path, only the last part stays."""
    if is_on_hub(name):
        return f"[{name}](https://huggingface.co/{name})"
    return f"`{name.replace(chr(92), '/').rstrip('/').rpartition('/')[2]}`"


def inherited_metadata(parents: Sequence[str]) -> dict[str, Any]:
    """
    Returns the licence that a model inherits from the models that it was made from.

    Args:
        parents (`Sequence[str]`):
            Names on the Hub, or local folders.

    Returns:
        `dict[str, Any]`: `license`, and `license_name` and `license_link` if the parents' cards have them. Empty if a
        parent has no card, if its card names no licence, or if the parents' licences differ.
    """
    found = [_licence_of(parent) for parent in parents]
    return found[0] if found and all(licence == found[0] for licence in found) else {}


def _licence_of(name: str) -> dict[str, Any]:
    card = _card_of(name)
    data: dict[str, Any] = {} if card is None else card.data.to_dict()
    if "license" not in data:
        return {}
    link = data.get("license_link")
    if link is not None and "://" not in link:  # a file in the parent's repository
        link = f"https://huggingface.co/{name}/blob/main/{link}" if is_on_hub(name) else None
    fields = {"license": data["license"], "license_name": data.get("license_name"), "license_link": link}
    return {key: value for key, value in fields.items() if value is not None}


def _card_of(name: str) -> ModelCard | None:
    """Loads the model card of a folder or a repository; `None` if there is none, or if it cannot be read."""
    if not (os.path.isdir(name) or is_on_hub(name)):
        return None
    try:
        path = _in_cache(name) or cached_file(
            name,
            README,
            local_files_only=is_without_network(),
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if path is None else ModelCard.load(path, ignore_metadata_errors=True)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _in_cache(name: str) -> str | None:
    """Returns the path of a model card in the cache, if it was downloaded before."""
    found = None if os.path.isdir(name) else try_to_load_from_cache(name, README)
    return found if isinstance(found, str) else None
