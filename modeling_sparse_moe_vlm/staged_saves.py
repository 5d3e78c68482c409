"""Saves that a folder gets as a whole: whenever the process ends, the folder has the old files or the new ones."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' renameat2
_RENAME_SWAP = 2  # of macOS' renamex_np
_WEIGHTS = re.compile(r"(?P<stem>.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index(?P<variant>\..+)?\.json)?")


@contextmanager
def staged_folder(folder: str | os.PathLike, exchange: bool = True) -> Iterator[Path]:
    """
    A new folder to write into, whose files [`put_in_place`] then puts into `folder`. If writing fails, or the process
    ends meanwhile, `folder` is as it was.

    Args:
        folder (`str` or `os.PathLike`):
            Where the files are to be in the end. Made if it is not there.
        exchange (`bool`, defaults to `True`):
            See [`put_in_place`].

    Yields:
        `Path`: the folder to write into.
    """
    target = Path(os.path.realpath(folder))
    target.mkdir(parents=True, exist_ok=True)
    parent = target.parent if os.access(target.parent, os.W_OK) else target
    prefix = f".{target.name}.saving-"
    _remove_leftovers(parent, prefix)
    stage = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent))
    try:
        yield stage
        put_in_place(stage, target, exchange=exchange)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def put_in_place(stage: Path, folder: str | os.PathLike, outdated: Collection[str] = (), exchange: bool = True) -> None:
    """
    Puts the files of a folder into another one, in one step where the system can do that: the two folders are
    exchanged, with hard links for the other files that are to stay. Otherwise the files are moved: the old weights go
    first, and the new ones come last, so that no mixture of both can be loaded if the process ends in between.

    Args:
        stage (`Path`):
            A folder with a saved model or adapter, on the same file system. It is gone afterwards.
        folder (`str` or `os.PathLike`):
            Where the files go. What is there stays, except for files of the same names, and older weights.
        outdated (`Collection[str]`, *optional*):
            Names of other files in `folder` that go.
        exchange (`bool`, defaults to `True`):
            Whether `folder` may be exchanged: not where other processes write into it at the same time.
    """
    target = Path(os.path.realpath(folder))
    target.mkdir(parents=True, exist_ok=True)
    new = {path.name for path in stage.iterdir()}
    kinds = {_kind_of_weights(name) for name in new} - {None}
    old = {path.name for path in target.iterdir()}
    replaced = {name for name in old if name in new or name in outdated or _kind_of_weights(name) in kinds}
    if not (replaced and exchange and _exchange(stage, target, old - replaced)):
        _move(stage, target, replaced)
    shutil.rmtree(stage, ignore_errors=True)


def _kind_of_weights(name: str) -> str | None:
    """Of a file of weights or their index, the name of the single file that could hold them all."""
    match = _WEIGHTS.fullmatch(name)
    return None if match is None else match["stem"] + (match["variant"] or "")


def _exchange(stage: Path, target: Path, kept: Collection[str]) -> bool:
    """Links what stays into a staged folder, and exchanges it with the target; returns whether it could."""
    here = Path.cwd()
    if stage.parent == target or target == here or target in here.parents:
        return False  # the process would be left in a folder that is gone
    linked = []
    try:
        for path in (target / name for name in kept if target / name != stage):
            linked.append(stage / path.name)
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, linked[-1], symlinks=True, copy_function=os.link)
            else:
                os.link(path, linked[-1], follow_symlinks=False)
        shutil.copystat(target, stage)
        _swap(os.fsencode(stage), os.fsencode(target))
    except (OSError, AttributeError):  # no hard links, or no such call: of this system, or for this folder
        for path in linked:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return False
    return True


def _swap(one: bytes, other: bytes) -> None:
    """Exchanges two folders in one step. Raises `OSError` or `AttributeError` where that is not possible."""
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        failed = library.renamex_np(one, other, _RENAME_SWAP)
    else:
        failed = library.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE)
    if failed:
        raise OSError(ctypes.get_errno(), "the folders cannot be exchanged", os.fsdecode(other))


def _move(stage: Path, target: Path, replaced: Collection[str]) -> None:
    """Moves what is in a staged folder into the target: weights after all else, and their index last."""
    for name in sorted(replaced, key=_order, reverse=True):
        if _order(name) or not (stage / name).exists():
            (target / name).unlink()
    for path in sorted(stage.iterdir(), key=lambda path: _order(path.name)):
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            os.replace(path, target / path.name)


def _order(name: str) -> int:
    if _kind_of_weights(name) is None:
        return 0
    return 1 if name.endswith(".safetensors") else 2


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Removes what processes that were killed have staged, also in a stage of a stage."""
    for path in parent.iterdir():
        for start in (prefix, f".{prefix}"):
            process = path.name.removeprefix(start).partition("-")[0]
            if path.name.startswith(start) and process.isdigit() and not _is_running(int(process)):
                shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    if os.name == "nt":  # where the call below would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
