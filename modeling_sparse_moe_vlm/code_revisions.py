"""Which revision of this code runs: the one that a checkpoint brings, or the installed one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)


def warn_of_other_code(model_class: type, checkpoint: str | os.PathLike, revision: str | None = None) -> None:
    """
    Warns where a checkpoint brings other code than the code that is about to load it. The auto classes prefer the
    installed package to a checkpoint's code once the package is imported, also with `trust_remote_code=True`.

    Args:
        model_class (`type`):
            The class that loads the checkpoint.
        checkpoint (`str` or `os.PathLike`):
            The checkpoint's folder, or its name on the Hub, of which only the files on this machine are read.
        revision (`str`, *optional*):
            Revision on the Hub.
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
            f"The code of {checkpoint} differs from the code in {own} ({', '.join(different)}), and the latter runs, "
            "since it was imported first: the auto classes prefer an imported package to the code that a checkpoint "
            "brings. To run the checkpoint's own code, load it in a process that does not import the package, or with "
            "`transformers.dynamic_module_utils.get_class_from_dynamic_module("
            f"'{own_entry.stem}.{model_class.__name__}', '{checkpoint}').from_pretrained('{checkpoint}')`."
        )


def _differ(theirs: Path, ours: Path) -> bool:
    return theirs.exists() and (not ours.exists() or theirs.read_bytes() != ours.read_bytes())
