"""Bad rows of data: the error that names file, row and reason, and the list of rows that were skipped."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

# Kinds of faults, as they are counted in reports.
BROKEN_IMAGE = "broken image"
EMPTY_ANSWER = "empty answer"
LARGE_IMAGE = "absurdly large image"
MISSING_FIELD = "missing field"
MISSING_FILE = "missing file"
NOT_JSON = "not JSON"
NO_ASSISTANT_TURN = "no assistant turn"
TYPED_IMAGE_TOKEN = "typed image token"
UNKNOWN_ROLE = "unknown role"
WRONG_NUMBER_OF_IMAGES = "wrong number of images"
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

    Args:
        source (`str`):
            File or dataset of the row.
        row (`int`):
            Number of the row in its source, counted from 0.
        kind (`str`):
            Kind of the fault, such as `"missing file"`.
        reason (`str`):
            What is wrong and what to do.
    """

    def __init__(self, source: str, row: int, kind: str, reason: str) -> None:
        super().__init__(source, row, kind, reason)
        self.source, self.row, self.kind, self.reason = source, row, kind, reason

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}: {self.reason}"


class SkippedRows:
    """
    The rows that were skipped: counted by kind of fault and, if there is a file for it, listed in a JSONL file.

    Several processes can list rows in the same file. A row that is read again in a later epoch
    is not listed again.

    Args:
        path (`str` or `Path`, *optional*):
            The file. Its rows have the keys `source`, `row`, `kind` and `reason`.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.counts: Counter[str] = Counter()
        self._listed: set[tuple[str, int]] = set()
        if self.path is not None and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self._listed.add((entry["source"], entry["row"]))

    def add(self, error: BadRowError) -> None:
        """Counts a row and appends it to the file."""
        self.counts[error.kind] += 1
        if self.path is None or (error.source, error.row) in self._listed:
            return
        self._listed.add((error.source, error.row))
        entry = {"source": error.source, "row": error.row, "kind": error.kind, "reason": error.reason}
        # A name that is not Unicode contains surrogates, which "backslashreplace" writes as JSON does.
        line = f"{json.dumps(entry, ensure_ascii=False)}\n"
        # One write in append mode, so that the lines of several processes do not mix.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, line.encode("utf-8", "backslashreplace"))
        finally:
            os.close(descriptor)

    def summary(self) -> str | None:
        """Returns a sentence with the number of skipped rows by kind, or `None` if no row was skipped."""
        if not self.counts:
            return None
        kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(self.counts.items()))
        where = "" if self.path is None else f" They are listed in {self.path}."
        return f"Skipped bad rows: {self.counts.total()} ({kinds}).{where}"

    def warn(self) -> None:
        """Logs the summary as a warning."""
        if summary := self.summary():
            logger.warning(summary)
