"""Finds what must not be published: tokens, and paths of this machine."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from safetensors import safe_open

from .parents import is_on_hub
from .push_errors import PushError

# Fields that name what a model or a file was loaded from. Nothing reads them after loading from the Hub.
_ORIGINS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "cache_dir")
# Fields that name a parent of the model, which is only of use if it is on the Hub.
_PARENTS = ("base_model", "vision_encoder")
# Vocabularies contain parts of paths, which mean nothing there.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "entity_vocab.json", "merges.txt", "vocab.txt")

_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}"
    r"|sk-[A-Za-z0-9_-]{32,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abpr]-[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|\b[a-z]+://[^\s/:@\"']+:[^\s/@\"']+@"
)
_SECRET_FIELD = re.compile(r"(?:hub|auth|use_auth|access|api)_(?:token|key)|password|secret")
_END = r"[^\s\"'`<>|()\[\]{},;]"
_PATH = re.compile(
    r"(?<![\w.:/~\\-])(?:"
    r"/(?:home|Users|root|mnt|media|tmp|var|private|srv|data\d*|datasets?|scratch|workspaces?|work|content|kaggle"
    rf"|net|gpfs|lustre|nfs|fsx|Volumes)/{_END}+"
    rf"|~/{_END}+|[A-Za-z]:[\\/]{_END}+|\\\\[\w.-]+\\{_END}+|file://{_END}+)"
)
_IN_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")


def check_no_tokens(path_in_repo: str, text: str) -> None:
    """
    Checks that a file contains no token of a service.

    Args:
        path_in_repo (`str`):
            Name of the file, for the error.
        text (`str`):
            Its content.

    Raises:
        PushError: If there is one. The message has the line and the first characters only.
    """
    own = get_token()
    found = _TOKENS.search(text)
    place = found.start() if found is not None else text.find(own) if own else -1
    if place < 0:
        return
    line = text.count("\n", 0, place) + 1
    raise PushError(
        f"{path_in_repo}, line {line}, contains an access token or a password ({text[place : place + 6]}…): remove it, "
        "and revoke it if it was ever published."
    )


def clean_json(path_in_repo: str, text: str) -> tuple[str, list[str]]:
    """
    Removes fields with paths of this machine from a JSON file that nothing reads after loading from the Hub.

    Args:
        path_in_repo (`str`):
            Name of the file.
        text (`str`):
            Its content.

    Returns:
        `tuple[str, list[str]]`: The new content, which is the old one if nothing was removed, and what was removed.

    Raises:
        PushError: If the file is not valid JSON, contains a token, or has a path of this machine in another field.
    """
    check_no_tokens(path_in_repo, text)
    if Path(path_in_repo).name in _VOCABULARIES:
        return text, []
    try:
        content = json.loads(text)
    except ValueError as error:
        raise PushError(f"{path_in_repo} is not valid JSON ({error}): save the checkpoint again.") from error
    removed: list[str] = []
    cleaned = _cleaned(content, "", path_in_repo, removed)
    return (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", removed) if removed else (text, [])


def shorten_paths(text: str, replacements: Mapping[str, str]) -> tuple[str, list[str]]:
    """
    Replaces paths of this machine in a text for readers by their last component.

    Args:
        text (`str`):
            The text, such as a model card.
        replacements (`Mapping[str, str]`):
            What to write instead of certain paths.

    Returns:
        `tuple[str, list[str]]`: The new text, and the paths that were replaced.
    """
    found: list[str] = []

    def short(match: re.Match) -> str:
        path = match[0].rstrip(".:")
        found.append(path)
        name = replacements.get(path) or name_in_cache(path) or re.split(r"[\\/]", path.rstrip("\\/"))[-1]
        return name + match[0][len(path) :]

    for path in sorted([*replacements, *_own_folders()], key=len, reverse=True):
        if "/" in path or "\\" in path:  # a single word would be replaced wherever it is in the text
            pattern = re.compile(rf"(?<![\w/]){re.escape(path)}(?![\w-]){_END}*")
            text = pattern.sub(short, text)
    return _PATH.sub(short, text), list(dict.fromkeys(found))


def check_no_paths(path_in_repo: str, text: str) -> None:
    """Raises `PushError` if a text contains a folder of this machine: the home, current or temporary folder."""
    for folder in _own_folders():
        place = text.find(f"{folder}/")
        if place >= 0:
            line = text.count("\n", 0, place) + 1
            raise PushError(f"{path_in_repo}, line {line}, contains a path of this machine ({folder}/…): remove it.")


def check_weights_metadata(path: Path, path_in_repo: str) -> None:
    """Raises `PushError` if the metadata of a safetensors file contain a token or a path of this machine."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    for key, value in metadata.items():
        place = f"{path_in_repo} (metadata {key!r})"
        check_no_tokens(place, value)
        if _PATH.search(value) is not None:
            raise PushError(f"{place} contains a path of this machine: save the weights again without it.")
        check_no_paths(place, value)


def name_in_cache(path: str) -> str | None:
    """Returns the name on the Hub of a model whose path is in the cache of `huggingface_hub`."""
    match = _IN_CACHE.search(path.replace("\\", "/"))
    return None if match is None else f"{match[1]}/{match[2]}"


def is_local_path(value: str) -> bool:
    """Returns whether a name of a model is a path of this machine instead of a name on the Hub."""
    return bool(value) and (is_machine_path(value) or not is_on_hub(value))


def is_machine_path(value: str) -> bool:
    """Returns whether a string is, or starts with, an absolute path."""
    return _PATH.match(value) is not None or any(value == one or f"{one}/" in value for one in _own_folders())


def _cleaned(value: Any, place: str, path_in_repo: str, removed: list[str]) -> Any:
    if isinstance(value, dict):
        kept = {}
        for key, item in value.items():
            here = f"{place}.{key}" if place else str(key)
            if isinstance(item, str) and item and key in (*_ORIGINS, *_PARENTS):
                on_hub = name_in_cache(item) if key in _PARENTS else None
                if on_hub is not None:
                    removed.append(f"{here} (now {on_hub})")
                    item = on_hub
                elif is_machine_path(item) or (key in _PARENTS and is_local_path(item)):
                    removed.append(here)
                    continue
            if isinstance(item, str) and item and _SECRET_FIELD.fullmatch(str(key)):
                raise PushError(f"{path_in_repo} has a value in the field `{here}`, which may be a secret: remove it.")
            kept[key] = _cleaned(item, here, path_in_repo, removed)
        return kept
    if isinstance(value, list):
        return [_cleaned(item, f"{place}[{number}]", path_in_repo, removed) for number, item in enumerate(value)]
    if isinstance(value, str) and is_machine_path(value):
        raise PushError(
            f"{path_in_repo} has a path of this machine in the field `{place}` ({value}): remove it, or replace it by "
            "a name on the Hub."
        )
    return value


def _own_folders() -> Iterator[str]:
    """Yields folders of this machine whose names must not be published."""
    for folder in {Path.home(), Path.cwd(), Path(tempfile.gettempdir())}:
        if len(folder.parts) > 1:
            yield folder.as_posix()
