"""Files that ship with the package: model presets, recipes, launch files and the template of model cards."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

# Folder of the package `modeling_sparse_moe_vlm`.
PACKAGE = Path(str(files(__package__.partition(".")[0])))
# File name suffix by folder of `configuration`.
SUFFIXES = {"models": ".json", "training": ".yaml", "lora": ".yaml"}


def shipped_root() -> Path:
    """Returns the folder with `configuration` and `model_card.md`: the package in a wheel, or the root of a clone."""
    return PACKAGE if _is_wheel() else PACKAGE.parent


def working_root() -> Path:
    """Returns the folder that outputs are relative to: the root of a clone; otherwise, the current directory."""
    return Path.cwd() if _is_wheel() else PACKAGE.parent


def shipped_presets(folder: str) -> dict[str, Path]:
    """
    Lists the files in a folder of `configuration`.

    Args:
        folder (`str`):
            `"models"`, `"training"` or `"lora"`.

    Returns:
        `dict[str, Path]`: Paths by short name, such as `"demo"` for `configuration/training/demo.yaml`.
    """
    paths = (shipped_root() / "configuration" / folder).glob(f"*{SUFFIXES[folder]}")
    return {path.stem: path for path in sorted(paths)}


def find_preset(name: str, folder: str) -> Path:
    """
    Finds a file by its path or, if it ships with the package, by its short name.

    Args:
        name (`str`):
            Path, relative to the current directory or to the folder that contains `configuration`, or a short name.
        folder (`str`):
            Folder of `configuration` to look up short names in: `"models"`, `"training"` or `"lora"`.

    Returns:
        `Path`: Path to the file.

    Raises:
        FileNotFoundError: If there is no such file. The message lists the short names.
    """
    for place in (Path(name), shipped_root() / name):
        if place.is_file():
            return place
    presets = shipped_presets(folder)
    if name not in presets:
        raise FileNotFoundError(f"there is no file {name!r}: pass a path, or one of the names {', '.join(presets)}.")
    return presets[name]


def _is_wheel() -> bool:
    return (PACKAGE / "configuration").is_dir()
