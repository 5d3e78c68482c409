"""Bad rows of data: the error that names file, row and reason, and the list of rows that were skipped."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers.utils import logging

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

# Kinds of faults, as they are counted in reports.
BROKEN_IMAGE = "broken image"
BROKEN_VIDEO = "broken video"
EMPTY_ANSWER = "empty answer"
LARGE_IMAGE = "absurdly large image"
MISSING_FIELD = "missing field"
MISSING_FILE = "missing file"
NOT_JSON = "not JSON"
NOT_PROCESSED = "cannot be processed"
NOT_UTF8 = "not UTF-8"
NO_ASSISTANT_TURN = "no assistant turn"
TOO_LONG = "too long"
TOO_MANY_IMAGE_TOKENS = "too many image tokens"
TYPED_IMAGE_TOKEN = "typed image token"
TYPED_VIDEO_TOKEN = "typed video token"
UNKNOWN_ROLE = "unknown role"
WRONG_NUMBER_OF_IMAGES = "wrong number of images"
WRONG_NUMBER_OF_VIDEOS = "wrong number of videos"
WRONG_TYPE = "wrong type"

ON_BAD_ROW = ("error", "skip")


class RowFault(ValueError):
    """
    What is wrong with a row. Its file and number are added where they are known.

    Args:
        kind (`str`):
            Kind of the fault, such as `"missing file"`.
        reason (`str`):
            What is wrong and what to do.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason


class BadRowError(ValueError):
    """
    Error for a row that cannot be used.

    `DataLoader` raises the errors of its workers again, with the traceback of the worker as the only argument. This
    class then reads its attributes from the traceback, so the error is the same with and without workers.

    Args:
        source (`str`):
            File or dataset of the row. If it is the only argument, the traceback of a `BadRowError`.
        row (`int`, *optional*):
            Number of the row in its source, counted from 0.
        kind (`str`, *optional*):
            Kind of the fault, such as `"missing file"`.
        reason (`str`, *optional*):
            What is wrong and what to do.
    """

    # `None` for a traceback that has another form.
    row: Any
    kind: Any
    reason: Any

    def __init__(self, source: str, row: int | None = None, kind: str | None = None, reason: str | None = None) -> None:
        if row is None and (match := _IN_TRACEBACK.search(source)):
            source, row, reason, kind = match["source"], int(match["row"]), match["reason"], match["kind"]
        super().__init__(source, row, kind, reason)
        self.source, self.row, self.kind, self.reason = source, row, kind, reason
        if kind is not None:
            self.add_note(f"{_KIND}{kind}")  # a traceback shows it after the message

    def __str__(self) -> str:
        return self.source if self.row is None else f"{self.source}, row {self.row}: {self.reason}"


_KIND = "Kind of fault: "
_IN_TRACEBACK = re.compile(
    rf"BadRowError: (?P<source>[^\n]*), row (?P<row>\d+): (?P<reason>.*)\n{_KIND}(?P<kind>[^\n]*)\s*\Z", re.DOTALL
)


class SkippedRows:
    """
    The rows that were skipped: listed in a JSONL file, if there is one, and counted by kind of fault.

    The workers of a `DataLoader` and several processes can list rows in the same file. A row is listed and counted
    once, even if several of them read it or if it is read again in a later epoch.

    Args:
        path (`str` or `Path`, *optional*):
            The file. Its rows have the keys `source`, `row`, `kind` and `reason`. Without it, only the rows that this
            object was given are counted.
        is_temporary (`bool`, *optional*, defaults to `False`):
            Whether the summary does not name the file.
    """

    def __init__(self, path: str | Path | None = None, is_temporary: bool = False) -> None:
        self.path = None if path is None else Path(path)
        self.is_temporary = is_temporary
        self._entries: dict[tuple[str, int], dict[str, Any]] = {}
        self._size = 0  # number of bytes of the file that were read
        self._last = b""  # the last line that was read
        self._warned = 0  # number of rows in the last warning

    def add(self, error: BadRowError) -> None:
        """Counts a row and appends it to the file, unless it is already listed."""
        self.add_entry({"source": error.source, "row": error.row, "kind": error.kind, "reason": error.reason})

    def add_entry(self, entry: dict[str, Any]) -> None:
        """Adds a row as [`entries`] returns it."""
        key = (entry["source"], entry["row"])
        if key in self._entries:
            return
        if self.path is None:
            self._entries[key] = entry
            return
        # A name that is not Unicode contains surrogates, which "backslashreplace" writes as JSON does.
        line = f"{json.dumps(entry, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        with os.fdopen(descriptor, "r+b") as file:
            _lock(file)  # closing the file releases it
            self._read(file)
            if key not in self._entries:
                if file.tell() > self._size:  # the last line was only partly written
                    line = b"\n" + line
                file.write(line)  # one write in append mode, so that lines do not mix even without a lock
                file.flush()
                self._read(file)

    def entries(self) -> list[dict[str, Any]]:
        """Returns the rows as dicts with `source`, `row`, `kind` and `reason`, including those of other processes."""
        if self.path is not None and self.path.exists():
            self._forget()  # a file that replaced the one that was read can begin with the same bytes
            with self.path.open("rb") as file:
                self._read(file)
        return list(self._entries.values())

    @property
    def counts(self) -> Counter[str]:
        """The number of skipped rows by kind of fault."""
        return Counter(entry["kind"] for entry in self.entries())

    def summary(self) -> str | None:
        """Returns a sentence with the number of skipped rows by kind, or `None` if no row was skipped."""
        counts = self.counts
        if not counts:
            return None
        kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(counts.items()))
        where = "" if self.path is None or self.is_temporary else f" They are listed in {self.path}."
        return f"Skipped bad rows: {counts.total()} ({kinds}).{where}"

    def warn(self) -> None:
        """Logs the summary as a warning, in the first of several processes."""
        if process_number() == 0 and (summary := self.summary()):
            self._warned = len(self._entries)
            logger.warning(summary)

    def warn_of_new(self) -> None:
        """Logs the summary as a warning if rows were skipped since the last warning."""
        if len(self.entries()) > self._warned:
            self.warn()

    def _read(self, file: BinaryIO) -> None:
        """Reads the complete lines that were added to the file since the last time, and goes to the end of the file."""
        file.seek(max(self._size - len(self._last), 0))
        if file.read(len(self._last)) != self._last:  # the file was replaced
            self._forget()
            file.seek(0)
        for line in file:
            if line.endswith(b"\n"):
                self._size += len(line)
                self._last = line
                try:
                    entry = json.loads(line)
                except ValueError:  # a line that was only partly written
                    continue
                self._entries[entry["source"], entry["row"]] = entry
        file.seek(0, os.SEEK_END)

    def _forget(self) -> None:
        self._entries, self._size, self._last = {}, 0, b""


def process_number() -> int:
    """Returns the number of this process of a training program, also before the group of processes is initialised."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", 0))


def _lock(file: BinaryIO) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)
