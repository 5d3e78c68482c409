"""Names of models that are wrong: clear errors at once, without asking the Hub again and again."""

import json
import os

import huggingface_hub
import pytest
from huggingface_hub import constants

from modeling_sparse_moe_vlm.toolbox import model_names
from modeling_sparse_moe_vlm.toolbox.app.loading import parse_adapters
from modeling_sparse_moe_vlm.toolbox.commands.main import main
from modeling_sparse_moe_vlm.toolbox.hub import write_model_card
from modeling_sparse_moe_vlm.toolbox.installed_code import use_installed_code
from modeling_sparse_moe_vlm.toolbox.model_names import check_model_name, is_local
from modeling_sparse_moe_vlm.toolbox.training.recipes import find_model
from modeling_sparse_moe_vlm.toolbox.upcycling.checkpoints import plan_checkpoint
from modeling_sparse_moe_vlm.toolbox.upcycling.native_checkpoint import is_upcycled_checkpoint
from modeling_sparse_moe_vlm.toolbox.upcycling.parts_checkpoint import upcycle_parts_checkpoint
from tests.support.hub_server import hub_server

pytestmark = pytest.mark.newest

NOT_A_PATH = ["gpt2", "organisation/name", "organisation/name.v2"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, with folders that are not models. There is no network."""
    monkeypatch.chdir(tmp_path)
    for name in ("outputs", "empty", "run/model", "adapter", "model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "outputs/notes.txt").write_text("text")
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    for name in ("run/model", "model"):
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """The names that the Hub was asked for. It cannot be reached."""
    names: list[str] = []

    def model_info(self, name, timeout):
        names.append(name)
        assert timeout == 10
        raise huggingface_hub.errors.HTTPError("no network")

    monkeypatch.setattr(model_names.HfApi, "model_info", model_info)
    return names


@pytest.mark.parametrize("name", ["./none", "../none", "/none", "~/none", "a/b/c", "none/", "a\\b", ".", "..", ""])
def test_names_that_can_only_be_paths(name, asked):
    assert is_local(name)
    assert asked == []


@pytest.mark.parametrize("name", NOT_A_PATH)
def test_names_that_can_be_on_the_hub(name, asked):
    assert not is_local(name)
    check_model_name(name)
    assert find_model(name) == name
    assert asked == []


def test_missing_folders_in_a_folder_that_exists(asked):
    """`outputs/none` is a path, unless the Hub or its cache has a model of this name."""
    with pytest.raises(
        FileNotFoundError, match=r"^There is no folder outputs/none: pass the folder of a model, or its"
    ):
        check_model_name("outputs/none")
    assert asked == ["outputs/none"]
    assert not is_local("outputs")  # without a slash, it can be a name
    with pytest.raises(FileNotFoundError, match=r"there is no model .*outputs/none or "):
        find_model("outputs/none")


def test_models_of_the_hub_in_a_folder_with_the_name_of_their_owner(asked, monkeypatch, folder):
    cached = folder / "cache/models--outputs--cached"
    (cached / "snapshots/abc").mkdir(parents=True)
    (cached / "snapshots/abc/config.json").write_text("{}")
    for revision in ("main", "v2"):
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / revision).write_text("abc")
    check_model_name("outputs/cached")
    check_model_name("outputs/cached", "v2")
    assert asked == []
    for arguments in ({"revision": "v3"}, {"file": "adapter_config.json"}):
        assert is_local("outputs/cached", **arguments)
    assert asked == ["outputs/cached"] * 2


def test_answers_of_the_hub(folder, monkeypatch):
    with hub_server({"outputs/there": folder / "model"}, {"outputs/busy": (503, "Busy")}) as url:
        monkeypatch.setattr(model_names, "HfApi", lambda: huggingface_hub.HfApi(endpoint=url, token=False))
        assert not is_local("outputs/there")
        assert is_local("outputs/none")
        assert not is_local("outputs/busy"), "the libraries ask again"


def test_folders_without_a_model():
    for name, message in (
        ("empty", "^The folder empty is empty: pass the folder of a model.$"),
        ("outputs/", "^The folder outputs does not contain a model: it has no config.json.$"),
        ("run", "^The folder run does not contain a model: it has no config.json. Did you mean run/model\\?$"),
        ("adapter", "it has no config.json. It contains an adapter: pass its base model.$"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            check_model_name(name)
    with pytest.raises(
        FileNotFoundError, match=r"^The folder model does not contain a PEFT adapter: it has no adapter_c"
    ):
        check_model_name("model", file="adapter_config.json", kind="PEFT adapter")
    check_model_name("model")
    check_model_name("model/")
    check_model_name("model/config.json")
    check_model_name("adapter", file="adapter_config.json")


def test_without_the_hub(asked, monkeypatch, folder):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as caught:
        check_model_name("organisation/name")
    assert str(caught.value) == (
        "There is no folder organisation/name, and the Hub cannot be used because `HF_HUB_OFFLINE` is set: the cache "
        f"({folder / 'cache'}) does not contain config.json of organisation/name. Download the model first, or pass "
        "its folder."
    )
    snapshot = folder / "cache/models--organisation--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    check_model_name("organisation/name")
    with pytest.raises(FileNotFoundError, match=r"does not contain model\.gguf of organisation/name"):
        check_model_name("organisation/name", file="model.gguf")
    assert asked == []


def test_a_tilde_is_the_home_folder(folder, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(folder))
    assert find_model("~/model") == str(folder / "model")
    with pytest.raises(FileNotFoundError, match=f"there is no model {folder}/none: name"):
        find_model("~/none")
    assert parse_adapters(["es=~/adapter"]) == {"es": str(folder / "adapter")}
    (folder / "tiny.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    main(["info", "~/tiny.json", "--json"])
    (size,) = json.loads(capsys.readouterr().out)
    assert size["model"] == str(folder / "tiny.json")
    with pytest.raises(SystemExit):
        main(["upcycle", "~/none", "--output=~/out"])
    assert f"error: There is no folder {folder}/none: " in capsys.readouterr().err


def test_texts_keep_their_tilde(monkeypatch):
    seen = []
    monkeypatch.setattr("modeling_sparse_moe_vlm.toolbox.commands.generate.run", seen.append)
    main(["generate", "--model", "~/m", "--question", "~/q", "--image", "~/i"])
    (arguments,) = seen
    assert (arguments.model, arguments.question) == (os.path.expanduser("~/m"), "~/q")
    assert arguments.image == [os.path.expanduser("~/i")]


@pytest.mark.parametrize(
    "call",
    [
        use_installed_code,
        plan_checkpoint,
        is_upcycled_checkpoint,
        lambda name: plan_checkpoint(name, revision="v2"),
        lambda name: upcycle_parts_checkpoint(name, None, "out"),
        lambda name: upcycle_parts_checkpoint("model", name, "out"),
    ],
)
@pytest.mark.parametrize("name", ["./none", "outputs/none"])
def test_functions_that_load_models(call, name, asked):
    with pytest.raises(FileNotFoundError, match=f"^There is no folder {name}: "):
        call(name)


def test_cards_of_missing_folders():
    with pytest.raises(FileNotFoundError, match=r"^There is no folder none: save the model and its processor there"):
        write_model_card("none")


@pytest.mark.parametrize(
    "arguments",
    [
        ["upcycle", "NAME", "--output", "out"],
        ["upcycle", "NAME", "--native", "--output", "out"],
        ["upcycle", "--text", "NAME", "--output", "out"],
        ["upcycle", "--text", "model", "--vision", "NAME", "--output", "out"],
        ["train", "--model", "NAME", "--data", "rows.jsonl"],
        ["lora", "--model", "NAME", "--data", "rows.jsonl"],
        ["evaluate", "NAME", "rows.jsonl"],
        ["evaluate", "model", "rows.jsonl", "--adapter", "NAME"],
        ["generate", "--model", "NAME", "--question", "Why?"],
        ["explain", "--model", "NAME"],
        ["routing-report", "NAME", "rows.jsonl"],
        ["push", "NAME", "user/name", "--dry-run"],
        ["info", "NAME"],
        ["place", "NAME", "--max-memory", "0=1GB"],
    ],
    ids=" ".join,
)
def test_every_verb(arguments, asked, folder, capsys):
    for name in ("./none", "outputs/none", "empty"):
        with pytest.raises(SystemExit) as stopped:
            main([name if value == "NAME" else value for value in arguments])
        assert stopped.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert name.removeprefix("./") in line
    assert set(asked) <= {"outputs/none"}
    assert not (folder / "out").exists()
