"""
Xet on the Hub of `hub_server.py`. The real client `hf_xet` writes to a folder (`casUrl: "local://…"`), and this module
finds there what it wrote.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

FAR_FUTURE = 4_102_444_800  # seconds: the year 2100
# The format of a shard (https://huggingface.co/docs/xet/shard): records of 48 bytes, of which the first is its header.
_RECORD, _HASH = 48, 32
_BOOKEND = b"\xff" * _HASH
_WITH_VERIFICATION, _WITH_METADATA = 1 << 31, 1 << 30


def connection(folder: Path) -> dict[str, str | int]:
    """Returns what the Hub answers to a request for a Xet token, for a storage in a folder."""
    return {"casUrl": f"local://{folder}", "exp": FAR_FUTURE, "accessToken": "xet-token"}


def connection_headers(folder: Path) -> dict[str, str]:
    """Returns the same as headers."""
    found = connection(folder)
    names = {"casUrl": "X-Xet-Cas-Url", "exp": "X-Xet-Token-Expiration", "accessToken": "X-Xet-Access-Token"}
    return {name: str(found[key]) for key, name in names.items()}


def find_upload(folder: Path, sha256: str) -> str | None:
    """Returns the Xet hash of an uploaded file, or `None` if no complete upload has this SHA-256."""
    for shard in sorted(folder.glob("xet/xorbs/shards/*.mdb")):
        for xet_hash, of_content in _files_in(shard.read_bytes()):
            if of_content == sha256:
                return xet_hash
    return None


def download(folder: Path, xet_hash: str, size: int) -> bytes:
    """Reads a file from a storage in a folder, as a client would."""
    import hf_xet

    found = connection(folder)
    options = {"endpoint": found["casUrl"], "token": found["accessToken"], "token_expiry_unix_secs": found["exp"]}
    with tempfile.TemporaryDirectory() as destination:
        path = Path(destination, "file")
        with hf_xet.XetSession().new_file_download_group(**options) as group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(path))
        return path.read_bytes()


def _files_in(shard: bytes) -> Iterator[tuple[str, str]]:
    """Yields the Xet hash and the SHA-256 of each file in a shard."""
    place = _RECORD
    while (file_hash := shard[place : place + _HASH]) != _BOOKEND:
        flags, entries = (int.from_bytes(shard[place + start : place + start + 4], "little") for start in (32, 36))
        place += _RECORD * (1 + entries * (2 if flags & _WITH_VERIFICATION else 1))
        if flags & _WITH_METADATA:
            yield _hex(file_hash), _hex(shard[place : place + _HASH])
            place += _RECORD


def _hex(number: bytes) -> str:
    """The usual form of a hash, which is stored as four little-endian numbers of 64 bits."""
    return b"".join(number[start : start + 8][::-1] for start in range(0, _HASH, 8)).hex()
