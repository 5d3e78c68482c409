"""Uploading files to a repository of the Hub as one commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from .push_errors import PushError, errors_of_the_hub
from .push_files import PushedFile, is_own_file
from .push_ownership import MARK, check_ours

MAIN = "main"
_GIT_ATTRIBUTES = ".gitattributes"  # in every new repository


@dataclass(frozen=True)
class Destination:
    """
    Where to upload to.

    Args:
        repo_id (`str`): Name of the repository: `"user/name"`.
        private (`bool`, *optional*): Whether the repository is private if it is created.
        revision (`str`, *optional*): Branch, which is created if it does not exist.
        create_pr (`bool`): Whether to open a pull request instead of changing the branch.
        force (`bool`): Whether files may be replaced that this package did not upload.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    force: bool = False


@dataclass(frozen=True)
class Uploaded:
    """
    A finished upload.

    Args:
        url (`str`): Address of the commit, or of the pull request.
        commit (`str`): Hash of the commit.
        deleted (`list[str]`): Files of an earlier upload that were deleted.
        info (`CommitInfo`): The answer of `huggingface_hub`.
        is_unchanged (`bool`): Whether the repository contained the same files before, so that there is no new commit.
    """

    url: str
    commit: str
    deleted: list[str]
    info: CommitInfo
    is_unchanged: bool


def upload(
    files: Mapping[str, PushedFile], destination: Destination, *, message: str, token: str | None = None
) -> Uploaded:
    """
    Uploads files as one commit. Files that are in the repository already are not uploaded again.

    Args:
        files (`Mapping[str, PushedFile]`):
            The files, by their path in the repository.
        destination ([`Destination`]):
            Where to upload to.
        message (`str`):
            Title of the commit.
        token (`str`, *optional*):
            Token with write access. By default, the one of `hf auth login` or `HF_TOKEN`.

    Returns:
        [`Uploaded`]: The commit.

    Raises:
        PushError: If the token or the repository does not allow the upload.
        PushInterruptedError: If the upload failed and can be repeated.
    """
    repo_id, api = destination.repo_id, HfApi(token=token, library_name=MARK)
    if MARK not in message:
        message = f"{message} ({MARK})"
    with errors_of_the_hub(repo_id):
        _prepare(api, destination)
        start = api.repo_info(repo_id, revision=_start(api, destination)).sha
        there = _files_there(api, repo_id, start)
        outdated = [name for name in there if is_own_file(name) and name not in files]
        if not (destination.force or destination.create_pr):
            check_ours(api, repo_id, start, there, files, outdated)
        if destination.revision is not None and not destination.revision.startswith("refs/"):
            api.create_branch(repo_id, branch=destination.revision, exist_ok=True)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationDelete(name) for name in outdated),
            *(CommitOperationAdd(name, _content(file)) for name, file in files.items()),
        ]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            revision=destination.revision,
            create_pr=destination.create_pr,
            parent_commit=start,
        )
    return Uploaded(commit.pr_url or commit.commit_url, commit.oid, outdated, commit, commit.oid == start)


def _prepare(api: HfApi, destination: Destination) -> None:
    """Creates the repository if it does not exist."""
    repo_id = destination.repo_id
    try:
        is_private = api.repo_info(repo_id).private
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=destination.private, exist_ok=True)
        return
    if destination.private and not is_private:
        raise PushError(
            f"{repo_id} exists and is public, so `private` (--private) has no effect on it: change its visibility in "
            "its settings first, or choose another name."
        )


def _start(api: HfApi, destination: Destination) -> str:
    """Returns the revision that the commit follows: the branch, or `main` if the branch is created."""
    branch = destination.revision
    if branch is None or branch.startswith("refs/"):
        return branch or MAIN
    branches = api.list_repo_refs(destination.repo_id).branches
    return branch if branch in [one.name for one in branches] else MAIN


def _files_there(api: HfApi, repo_id: str, revision: str | None) -> dict[str, RepoFile]:
    tree = api.list_repo_tree(repo_id, recursive=True, expand=True, revision=revision)
    return {file.path: file for file in tree if isinstance(file, RepoFile) and file.path != _GIT_ATTRIBUTES}


def _content(file: PushedFile) -> str | bytes:
    return str(file.content) if isinstance(file.content, Path) else file.content
