"""Which files of a repository an upload may replace."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from .push_errors import PushError
from .push_files import CONFIG, PushedFile

# In the title of every commit of this package.
MARK = "sparse-moe-vlm"
# Titles of the commits of `push_to_hub` of Transformers' models, processors and `Trainer`. The title for a model with a
# head contains the name of its class.
_UPLOADED = ("model", "config", "processor", "tokenizer", "feature extractor")
_TRAINED = r"End of training|Training in progress, (step|epoch) \d+(, checkpoint)?"
_SHOWN = 5


def check_ours(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    there: Mapping[str, RepoFile],
    files: Mapping[str, PushedFile],
    outdated: Sequence[str],
) -> None:
    """
    Checks that an upload only replaces files that this package uploaded, or that Transformers (`model.push_to_hub`)
    uploaded for a model of the same type with the same code. The title of its last commit tells who uploaded a file.

    Args:
        api (`HfApi`):
            Client of the Hub.
        repo_id (`str`):
            Name of the repository.
        revision (`str`, *optional*):
            Commit that the upload follows.
        there (`Mapping[str, RepoFile]`):
            The files of the repository with their last commits, by path.
        files (`Mapping[str, PushedFile]`):
            The files to upload, by path.
        outdated (`Sequence[str]`):
            The files of the repository to delete.

    Raises:
        PushError: If the repository only contains files of others, or if files of others would be lost.
    """
    ours = _uploaded_with(re.escape(MARK), there)
    foreign = [
        name for name, file in there.items() if name not in ours and not (name in files and _is_same(file, files[name]))
    ]
    if foreign:
        ours |= _uploaded_with(_titles_of_transformers(api, repo_id, revision, there, files), there)
        foreign = [name for name in foreign if name not in ours]
    if ours:
        foreign = [name for name in foreign if name in files or name in outdated]
    if foreign:
        names = ", ".join(foreign[:_SHOWN]) + (f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else "")
        raise PushError(
            f"{repo_id} contains files that sparse-moe-vlm did not write: {names}. Choose another repository, propose "
            "the change with `create_pr` (--create-pr), or replace files of the same name with `force` (--force)."
        )


def _uploaded_with(titles: str, there: Mapping[str, RepoFile]) -> set[str]:
    """Returns the files whose last commit has a title that contains a match of a regular expression."""
    return {
        name
        for name, file in there.items()
        if file.last_commit is not None and re.search(titles, file.last_commit.title)
    }


def _titles_of_transformers(
    api: HfApi, repo_id: str, revision: str | None, there: Mapping[str, RepoFile], files: Mapping[str, PushedFile]
) -> str:
    """
    Returns a regular expression for the titles of commits of Transformers. It matches nothing if the repository
    contains another kind of model than the one to upload.
    """
    nothing = r"(?!)"
    if CONFIG not in there or CONFIG not in files:
        return nothing
    with tempfile.TemporaryDirectory() as cache:
        path = api.hf_hub_download(repo_id, CONFIG, revision=revision, cache_dir=cache)
        config = _read(Path(path).read_bytes())
    ours = _read(files[CONFIG].text)
    # Models of Transformers have no `auto_map`.
    if not all(config.get(key) and config[key] == ours.get(key) for key in ("model_type", "auto_map")):
        return nothing
    classes = config.get("architectures")
    names = [*_UPLOADED, *(classes if isinstance(classes, list) else [])]
    return f"^(Upload ({'|'.join(re.escape(str(name)) for name in names)})|{_TRAINED})$"


def _read(text: str | bytes) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _is_same(there: RepoFile, file: PushedFile) -> bool:
    if there.size != file.size:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == _hash(file, hashlib.sha256())
    return there.blob_id == _hash(file, hashlib.sha1(b"blob %d\0" % file.size))


def _hash(file: PushedFile, digest: hashlib._Hash) -> str:
    if isinstance(file.content, bytes):
        digest.update(file.content)
    else:
        with file.content.open("rb") as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
