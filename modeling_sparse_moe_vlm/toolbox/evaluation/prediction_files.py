"""Files with the predictions of a model. An interrupted evaluation resumes from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .scores import references_of, text_of

PREDICTIONS = "predictions.jsonl"
OWNER = "run.json"
REMEDY = "Evaluate without `--resume`, or use another output folder."
_ANSWERS = "answers"
_WEIGHTS = ("*.safetensors", "*.bin", "*.json")


class AnswerFiles:
    """
    The answers of a model in a folder: `run.json` says which model, data and options they belong to, and during the
    evaluation each process appends its answers to a file of its own. [`write_predictions`] replaces these files.

    Args:
        folder (`Path`):
            The folder.
        owner (`Mapping`):
            Model, data and options, as values of JSON.
        process (`int`, *optional*, defaults to 0):
            Number of this process.
    """

    def __init__(self, folder: Path, owner: Mapping[str, Any], process: int = 0) -> None:
        self.folder, self.owner, self.process = folder, json.loads(json.dumps(owner)), process

    def start(self) -> None:
        """Removes earlier answers. The first of several processes calls it before the others write."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in [*self._files(), self.folder / PREDICTIONS]:
            file.unlink(missing_ok=True)
        _write(self.folder / OWNER, json.dumps(self.owner, indent=2) + "\n")

    def check_owner(self) -> bool:
        """
        Returns whether the folder has answers that can be resumed.

        Raises:
            ValueError: If they belong to another model, other data or other options, or if a file cannot be read. The
                message names the difference.
        """
        path = self.folder / OWNER
        if not path.exists():
            return False
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read ({error}). {REMEDY}") from None
        for key, value in self.owner.items():
            if earlier.get(key) != value:
                raise ValueError(
                    f"the predictions in {self.folder} cannot be resumed: `{key}` was {earlier.get(key)!r} and is now "
                    f"{value!r}. {REMEDY}"
                )
        path = self.folder / PREDICTIONS
        if path.exists() and (number := len(_read_lines(path))) != self.owner["rows"]:
            raise ValueError(
                f"{path} has {number} readable lines for {self.owner['rows']} rows: the file was changed. {REMEDY}"
            )
        return True

    def read(self, name: str) -> dict[int, str]:
        """
        Returns the answers of all processes.

        Args:
            name (`str`):
                `"prediction"`, or `"prediction_without_images"` for those of the blind baseline.

        Returns:
            `dict[int, str]`: The answers, by the number of the row.
        """
        answers = {
            number: line[name]
            for number, line in enumerate(_read_lines(self.folder / PREDICTIONS))
            if line.get(name) is not None
        }
        for file in self._files():
            answers |= {line["number"]: line[name] for line in _read_lines(file) if name in line}
        return answers

    def add(self, name: str, answers: Mapping[int, str]) -> None:
        """Appends the answers of a batch, so that an interruption does not lose them."""
        with (self.folder / f"{_ANSWERS}.{self.process}.jsonl").open("ab") as file:
            # The first newline ends a line that was only partly written.
            lines = [json.dumps({"number": number, name: text}, ensure_ascii=False) for number, text in answers.items()]
            file.write(("\n" + "\n".join(lines) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def write_predictions(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes all rows with their predictions and scores to `predictions.jsonl`, and removes the other answers."""
        _write(self.folder / PREDICTIONS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for file in self._files():
            file.unlink()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_ANSWERS}.*.jsonl"))


def fingerprint_of_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a hash of the texts, right answers and origins of rows. The contents of images are not part of it."""
    digest = hashlib.sha256()
    for row in rows:
        texts = [[message["role"], text_of(message)] for message in row["messages"]]
        digest.update(json.dumps([row.get("source"), row.get("row"), texts, references_of(row)]).encode())
    return digest.hexdigest()[:16]


def fingerprint_of_model(path: str, revision: str | None = None) -> str:
    """Returns a hash of the names, sizes and times of the files of a local model, or the revision of the Hub."""
    if not Path(path).is_dir():
        return str(revision)
    files = sorted(file for pattern in _WEIGHTS for file in Path(path).glob(pattern))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a JSONL file without those that were only partly written."""
    lines = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


def _write(path: Path, text: str) -> None:
    """Writes a file in one step."""
    stage = path.with_name(f".{path.name}.saving")
    stage.write_text(text, encoding="utf-8")
    stage.replace(path)
