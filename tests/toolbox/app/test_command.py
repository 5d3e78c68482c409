"""The verb `app` of the command."""

import sys
from types import ModuleType

import pytest

from modeling_sparse_moe_vlm.toolbox import extras
from modeling_sparse_moe_vlm.toolbox.app import ChatModel, space
from modeling_sparse_moe_vlm.toolbox.commands.main import main


@pytest.fixture
def with_gradio(monkeypatch):
    """Simulates an installed gradio."""
    monkeypatch.setattr(extras, "find_spec", lambda package: package == "gradio")
    monkeypatch.setattr(space, "version", lambda name: "6.0.0")


@pytest.fixture
def served(with_gradio, monkeypatch) -> list:
    """Records what the command loads and serves."""
    calls: list = []
    monkeypatch.setattr(ChatModel, "load", classmethod(lambda cls, *arguments: calls.append(arguments) or "chat"))
    page = ModuleType("page")
    page.serve = lambda *arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "modeling_sparse_moe_vlm.toolbox.app.page", page)
    return calls


def test_serves_a_model_on_the_hub(served):
    main(["app", "me/my-model"])
    assert served == [("me/my-model", {}, False), ("chat", "me/my-model", "127.0.0.1", 0, False)]


def test_options(served, tmp_path):
    (tmp_path / "mine").mkdir()
    options = ["--adapter", "a=x", "--adapter", "b=y/z", "--host", "0.0.0.0", "--port", "80", "--share"]
    main(["app", str(tmp_path / "mine"), *options, "--trust-remote-code"])
    assert served == [
        (str(tmp_path / "mine"), {"a": "x", "b": "y/z"}, True),
        ("chat", "mine", "0.0.0.0", 80, True),
    ]


def test_writes_a_space_and_serves_nothing(served, tmp_path, capsys):
    main(["app", "me/my-model", "--adapter", "a=me/a", "--space", str(tmp_path / "space"), "--trust-remote-code"])
    assert served == []
    assert capsys.readouterr().out == f"{tmp_path / 'space'}\n"
    app = (tmp_path / "space/app.py").read_text()
    assert "ChatModel.load('me/my-model', {'a': 'me/a'}, trust_remote_code=True)" in app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["me/my-model", "--adapter", "x"], "--adapter: 'x' must be NAME=PATH"),
        (["outputs/none/model"], "outputs/none/model"),
        (["me/my-model", "--space", "file"], "--space: file must be an empty or a new folder."),
    ],
)
def test_mistakes(arguments, message, served, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    with pytest.raises(SystemExit) as stopped:
        main(["app", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert served == []


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    with pytest.raises(SystemExit) as stopped:
        main(["app", "me/my-model"])
    assert stopped.value.code == 2
    assert "the web page needs gradio: pip install 'sparse-moe-vlm[app]'." in capsys.readouterr().err
