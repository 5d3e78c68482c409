"""Files that ship with the package: model presets, recipes, launch files and the template of model cards."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

# `modeling_sparse_moe_vlm`, wherever it is.
PACKAGE = Path(str(files(__package__.partition(".")[0])))
# By folder of `configuration`, how the names of its files end.
SUFFIXES = {"models": ".json", "training": ".yaml", "lora": ".yaml"}


def shipped_root() -> Path:
    """The folder that holds `configuration` and `model_card.md`: the package in a wheel, the root of a clone."""
    return PACKAGE if _is_wheel() else PACKAGE.parent


def working_root() -> Path:
    """The folder that outputs are relative to: the root of a clone, or else the current directory."""
    return Path.cwd() if _is_wheel() else PACKAGE.parent


def shipped_presets(folder: str) -> dict[str, Path]:
    """
    The files in a folder of `configuration`.

    Args:
        folder (`str`):
            `"models"`, `"training"` or `"lora"`.

    Returns:
        `dict[str, Path]`: by short name, such as `"demo"` for `configuration/training/demo.yaml`.
    """
    paths = (shipped_root() / "configuration" / folder).glob(f"*{SUFFIXES[folder]}")
    return {path.stem: path for path in sorted(paths)}


def find_preset(name: str, folder: str) -> Path:
    """
    Finds a file by its path or, if it ships with the package, by its short name.

    Args:
        name (`str`):
            A path, relative to the current directory or to the folder that holds `configuration`; or a short name.
        folder (`str`):
            The folder of `configuration` that short names stand for: `"models"`, `"training"` or `"lora"`.

    Returns:
        `Path`

    Raises:
        FileNotFoundError: If there is no such file; the message lists the short names.
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
