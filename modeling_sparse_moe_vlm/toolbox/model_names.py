"""Checks of the names of models, before the Hub is asked for them."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

TIMEOUT = 10  # seconds for one request
LOCAL_PREFIXES = ("/", "~", "./", "../")


def check_model_name(
    name: str | os.PathLike, revision: str | None = None, file: str = CONFIG_NAME, kind: str = "model"
) -> None:
    """
    Checks that a local model exists if its name can only be a path. The libraries would ask the Hub for it, repeat
    the request for about a minute, and not say which folder is missing.

    Args:
        name (`str` or `os.PathLike`):
            Folder of a model or adapter, or its name on the Hub.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        file (`str`, *optional*, defaults to `"config.json"`):
            File that a folder needs.
        kind (`str`, *optional*, defaults to `"model"`):
            What is loaded, for the messages.

    Raises:
        FileNotFoundError: If there is no such folder and the name is a path, if the folder does not contain the file,
            or if the Hub cannot be used (`HF_HUB_OFFLINE`) and its cache does not contain the model.
    """
    name = os.fspath(name)
    path = Path(name)
    if path.is_dir():
        _check_folder(path, file, kind)
    elif not path.exists():
        if is_local(name, revision, file):
            raise FileNotFoundError(
                f"There is no folder {name}: pass the folder of a {kind}, or its name on the Hub (`user/name`)."
            )
        if constants.is_offline_mode() and not _is_cached(name, revision, file):
            raise FileNotFoundError(
                f"There is no folder {name}, and the Hub cannot be used because `HF_HUB_OFFLINE` is set: the cache "
                f"({constants.HF_HUB_CACHE}) does not contain {file} of {name}. Download the {kind} first, or pass "
                "its folder."
            )


def is_local(name: str, revision: str | None = None, file: str = CONFIG_NAME) -> bool:
    """
    Returns whether a name that does not exist as a path can only be a path. A name such as `outputs/model` is a path
    if the folder `outputs` exists, unless the Hub has a model of this name.

    Args:
        name (`str`):
            Path to a folder, or name on the Hub.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        file (`str`, *optional*, defaults to `"config.json"`):
            File of the model. If it is in the cache of the Hub, the Hub is not asked.

    Returns:
        `bool`: `True` for a path, `False` for a name that can be one on the Hub.
    """
    if name in (".", "..", "") or name.startswith(LOCAL_PREFIXES) or "\\" in name:
        return True
    parent, separator, last = name.partition("/")
    if "/" in last or (separator and not last):
        return True
    return bool(separator) and Path(parent).is_dir() and not _is_on_hub(name, revision, file)


def _is_on_hub(name: str, revision: str | None, file: str) -> bool:
    if _is_cached(name, revision, file):
        return True
    try:
        HfApi().model_info(name, timeout=TIMEOUT)  # a single request, unlike those of `from_pretrained`
    except HfHubHTTPError as error:
        return not isinstance(error, RepositoryNotFoundError)
    except (HTTPError, HFValidationError, OfflineModeIsEnabled):
        return False
    return True


def _is_cached(name: str, revision: str | None, file: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(name, file, revision=revision), str)
    except HFValidationError:
        return False


def _check_folder(folder: Path, file: str, kind: str) -> None:
    if (folder / file).is_file():
        return
    if not any(folder.iterdir()):
        raise FileNotFoundError(f"The folder {folder} is empty: pass the folder of a {kind}.")
    hint = ""
    if (folder / "model" / file).is_file():
        hint = f" Did you mean {folder / 'model'}?"
    elif (folder / ADAPTER_CONFIG_NAME).is_file():
        hint = " It contains an adapter: pass its base model."
    raise FileNotFoundError(f"The folder {folder} does not contain a {kind}: it has no {file}.{hint}")
