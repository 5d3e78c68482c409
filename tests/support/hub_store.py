"""The repositories of the Hub in `hub_server.py`: files by commit, branches, pull requests and large files."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

INITIAL_COMMIT = "initial commit"
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(frozen=True)
class StoredFile:
    """
    A file in a commit.

    Args:
        content (`bytes`): The content.
        is_large (`bool`): Whether it is stored as a large file (LFS).
        commit (`str`): The commit that wrote it.
        xet_hash (`str`, *optional*): Its hash in Xet, if it was uploaded through Xet.
    """

    content: bytes
    is_large: bool
    commit: str
    xet_hash: str | None = None

    @property
    def oid(self) -> str:
        return self.sha256 if self.is_large else self.git_oid

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A commit: its hash, its title, its parent and all files of the repository."""

    sha: str
    title: str
    parent: str | None
    files: Mapping[str, StoredFile]


@dataclass
class Repository:
    """A repository with its branches and pull requests (`refs/pr/1`, …)."""

    name: str
    is_private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_folder(cls, name: str, folder: Path) -> Repository:
        """A repository with one commit, whose hash is that of the folder: see [`commit_of`]."""
        repository, sha = cls(name), commit_of(folder)
        files = {path: (folder / path).read_bytes() for path in files_of(folder)}
        stored = {path: StoredFile(content, is_large(path, content), sha) for path, content in files.items()}
        repository._add(Commit(sha, INITIAL_COMMIT, None, stored), "main")
        return repository

    @classmethod
    def new(cls, name: str, is_private: bool) -> Repository:
        """An empty repository, as the Hub creates it."""
        repository = cls(name, is_private)
        sha = hashlib.sha1(name.encode()).hexdigest()
        file = StoredFile(GITATTRIBUTES, False, sha)
        repository._add(Commit(sha, INITIAL_COMMIT, None, {".gitattributes": file}), "main")
        return repository

    def at(self, revision: str) -> Commit | None:
        """Returns the commit of a branch, a pull request or a hash."""
        return self.commits.get(self.refs.get(revision, revision))

    def commit(
        self,
        ref: str,
        parent: Commit,
        title: str,
        added: Mapping[str, tuple[bytes, bool, str | None]],
        deleted: list[str],
    ) -> Commit:
        """
        Adds a commit to a branch.

        Args:
            ref (`str`): The branch, or `refs/pr/…`.
            parent (`Commit`): The commit before it.
            title (`str`): First line of the message.
            added (`Mapping`): By path, the content, whether it is a large file, and its hash in Xet.
            deleted (`list[str]`): Paths of files, or of folders with a `/` at the end.
        """
        sha = hashlib.sha1(f"{self.name} {len(self.commits)} {title}".encode()).hexdigest()
        kept = {
            path: file
            for path, file in parent.files.items()
            if not any(path == one or (one.endswith("/") and path.startswith(one)) for one in deleted)
        }
        new = {path: StoredFile(content, large, sha, xet) for path, (content, large, xet) in added.items()}
        return self._add(Commit(sha, title, parent.sha, kept | new), ref)

    def write(self, files: Mapping[str, bytes], title: str = "Update by hand", ref: str = "main") -> Commit:
        """Adds a commit as if someone had made it on the website."""
        added = {path: (content, is_large(path, content), None) for path, content in files.items()}
        return self.commit(ref, self.commits[self.refs[ref]], title, added, [])

    def history(self, revision: str = "main") -> list[Commit]:
        """Returns the commits of a branch, newest first."""
        commit, found = self.at(revision), []
        while commit is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent or "")
        return found

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Returns the content of all files, without `.gitattributes`."""
        commit = self.commits[self.refs.get(revision, revision)]
        return {path: file.content for path, file in sorted(commit.files.items()) if path != ".gitattributes"}

    def _add(self, commit: Commit, ref: str) -> Commit:
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit


class Store:
    """All repositories, and the large files that were uploaded and that commits can refer to."""

    def __init__(self, repositories: Mapping[str, Repository]) -> None:
        self.repositories = dict(repositories)
        self.large_files: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}  # of large files that are uploaded in parts
        self.lock = threading.RLock()


def is_large(path: str, content: bytes) -> bool:
    """Returns whether the Hub stores a file as a large file."""
    return path.endswith((".safetensors", ".bin", ".pt")) or len(content) > 10 * 2**20


def commit_of(folder: Path) -> str:
    """Returns the commit that the server gives a folder: a hash of its files."""
    files = (f"{path}\n".encode() + (folder / path).read_bytes() for path in files_of(folder))
    return hashlib.sha1(b"\n".join(files)).hexdigest()


def files_of(folder: Path) -> list[str]:
    """Returns the paths of all files in a folder, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
