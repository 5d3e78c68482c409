"""
A small Hub on this machine: serves repositories to the unmodified client, which finds it by `HF_ENDPOINT`, and takes
uploads. As a process: `python -m tests.support.hub_server --port 8123`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.hub_store import Commit, Repository, Store, StoredFile
from tests.support.hub_store import commit_of as commit_of
from tests.support.hub_uploads import EXPIRED_TOKEN, READ_TOKEN, TOKEN, Uploads
from tests.support.hub_xet import connection, connection_headers

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
RESOLVE = re.compile(rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
TREE = re.compile(rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?")
INFO = re.compile(rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?")
REFS = re.compile(rf"/api/models/{REPO}/refs")
COMMITS = re.compile(rf"/api/models/{REPO}/commits/(?P<revision>[^/]+)")
XET_TOKEN = re.compile(rf"/api/models/{REPO}/xet-(read|write)-token/[^/]+")


class Fault:
    """
    What goes wrong with the next requests that match.

    Args:
        request (`str`): Regular expression for the method and the path, such as `"PUT /lfs/"`.
        effect (`int` or `str`): The status of the answer; `"cut"` to close the connection after half of the request;
            `"cut answer"` to close it after half of the answer; or `"corrupt"` to flip a bit of what was uploaded.
        times (`int`): How often.
        after (`int`): How many matching requests pass before.
        headers (`dict[str, str]`): Further headers of the answer.
        message (`str`): The error in the answer.
    """

    def __init__(self, request: str, effect: int | str, times: int = 1, after: int = 0, headers=None, message="fault"):
        self.request, self.effect, self.times, self.after = re.compile(request), effect, times, after
        self.headers, self.message = dict(headers or {}), message

    def applies(self, request: str) -> bool:
        if not self.times or not self.request.match(request):
            return False
        if self.after:
            self.after -= 1
            return False
        self.times -= 1
        return True


class Hub:
    """
    The state of a running server.

    Args:
        store ([`Store`]): Its repositories.
        cas (`Path`): Folder in which Xet stores files.
        refused (`Mapping[str, tuple[int, str]]`): See [`hub_server`].
        part_size (`int`, *optional*): Size of the parts in which clients must upload large files without Xet.
    """

    def __init__(self, store: Store, cas: Path, refused: Mapping[str, tuple[int, str]], part_size: int | None) -> None:
        self.store, self.cas, self.refused, self.part_size = store, cas, refused, part_size
        self.endpoint = ""
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # method and path
        self.uploaded_bytes = 0  # of large files, without Xet

    def repository(self, name: str) -> Repository:
        return self.store.repositories[name]

    def count(self, request: str) -> int:
        """Returns how many requests matched a regular expression for the method and the path."""
        return sum(bool(re.match(request, one)) for one in self.requests)


@contextmanager
def running_hub(
    repos: Mapping[str, Path] | None = None,
    refused: Mapping[str, tuple[int, str]] | None = None,
    part_size: int | None = None,
    port: int = 0,
) -> Iterator[Hub]:
    """Runs a server (see [`hub_server`]), and yields its state."""
    store = Store({name: Repository.of_folder(name, folder) for name, folder in (repos or {}).items()})
    with tempfile.TemporaryDirectory(prefix="cas-") as cas:
        hub = Hub(store, Path(cas), refused or {}, part_size)
        server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": hub}))
        server.daemon_threads = True
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


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
    with running_hub(repos, refused) as hub:
        yield hub.endpoint


def hub_environment(endpoint: str, home: Path) -> dict[str, str]:
    """Returns the environment of a process that uses the server, with an empty cache in `home`."""
    dropped = ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_MODULES_CACHE", "HF_HUB_CACHE", "HF_HUB_DISABLE_XET")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    return environment | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}


class _Handler(Uploads, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each answer takes 40 ms
    hub: Hub

    def do_GET(self) -> None:
        self._handle(self._read)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._handle(self.upload)

    do_PUT = do_POST

    def _handle(self, answer: Callable[[str, dict[str, list[str]]], None]) -> None:
        url = urlsplit(self.path)
        request = f"{self.command} {url.path}"
        with self.hub.store.lock:
            self.hub.requests.append(request)
            self.fault = next((fault for fault in self.hub.faults if fault.applies(request)), None)
        if self.fault is not None and self.fault.effect == "cut":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self._cut()
        if self.fault is not None and isinstance(self.fault.effect, int):
            self.body()
            return self.refuse(self.fault.effect, "", message=self.fault.message, headers=self.fault.headers)
        answer(url.path, parse_qs(url.query))

    def _read(self, path: str, query: dict[str, list[str]]) -> None:
        if path == "/api/whoami-v2":
            return self._whoami()
        answers = {
            RESOLVE: self._file,
            TREE: self._tree,
            INFO: self._info,
            REFS: self._refs,
            COMMITS: self._commits,
            XET_TOKEN: self._xet_token,
        }
        found = next((match for pattern in answers if (match := pattern.fullmatch(path))), None)
        if found is None:
            return self.refuse(404, "EntryNotFound")
        values = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
        repository = self.find(values["repo"])
        if repository is None:
            return
        if found.re is XET_TOKEN:
            return self._xet_token(found[2])
        commit = repository.at(values.get("revision", "main"))
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        self.query = query
        answers[found.re](repository, commit, values.get("path", "").rstrip("/"))

    def find(self, name: str) -> Repository | None:
        """Returns a repository, or refuses the request."""
        if name in self.hub.refused:
            return self.refuse(*self.hub.refused[name])
        repository = self.hub.store.repositories.get(name)
        token = self.token()
        if token == EXPIRED_TOKEN:
            return self.refuse(401, "", message="Invalid credentials in Authorization header")
        if repository is None or (repository.is_private and token is None):
            return self.refuse(404 if token else 401, "RepoNotFound", message="Repository not found")
        return repository

    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _whoami(self) -> None:
        if self.token() not in (TOKEN, READ_TOKEN):
            return self.refuse(401, "", message="Invalid credentials in Authorization header")
        self.send_json({"type": "user", "name": "user", "fullname": "User", "orgs": []})

    def _xet_token(self, kind: str) -> None:
        if kind == "write" and self.token() != TOKEN:
            return self.refuse(403, "", message="Forbidden: you need a token with write access")
        self.send_json(connection(self.hub.cas), connection_headers(self.hub.cas))

    def _file(self, repository: Repository, commit: Commit, path: str) -> None:
        file = commit.files.get(path)
        if file is None:
            return self.refuse(404, "EntryNotFound", commit.sha)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.is_large:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        if file.xet_hash is not None:
            route = f"{self.hub.endpoint}/api/models/{repository.name}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": file.xet_hash, "X-Xet-Refresh-Route": route}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self.send(200, file.content, headers)
        start, size = int(wanted[1]), len(file.content)
        end = min(int(wanted[2] or size - 1), size - 1)
        if start >= size:
            return self.send(416, b"", {"Content-Range": f"bytes */{size}"})
        self.send(206, file.content[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{size}"})

    def _tree(self, repository: Repository, commit: Commit, path: str) -> None:
        prefix = f"{path}/" if path else ""
        inside = {name: file for name, file in sorted(commit.files.items()) if name.startswith(prefix)}
        if not inside:
            return self.refuse(404, "EntryNotFound", commit.sha)
        entries, folders = [], set()
        is_recursive, is_expanded = (self.query.get(key, [""])[0].lower() == "true" for key in ("recursive", "expand"))
        for name, file in inside.items():
            steps = name.removeprefix(prefix).split("/")[:-1]
            folders |= {prefix + "/".join(steps[:depth]) for depth in range(1, len(steps) + 1)}
            if is_recursive or not steps:
                entries.append(self._entry(repository, name, file, is_expanded))
        shown = [name for name in sorted(folders) if is_recursive or "/" not in name.removeprefix(prefix)]
        self.send_json([*({"type": "directory", "path": name, "oid": commit.sha} for name in shown), *entries])

    def _entry(self, repository: Repository, path: str, file: StoredFile, is_expanded: bool) -> dict:
        entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.git_oid}
        if file.is_large:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
        if file.xet_hash is not None:
            entry["xetHash"] = file.xet_hash
        if is_expanded:
            title = repository.commits[file.commit].title
            entry["lastCommit"] = {"id": file.commit, "title": title, "date": "2026-01-01T00:00:00.000Z"}
        return entry

    def _info(self, repository: Repository, commit: Commit, path: str) -> None:
        siblings = [{"rfilename": file} for file in sorted(commit.files)]
        about = {"sha": commit.sha, "private": repository.is_private, "gated": False, "siblings": siblings}
        self.send_json({"id": repository.name, "modelId": repository.name} | about)

    def _refs(self, repository: Repository, commit: Commit, path: str) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in repository.refs.items()
            if not name.startswith("refs/")
        ]
        self.send_json({"branches": branches, "tags": [], "converts": []})

    def _commits(self, repository: Repository, commit: Commit, path: str) -> None:
        date = "2026-01-01T00:00:00.000Z"
        self.send_json(
            [
                {"id": one.sha, "title": one.title, "message": "", "authors": [], "date": date}
                for one in repository.history(commit.sha)
            ]
        )

    def body(self) -> bytes:
        """Reads the body of the request."""
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def refuse(self, status: int, code: str, commit: str | None = None, message: str | None = None, headers=None):
        headers = {"X-Error-Code": code} | ({} if commit is None else {"X-Repo-Commit": commit}) | dict(headers or {})
        if message is not None:
            headers["X-Error-Message"] = message
        self.send(status, json.dumps({"error": message or code}).encode(), headers)

    def send_json(self, content, headers: Mapping[str, str] | None = None, status: int = 200) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.effect == "cut answer":
            self.wfile.write(content[: len(content) // 2])
            return self._cut()
        self.wfile.write(content)

    def _cut(self) -> None:
        self.wfile.flush()
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8123)
    with running_hub(port=parser.parse_args().port) as hub:
        print(f"HF_ENDPOINT={hub.endpoint} HF_TOKEN={TOKEN}", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
