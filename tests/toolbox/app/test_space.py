"""The folder of a Space."""

import ast
import sys
from importlib import metadata

import pytest
import yaml

from modeling_sparse_moe_vlm import __version__
from modeling_sparse_moe_vlm.toolbox.app import space
from modeling_sparse_moe_vlm.toolbox.app.space import page_name, write_space


@pytest.fixture(autouse=True)
def _gradio(monkeypatch):
    """Tests that write a folder do not need an installed gradio."""
    monkeypatch.setattr(space, "version", lambda name: {"gradio": "6.1.2"}[name])


def front_matter(folder) -> dict:
    _, block, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(block)


def test_a_model_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_space("new/space", "me/my-model", {"es": "me/es"})
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "app.py", "requirements.txt"]
    assert front_matter(folder) == {
        "title": "my-model",
        "emoji": "🔎",
        "colorFrom": "yellow",
        "colorTo": "red",
        "sdk": "gradio",
        "sdk_version": "6.1.2",
        "python_version": "3.11",
        "app_file": "app.py",
        "models": ["me/my-model", "me/es"],
    }
    assert (folder / "requirements.txt").read_text() == f"sparse-moe-vlm[app]=={__version__}\n"
    app = (folder / "app.py").read_text()
    assert "ChatModel.load('me/my-model', {'es': 'me/es'}, trust_remote_code=False)" in app
    assert "serve(chat, 'me/my-model')" in app
    ast.parse(app)
    assert "[me/my-model](https://huggingface.co/me/my-model)" in (folder / "README.md").read_text()


def test_models_in_folders_are_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("here/mine", "here/mine/checkpoint-5", "here/mine/.cache", "here/es"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(name)
    folder = write_space(tmp_path / "space", str(tmp_path / "here/mine"), {"es": "here/es"}, trust_remote_code=True)
    copied = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert copied == {"README.md", "app.py", "requirements.txt", "model/config.json", "adapters/es/config.json"}
    app = (folder / "app.py").read_text()
    assert """load(str(HERE / "model"), {'es': str(HERE / "adapters/es")}, trust_remote_code=True)""" in app
    assert front_matter(folder)["models"] == []
    assert front_matter(folder)["title"] == "mine"
    for name in ("README.md", "app.py", "requirements.txt"):
        text = (folder / name).read_text()
        assert str(tmp_path) not in text, "no path of this machine"
        assert sys.prefix not in text


def test_a_folder_that_is_not_empty(tmp_path):
    (tmp_path / "file").write_text("text")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="must be an empty or a new folder"):
            write_space(folder, "me/my-model", {})
    assert (tmp_path / "file").read_text() == "text"


def test_page_name(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert page_name(".") == "mine"
    assert page_name("me/mine") == "me/mine"


def test_the_version_of_gradio_is_the_installed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "version", metadata.version)
    try:
        installed = metadata.version("gradio")
    except metadata.PackageNotFoundError:
        pytest.skip("gradio is not installed")
    assert front_matter(write_space(tmp_path / "space", "me/my-model", {}))["sdk_version"] == installed
