"""Atomic saves: even if the process is interrupted, a folder contains either the old files or the new files."""

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

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # constants of renameat2 (Linux)
_RENAME_SWAP = 2  # constant of renamex_np (macOS)
_WEIGHTS = re.compile(r"(?P<stem>.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index(?P<variant>\..+)?\.json)?")


@contextmanager
def staged_folder(folder: str | os.PathLike, exchange: bool = True) -> Iterator[Path]:
    """
    Context manager that provides a temporary folder to write to, and then moves its files to `folder` (see
    [`put_in_place`]). If writing fails or the process is interrupted, `folder` is not changed.

    Args:
        folder (`str` or `os.PathLike`):
            Destination of the files. It is created if it does not exist.
        exchange (`bool`, *optional*, defaults to `True`):
            See [`put_in_place`].

    Yields:
        `Path`: The temporary folder.
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
    Moves the files of a folder to another folder. If the system supports it, this is a single step: the two folders are
    exchanged, with hard links for files that are kept. Otherwise, the files are moved one by one. The old weights are
    removed first and the new weights are added last, so that a mixture of both cannot be loaded if the process is
    interrupted.

    Args:
        stage (`Path`):
            A folder with a saved model or adapter, on the same file system. It is removed afterwards.
        folder (`str` or `os.PathLike`):
            Destination of the files. Existing files are kept, except for files with the same names and old weights.
        outdated (`Collection[str]`, *optional*):
            Names of other files in `folder` to remove.
        exchange (`bool`, *optional*, defaults to `True`):
            Whether the folders can be exchanged. Must be `False` if other processes write to `folder` at the same time.
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
    """
    Returns the name, without extension, of the single file that would contain all weights of a (sharded) file or index,
    or `None` for other files.
    """
    match = _WEIGHTS.fullmatch(name)
    return None if match is None else match["stem"] + (match["variant"] or "")


def _exchange(stage: Path, target: Path, kept: Collection[str]) -> bool:
    """Links the files to keep into the staged folder, and exchanges it with the target. Returns whether it worked."""
    here = Path.cwd()
    if stage.parent == target or target == here or target in here.parents:
        return False  # the working directory of the process would be removed
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
    except (OSError, AttributeError):  # the system or the file system does not support hard links or the exchange
        for path in linked:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return False
    return True


def _swap(one: bytes, other: bytes) -> None:
    """Exchanges two folders in a single step. Raises `OSError` or `AttributeError` if that is not possible."""
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        failed = library.renamex_np(one, other, _RENAME_SWAP)
    else:
        failed = library.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE)
    if failed:
        raise OSError(ctypes.get_errno(), "the folders cannot be exchanged", os.fsdecode(other))


def _move(stage: Path, target: Path, replaced: Collection[str]) -> None:
    """Moves the files of a staged folder to the target: weights after all other files, and their index last."""
    for name in sorted(replaced, key=_order, reverse=True):
        if _order(name) or not (stage / name).exists():
            (target / name).unlink()
    for path in sorted(stage.iterdir(), key=lambda path: _order(path.name)):
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            os.replace(path, target / path.name)


def _order(name: str) -> int:
    """Returns the position of a file in the order of [`_move`]."""
    if _kind_of_weights(name) is None:
        return 0
    return 1 if name.endswith(".safetensors") else 2


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Removes staged folders of processes that were killed, including staged folders in a staged folder."""
    for path in parent.iterdir():
        for start in (prefix, f".{prefix}"):
            process = path.name.removeprefix(start).partition("-")[0]
            if path.name.startswith(start) and process.isdigit() and not _is_running(int(process)):
                shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    if os.name == "nt":  # on Windows, the call below would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
