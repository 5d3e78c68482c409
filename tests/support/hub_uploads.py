"""What the Hub in `hub_server.py` answers to requests that write."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any
from urllib.parse import unquote

import yaml

from tests.support.hub_store import Repository, is_large
from tests.support.hub_xet import download, find_upload

TOKEN = "hf_" + "test" * 8  # of the user `user`, with the right to write
READ_TOKEN = "hf_" + "read" * 8
EXPIRED_TOKEN = "hf_" + "past" * 8

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
BRANCH = re.compile(rf"/api/models/{REPO}/branch/(?P<revision>[^/]+)")
PREUPLOAD = re.compile(rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)")
COMMIT = re.compile(rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)")
LFS_BATCH = re.compile(rf"/{REPO}\.git/info/lfs/objects/batch")
LFS_VERIFY = re.compile(rf"/{REPO}\.git/info/lfs/verify")
LFS_OBJECT = re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?")


class Uploads:
    """Mixed into the handler of requests, which reads and answers them."""

    def upload(self, path: str, query: dict[str, list[str]]) -> None:
        content = self.body()
        if path == "/api/validate-yaml":
            return self._validate_yaml(json.loads(content)["content"])
        if (large := LFS_OBJECT.fullmatch(path)) is not None:
            return self._put(large["oid"], large["part"], content)
        if (refusal := self._refusal_of_token()) is not None:
            return self.refuse(*refusal[:2], message=refusal[2])
        if path == "/api/repos/create":
            return self._create(json.loads(content))
        answers = {
            BRANCH: self._branch,
            PREUPLOAD: self._preupload,
            COMMIT: self._commit,
            LFS_BATCH: self._lfs_batch,
            LFS_VERIFY: self._lfs_verify,
        }
        found = next((match for pattern in answers if (match := pattern.fullmatch(path))), None)
        if found is None:
            return self.refuse(404, "EntryNotFound")
        repository = self.find(found["repo"])
        if repository is None:
            return
        self.is_proposal = query.get("create_pr") == ["1"]
        is_blob = found.re in (LFS_BATCH, LFS_VERIFY)  # which people without write access upload for pull requests
        if not repository.name.startswith("user/") and not self.is_proposal and not is_blob:
            return self.refuse(403, "", message=f"Forbidden: you have no write access to {repository.name}")
        with self.hub.store.lock:
            answers[found.re](repository, unquote(found.groupdict().get("revision") or "main"), content)

    def _refusal_of_token(self) -> tuple[int, str, str] | None:
        token = self.token()
        if token == TOKEN:
            return None
        if token == READ_TOKEN:
            return 403, "", "Forbidden: you need a token with write access"
        known = "Invalid credentials in Authorization header" if token else "Invalid username or password."
        return 401, "", known

    def _validate_yaml(self, card: str) -> None:
        try:
            parts = card.split("---\n")
            data = yaml.safe_load(parts[1]) if card.startswith("---\n") else {}
            errors = [] if isinstance(data, dict) else [{"message": '"metadata" must be an object'}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self.send_json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        found = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        if not name.startswith("user/"):
            return self.refuse(403, "", message=f"Forbidden: you have no write access to {name.partition('/')[0]}")
        with self.hub.store.lock:
            if name in self.hub.store.repositories:
                return self.send_json({"error": "You already created this model repo", **found}, status=409)
            is_private = wanted.get("visibility") == "private" or wanted.get("private") is True
            self.hub.store.repositories[name] = Repository.new(name, is_private)
        self.send_json(found)

    def _branch(self, repository: Repository, branch: str, content: bytes) -> None:
        if branch in repository.refs:
            return self.refuse(409, "", message=f"Reference already exists: {branch}")
        start = repository.at(json.loads(content).get("startingPoint") or "main")
        if start is None:
            return self.refuse(404, "RevisionNotFound")
        repository.refs[branch] = start.sha
        self.send_json({}, status=201)

    def _preupload(self, repository: Repository, revision: str, content: bytes) -> None:
        commit = repository.at(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        files = []
        for file in json.loads(content)["files"]:
            large = is_large(file["path"], b"") or file["size"] > 10 * 2**20
            known = commit.files.get(file["path"])
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": None if known is None or known.is_large != large else known.oid,
                }
            )
        self.send_json({"files": files})

    def _lfs_batch(self, repository: Repository, revision: str, content: bytes) -> None:
        objects = []
        for wanted in json.loads(content)["objects"]:
            actions = {}
            if wanted["oid"] not in self.hub.store.large_files:
                href = f"{self.hub.endpoint}/lfs/{wanted['oid']}"
                verify = f"{self.hub.endpoint}/{repository.name}.git/info/lfs/verify"
                size = self.hub.part_size
                parts = range(1, -(-wanted["size"] // size) + 1) if size else ()
                header = {"chunk_size": str(size), **{str(part): f"{href}/{part}" for part in parts}} if size else {}
                actions = {"actions": {"upload": {"href": href, "header": header}, "verify": {"href": verify}}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **actions})
        transfer = "multipart" if self.hub.part_size else "basic"
        self.send_json({"transfer": transfer, "objects": objects})

    def _put(self, oid: str, part: str | None, content: bytes) -> None:
        """Takes a large file, a part of one, or (as `POST`) the request to put its parts together."""
        if self.fault is not None and self.fault.effect == "corrupt":
            content = bytes([content[0] ^ 1]) + content[1:]
        with self.hub.store.lock:
            parts = self.hub.store.parts.setdefault(oid, {})
            if part is not None:
                parts[int(part)] = content
                self.hub.uploaded_bytes += len(content)
                return self.send(200, b"", {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})
            if self.command == "POST":
                named = [one["partNumber"] for one in json.loads(content)["parts"]]
                content = b"".join(parts[number] for number in named)
            else:
                self.hub.uploaded_bytes += len(content)
            if hashlib.sha256(content).hexdigest() != oid:
                return self.refuse(400, "", message="The content does not match its SHA-256")
            self.hub.store.large_files[oid] = content
        self.send(200, b"", {})

    def _lfs_verify(self, repository: Repository, revision: str, content: bytes) -> None:
        wanted = json.loads(content)
        found = self.hub.store.large_files.get(wanted["oid"])
        if found is None or len(found) != wanted["size"]:
            return self.refuse(404, "", message="The large file is not complete")
        self.send_json({})

    def _commit(self, repository: Repository, revision: str, content: bytes) -> None:
        parent = repository.at(revision)
        if parent is None:
            return self.refuse(404, "RevisionNotFound")
        title, added, deleted = "", {}, []
        for line in content.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent.sha):
                    return self.refuse(412, "", message="A commit has happened since. Please refresh and try again.")
            elif key == "file":
                added[value["path"]] = (base64.b64decode(value["content"]), False, None)
            elif key == "lfsFile":
                found = self._large_file(value["oid"], value.get("size"))
                if found is None:
                    return self.refuse(400, "", message=f"The large file {value['path']} was not uploaded")
                added[value["path"]] = (found[0], True, found[1])
            else:
                deleted.append(value["path"] + ("/" if key == "deletedFolder" else ""))
        if missing := [path for path in deleted if not path.endswith("/") and path not in parent.files]:
            return self.refuse(404, "EntryNotFound", message=f"A file with this name doesn't exist: {missing[0]}")
        number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
        ref = f"refs/pr/{number}" if self.is_proposal else revision
        made = repository.commit(ref, parent, title, added, deleted)
        url = f"{self.hub.endpoint}/{repository.name}"
        answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{url}/commit/{made.sha}"}
        if self.is_proposal:
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        self.send_json(answer)

    def _large_file(self, oid: str, size: int | None) -> tuple[bytes, str | None] | None:
        """Returns the content of an uploaded file, and its hash in Xet if it came from there."""
        xet_hash = find_upload(self.hub.cas, oid)
        if xet_hash is not None and size is not None:
            return download(self.hub.cas, xet_hash, size), xet_hash
        content = self.hub.store.large_files.get(oid)
        return None if content is None else (content, None)
