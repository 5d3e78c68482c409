"""Writes a folder that runs as a Space of the Hugging Face Hub."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import yaml

from ... import __version__
from ...checks import check

APP = '''"""The web page of this Space: a chat with a model, and how its answers were made."""

from pathlib import Path

from modeling_sparse_moe_vlm.toolbox.app import ChatModel
from modeling_sparse_moe_vlm.toolbox.app.page import serve

HERE = Path(__file__).parent
chat = ChatModel.load({model}, {{{adapters}}}, trust_remote_code={trust_remote_code})
serve(chat, {name!r})
'''
README = """---
{front_matter}---

# {name}

A web page to try {link}. Beside each answer it shows the share of attention that went to the images, word by word,
where on the images the attention fell, and the experts of each image token.

Made with `sparse-moe-vlm app --space`.
"""


def write_space(folder: str | Path, model: str, adapters: Mapping[str, str], trust_remote_code: bool = False) -> Path:
    """
    Writes a folder that runs as a Space: `app.py`, `requirements.txt` and `README.md`. Models and adapters on the
    Hub are loaded by name. Those in local folders are copied.

    Args:
        folder (`str` or `Path`):
            Folder to write; it must be empty or missing.
        model (`str`):
            Folder of the model, or its name on the Hub.
        adapters (`Mapping[str, str]`):
            Folders of adapters, or their names on the Hub, by name.
        trust_remote_code (`bool`, defaults to `False`):
            Whether the Space runs code that comes with the checkpoint.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: If the folder is not empty.
    """
    folder = Path(folder)
    check(
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        f"--space: {folder} must be an empty or a new folder.",
    )
    folder.mkdir(parents=True, exist_ok=True)
    name = page_name(model)
    of_adapters = [
        f"{adapter!r}: {_reference(folder, path, f'adapters/{adapter}')}" for adapter, path in adapters.items()
    ]
    app = APP.format(
        model=_reference(folder, model, "model"),
        adapters=", ".join(of_adapters),
        trust_remote_code=trust_remote_code,
        name=name,
    )
    on_hub = [path for path in (model, *adapters.values()) if not Path(path).is_dir()]
    front_matter = {
        "title": name.rpartition("/")[2],
        "emoji": "🔎",
        "colorFrom": "yellow",
        "colorTo": "red",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "python_version": "3.11",
        "app_file": "app.py",
        "models": on_hub,
    }
    link = f"[{model}](https://huggingface.co/{model})" if model in on_hub else "the model in `model/`"
    text = README.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True), name=name, link=link
    )
    (folder / "app.py").write_text(app, encoding="utf-8")
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "requirements.txt").write_text(f"sparse-moe-vlm[app]=={__version__}\n", encoding="utf-8")
    return folder


def page_name(model: str) -> str:
    """Returns the name of a model for the title: the name of its folder, or its name on the Hub."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _reference(folder: Path, path: str, copy: str) -> str:
    """Returns Python code for the path to a model or adapter. A local folder is copied into the Space."""
    if not Path(path).is_dir():
        return repr(path)
    shutil.copytree(path, folder / copy, ignore=shutil.ignore_patterns(".*", "checkpoint-*"))
    return f'str(HERE / "{copy}")'
