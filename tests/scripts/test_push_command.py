"""`sparse-moe-vlm push`: its listing, its JSON, and its errors in one line."""

import json
import re

import pytest

from modeling_sparse_moe_vlm.toolbox.commands.main import main
from tests.integration.test_push import COMMIT, checkpoint, stored  # noqa: F401
from tests.support.hub_client import hub, lfs  # noqa: F401
from tests.support.hub_server import EXPIRED_TOKEN, Fault
from tests.support.hub_store import Repository

NAMES = [
    "README.md",
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def sizes_of(folder):
    return {name: (folder / name).stat().st_size for name in NAMES}


def error_of(capsys, code, *arguments):
    """Runs the command, which must fail with this exit code, and returns its error."""
    with pytest.raises(SystemExit) as stopped:
        main(["push", *map(str, arguments)])
    assert stopped.value.code == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    return line


def test_a_dry_run_lists_the_files_without_a_network(checkpoint, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("it used the network"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    before = sorted(checkpoint.rglob("*"))
    main(["push", str(checkpoint), "user/model", "--dry-run"])
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    sizes = sizes_of(checkpoint)
    total = f"{sum(sizes.values()):,}"
    assert lines[0] == "model for user/model, sizes in bytes:"
    assert lines[1:8] == [f"{size:>{len(total)},}  {name}" for name, size in sizes.items()]
    assert lines[8] == f"{total}  in 7 files"
    assert lines[9:] == [
        "",
        "not uploaded: optimizer.pt",
        "",
        "no chat template: the model cannot be used for chat",
    ]
    assert printed.err == "dry run: nothing was uploaded\n"
    assert sorted(checkpoint.rglob("*")) == before


def test_an_upload(hub, lfs, checkpoint, capsys):  # noqa: F811
    main(["push", str(checkpoint), "user/model", "--private", "--message", "First", "--json"])
    repository = hub.repository("user/model")
    commit = repository.refs["main"]
    sizes = sizes_of(checkpoint)
    assert json.loads(capsys.readouterr().out) == {
        "repository": "user/model",
        "kind": "model",
        "size": sum(sizes.values()),
        "files": sizes,
        "left_out": ["optimizer.pt"],
        "notes": ["no chat template: the model cannot be used for chat"],
        "url": f"{hub.endpoint}/user/model/commit/{commit}",
        "commit": commit,
        "deleted": [],
    }
    assert repository.is_private
    assert repository.history()[0].title == "First (sparse-moe-vlm)"
    main(["push", str(checkpoint), "user/model", "--create-pr"])
    same = f"nothing was uploaded: {hub.endpoint}/user/model/commit/{commit} has the same files"
    assert capsys.readouterr().out.splitlines()[-1] == same
    (checkpoint / "tokenizer_config.json").unlink()
    main(["push", str(checkpoint), "user/model"])
    lines = capsys.readouterr().out.splitlines()
    newest = repository.refs["main"]
    assert newest != commit
    url = f"{hub.endpoint}/user/model/commit/{newest}"
    assert lines[-1] == f"{url} (commit {newest}, deleted tokenizer_config.json)"


def test_branches_and_pull_requests(hub, lfs, checkpoint, capsys):  # noqa: F811
    main(["push", str(checkpoint), "user/model", "--revision", "v2"])
    assert hub.repository("user/model").files("v2").keys() == set(NAMES)
    assert stored(hub) == {}
    main(["push", str(checkpoint), "user/model", "--create-pr"])
    assert f"{hub.endpoint}/user/model/discussions/1 (commit " in capsys.readouterr().out
    assert hub.repository("user/model").files("refs/pr/1").keys() == set(NAMES)
    assert stored(hub) == {}
    assert "cannot be combined" in error_of(capsys, 2, checkpoint, "user/model", "--create-pr", "--revision", "v2")


def test_force(hub, lfs, checkpoint, capsys):  # noqa: F811
    repository = hub.store.repositories["user/model"] = Repository.new("user/model", False)
    repository.write({"config.json": b"{}"})
    assert "did not write: config.json." in error_of(capsys, 2, checkpoint, "user/model")
    main(["push", str(checkpoint), "user/model", "--force"])
    assert stored(hub).keys() == set(NAMES)


def test_what_must_be_changed_has_exit_code_2(hub, lfs, checkpoint, capsys, monkeypatch, tmp_path):  # noqa: F811
    assert "There is no folder" in error_of(capsys, 2, tmp_path / "absent", "user/model")
    assert "named as in `user/name`, but got 'model'" in error_of(capsys, 2, checkpoint, "model")
    assert "no write access to someone" in error_of(capsys, 2, checkpoint, "someone/model")
    main(["push", str(checkpoint), "user/model"])
    capsys.readouterr()
    assert "exists and is public" in error_of(capsys, 2, checkpoint, "user/model", "--private")
    monkeypatch.setenv("HF_TOKEN", EXPIRED_TOKEN)
    assert "does not accept your token" in error_of(capsys, 2, checkpoint, "user/other")
    (checkpoint / "model-00002-of-00002.safetensors").write_bytes(b"cut")
    assert "is incomplete" in error_of(capsys, 2, checkpoint, "user/model", "--dry-run")
    both = ("--create-pr", "--revision", "v2")
    assert "cannot be combined" in error_of(capsys, 2, checkpoint, "user/model", "--dry-run", *both)


def test_what_can_be_repeated_has_exit_code_1(hub, lfs, checkpoint, capsys):  # noqa: F811
    for effect, message in ((429, "rate of requests"), (503, "status 503"), ("cut", "connection to .* failed")):
        hub.faults = [Fault(COMMIT, effect)]
        assert re.search(message, error_of(capsys, 1, checkpoint, "user/model"))
        assert stored(hub) == {}
    main(["push", str(checkpoint), "user/model"])
    assert stored(hub).keys() == set(NAMES)
    assert hub.count("PUT /lfs/") == 2
