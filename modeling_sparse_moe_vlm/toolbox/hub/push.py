"""Uploading checkpoints to the Hub: models and adapters, as one complete repository."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitInfo
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .model_card import write_model_card
from .parents import README, without_network
from .push_adapter import adapter_card, name_base
from .push_errors import PushError
from .push_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    PushedFile,
    PushedFiles,
    adapter_files,
    add_card,
    add_images,
    add_licence,
    check_and_clean,
    model_files,
    staged,
    with_new_name,
)
from .push_private import is_local_path
from .push_repository import Destination, upload


@dataclass(frozen=True)
class PushPlan:
    """
    What an upload of a checkpoint contains.

    Args:
        repo_id (`str`):
            Name of the repository.
        kind (`str`):
            `"model"` or `"adapter"`.
        files (`dict[str, PushedFile]`):
            The files, by their path in the repository.
        left_out (`list[str]`):
            Files of the folder that are not uploaded.
        notes (`list[str]`):
            What was added or changed, and what is missing.
    """

    repo_id: str
    kind: str
    files: dict[str, PushedFile]
    left_out: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Number of bytes of all files."""
        return sum(file.size for file in self.files.values())


@dataclass(frozen=True)
class PushedCheckpoint:
    """
    A checkpoint on the Hub.

    Args:
        plan ([`PushPlan`]):
            What was uploaded.
        url (`str`):
            Address of the commit, or of the pull request.
        commit (`str`):
            Hash of the commit, which can be pinned with `revision=`.
        deleted (`list[str]`):
            Files of an earlier upload that were deleted.
        info (`huggingface_hub.CommitInfo`):
            The commit as `huggingface_hub` describes it.
        is_unchanged (`bool`):
            Whether the repository contained the same files before. Then there is no new commit or pull request.
    """

    plan: PushPlan
    url: str
    commit: str
    deleted: list[str]
    info: CommitInfo
    is_unchanged: bool = False


def plan_push(folder: str | os.PathLike, repo_id: str, *, base_model: str | None = None) -> PushPlan:
    """
    Lists what [`push_checkpoint`] uploads, without a network and without changing the folder. A new model card has the
    licence of the base model only if the card of the base model is in a local folder or in the cache.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of a model or of a LoRA adapter.
        repo_id (`str`):
            Name of the repository: `"user/name"`.
        base_model (`str`, *optional*):
            Name on the Hub of the model that an adapter was trained on. Needed if the adapter names a local path.

    Returns:
        [`PushPlan`]: The files and their sizes.

    Raises:
        PushError: If the checkpoint is not complete, contains a token, or names paths of this machine where they cannot
            be removed. The message names the file and says what to do.
        OSError: If the weights are damaged.
    """
    with without_network():
        return _plan(Path(folder), repo_id, base_model)


def push_checkpoint(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    force: bool = False,
    base_model: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> PushedCheckpoint:
    """
    Uploads a model or an adapter to the Hub, as one commit that contains everything that others need to load it, and
    nothing else.

    An interrupted upload leaves the repository unchanged. Repeat it to complete it: files that were uploaded completely
    are not uploaded again.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of a model (of this package's architecture, upcycled, for retrieval, or exported to a class of
            Transformers), or of a LoRA adapter.
        repo_id (`str`):
            Name of the repository: `"user/name"`. It is created if it does not exist.
        private (`bool`, *optional*):
            Whether the repository is private if it is created.
        revision (`str`, *optional*):
            Branch to upload to, which is created if it does not exist. By default, `main`.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request instead. It can be opened in repositories of others.
        force (`bool`, *optional*, defaults to `False`):
            Whether files may be replaced that neither this package nor `push_to_hub` of the same model uploaded.
        base_model (`str`, *optional*):
            Name on the Hub of the model that an adapter was trained on. Needed if the adapter names a local path.
        commit_message (`str`, *optional*):
            Title of the commit.
        token (`str`, *optional*):
            Token with write access. By default, the one of `hf auth login` or `HF_TOKEN`.

    Returns:
        [`PushedCheckpoint`]: The commit and what it contains.

    Raises:
        PushError: As [`plan_push`], and if the token or the repository does not allow the upload.
        PushInterruptedError: If the upload failed and can be repeated.
        OSError: If the weights are damaged.

    Example:

    ```python
    >>> pushed = push_checkpoint("outputs/demo/model", "user/my-model", private=True)
    >>> AutoModelForImageTextToText.from_pretrained("user/my-model", revision=pushed.commit, trust_remote_code=True)
    ```
    """
    check_destination(create_pr, revision)
    plan = _plan(Path(folder), repo_id, base_model)
    done = upload(
        plan.files,
        Destination(repo_id, private, revision, create_pr, force),
        message=commit_message or f"Upload {plan.kind} with sparse-moe-vlm",
        token=token,
    )
    return PushedCheckpoint(plan, done.url, done.commit, done.deleted, done.info, done.is_unchanged)


def check_destination(create_pr: bool, revision: str | None) -> None:
    """Raises `PushError` if the destination of an upload contradicts itself."""
    if create_pr and revision is not None:
        raise PushError("`create_pr` (--create-pr) and `revision` (--revision) cannot be combined.")


def _plan(folder: Path, repo_id: str, base_model: str | None) -> PushPlan:
    _check_names(repo_id, base_model)
    if not folder.is_dir():
        raise PushError(
            f"There is no folder {folder}: pass the folder that `save_pretrained` wrote a model or an adapter to."
        )
    if _is_adapter(folder):
        kind, found = "adapter", adapter_files(folder)
        base = name_base(found, base_model)
        check_and_clean(found)
        add_card(found, adapter_card(folder, found, repo_id, base), _replacements(folder, repo_id))
    elif (folder / CONFIG).is_file():
        if base_model is not None:
            raise PushError("`base_model` (--base-model) is only for adapters.")
        kind, found = "model", model_files(folder)
        check_and_clean(found)
        add_card(found, _model_card(folder, found, repo_id), _replacements(folder, repo_id))
    else:
        inner = sorted(path.parent for name in (CONFIG, ADAPTER_CONFIG) for path in folder.glob(f"*/{name}"))
        hint = f": did you mean {inner[0]}?" if inner else f": it has neither {CONFIG} nor {ADAPTER_CONFIG}."
        raise PushError(f"{folder} is not the folder of a model or an adapter{hint}")
    add_images(folder, found)
    add_licence(folder, found)
    left_out = sorted(
        path.name + "/" * path.is_dir() for path in folder.iterdir() if not _is_uploaded(path.name, found)
    )
    return PushPlan(repo_id, kind, dict(sorted(found.files.items())), left_out, found.notes)


def _check_names(repo_id: str, base_model: str | None) -> None:
    try:
        validate_repo_id(repo_id)
        is_full = repo_id.count("/") == 1
    except HFValidationError:
        is_full = False
    if not is_full:
        raise PushError(f"A repository is named as in `user/name`, but got {repo_id!r}.")
    if base_model is not None and is_local_path(base_model):
        raise PushError(f"`base_model` (--base-model) must be the name of a model on the Hub, but got {base_model!r}.")


def _is_adapter(folder: Path) -> bool:
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    return (folder / ADAPTER_WEIGHTS).is_file() or not (folder / CONFIG).is_file()


def _model_card(folder: Path, found: PushedFiles, repo_id: str) -> str:
    """Returns the model card of the folder, or a new one."""
    if (folder / README).is_file():
        card = (folder / README).read_text(encoding="utf-8")
        return with_new_name(card, {folder.name, folder.resolve().name, str(folder)}, repo_id)
    found.notes.append(f"{README}: written from the configuration")
    with staged(folder, found) as stage:
        return str(write_model_card(stage, model_name=repo_id))


def _replacements(folder: Path, repo_id: str) -> dict[str, str]:
    return {str(folder.resolve()): repo_id, str(folder.absolute()): repo_id}


def _is_uploaded(name: str, found: PushedFiles) -> bool:
    return any(uploaded == name or uploaded.startswith(f"{name}/") for uploaded in found.files)
