"""A small Hub on this machine: serves folders to the unmodified client, which finds it by `HF_ENDPOINT`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
RESOLVE = re.compile(rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
TREE = re.compile(rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?")
INFO = re.compile(rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?")


@contextmanager
def hub_server(repos: Mapping[str, Path], refused: Mapping[str, tuple[int, str]] | None = None) -> Iterator[str]:
    """
    Serves folders as repositories with one commit on the branch `main`, which is a hash of what they contain.

    Args:
        repos (`Mapping[str, Path]`):
            Folder of each repository, by its name (`"user/name"`).
        refused (`Mapping[str, tuple[int, str]]`, *optional*):
            By the name of a repository, the status and error code of all answers, such as `(401, "GatedRepo")`.

    Yields:
        `str`: The address to give processes as `HF_ENDPOINT` (see [`hub_environment`]).
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"repos": repos, "refused": refused}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hub_environment(endpoint: str, home: Path) -> dict[str, str]:
    """Returns the environment of a process that uses the server, with an empty cache in `home`."""
    dropped = ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_MODULES_CACHE", "HF_HUB_CACHE")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    return environment | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}


def commit_of(folder: Path) -> str:
    """Returns the commit that the server gives a folder: a hash of its files."""
    files = (f"{path}\n".encode() + (folder / path).read_bytes() for path in _files(folder))
    return hashlib.sha1(b"\n".join(files)).hexdigest()


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repos: Mapping[str, Path]
    refused: Mapping[str, tuple[int, str]] | None

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        answers = {RESOLVE: self._file, TREE: self._tree, INFO: self._info}
        found = next((match for pattern in answers if (match := pattern.fullmatch(path))), None)
        if found is None:
            return self._refuse(404, "EntryNotFound")
        repo, revision = found["repo"], found["revision"] or "main"
        if self.refused and repo in self.refused:
            return self._refuse(*self.refused[repo])
        if repo not in self.repos:
            return self._refuse(401, "RepoNotFound")  # as the Hub answers without a token
        folder = self.repos[repo]
        commit = commit_of(folder)
        if revision not in ("main", commit):
            return self._refuse(404, "RevisionNotFound")
        answers[found.re](repo, folder, commit, (found.groupdict().get("path") or "").rstrip("/"))

    do_HEAD = do_GET

    def _file(self, repo: str, folder: Path, commit: str, path: str) -> None:
        if path not in _files(folder):
            return self._refuse(404, "EntryNotFound", commit)
        content = (folder / path).read_bytes()
        self._send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    def _tree(self, repo: str, folder: Path, commit: str, path: str) -> None:
        files = [file for file in _files(folder) if not path or file.startswith(f"{path}/")]
        if not files:
            return self._refuse(404, "EntryNotFound", commit)
        entries = [
            {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": commit} for file in files
        ]
        self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _info(self, repo: str, folder: Path, commit: str, path: str) -> None:
        siblings = [{"rfilename": file} for file in _files(folder)]
        info = {"id": repo, "modelId": repo, "sha": commit, "private": False, "gated": False, "siblings": siblings}
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code} | ({} if commit is None else {"X-Repo-Commit": commit})
        self._send(status, json.dumps({"error": code}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Prints nothing."""
