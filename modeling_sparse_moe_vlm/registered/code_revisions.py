"""Detects checkpoints that contain another revision of this code than the one that is running."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)


def warn_of_other_code(model_class: type, checkpoint: str | os.PathLike, revision: str | None = None) -> None:
    """
    Logs a warning if the code in a checkpoint differs from the code that loads it. Once the package is imported, the
    auto classes use it instead of the code in a checkpoint, even with `trust_remote_code=True`.

    Args:
        model_class (`type`):
            The class that loads the checkpoint.
        checkpoint (`str` or `os.PathLike`):
            The folder of the checkpoint, or its name on the Hub. Only cached files of a checkpoint on the Hub are read.
        revision (`str`, *optional*):
            Revision of the checkpoint on the Hub.
    """
    own_entry = Path(str(sys.modules[model_class.__module__].__file__))
    entry = cached_file(
        os.fspath(checkpoint),
        own_entry.name,
        revision=revision,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if entry is None:
        return
    own = own_entry.parent
    others = {Path(path) for path in [entry, *get_relative_import_files(entry)]}
    different = sorted(path.name for path in others if _differ(path, own / path.name))
    if different:
        logger.warning(
            f"The code of {checkpoint} differs from the code in {own} ({', '.join(different)}), and the latter is "
            "used, because the auto classes prefer an imported package to the code in a checkpoint. To use the "
            "checkpoint's own code, load it in a process that does not import the package, or with "
            "`transformers.dynamic_module_utils.get_class_from_dynamic_module("
            f"'{own_entry.stem}.{model_class.__name__}', '{checkpoint}').from_pretrained('{checkpoint}')`."
        )


def _differ(theirs: Path, ours: Path) -> bool:
    return theirs.exists() and (not ours.exists() or theirs.read_bytes() != ours.read_bytes())
