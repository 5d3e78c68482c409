"""
Uploads with the unmodified client of the Hub over HTTP, through Xet and through LFS: complete repositories, repeated
and interrupted uploads, and repositories of others.
"""

import copy
import inspect
import json

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from transformers import Trainer
from transformers.dynamic_module_utils import get_relative_imports
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress, PushToHubMixin

from modeling_sparse_moe_vlm.toolbox.hub import PushError, PushInterruptedError, plan_push, push_checkpoint
from tests.support.hub_client import hub, lfs, transfer  # noqa: F401
from tests.support.hub_server import EXPIRED_TOKEN, READ_TOKEN, Fault
from tests.support.hub_store import Repository
from tests.support.processors import make_tokenizer

COMMIT = "POST /api/models/user/model/commit/main"
TITLE = "Upload model with sparse-moe-vlm"
CARD = "---\nlicense: mit\n---\n\n# A model\n"


def write_weights(folder, *sizes):
    """Writes files of weights with random numbers, replacing those of the folder."""
    for old in folder.glob("model*"):
        old.unlink()
    names = ["model.safetensors"] if len(sizes) == 1 else []
    names = names or [f"model-{i:05d}-of-{len(sizes):05d}.safetensors" for i in range(1, len(sizes) + 1)]
    for number, (name, size) in enumerate(zip(names, sizes)):
        save_file({f"w{number}": torch.rand(size)}, folder / name, metadata={"format": "pt"})
    if len(sizes) > 1:
        weight_map = {f"w{number}": name for number, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


@pytest.fixture
def checkpoint(tmp_path):
    """A small language model of Transformers, with files that are not published."""
    folder = tmp_path / "checkpoint"
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "README.md").write_text(CARD)
    write_weights(folder, 20_000, 30_000)
    (folder / "optimizer.pt").write_bytes(b"pickle")
    return folder


def contents(plan):
    return {
        name: file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        for name, file in plan.files.items()
    }


def stored(hub):  # noqa: F811
    return hub.repository("user/model").files()


def test_one_commit_with_all_files(hub, transfer, checkpoint):  # noqa: F811
    pushed = push_checkpoint(checkpoint, "user/model")
    repository = hub.repository("user/model")
    expected = contents(plan_push(checkpoint, "user/model"))
    assert repository.files() == expected
    weights = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert expected.keys() == {"README.md", "config.json", *tokenizer, *weights}
    assert pushed.plan.left_out == ["optimizer.pt"]
    assert [commit.title for commit in repository.history()] == [TITLE, "initial commit"]
    assert pushed.commit == repository.refs["main"]
    assert pushed.url == f"{hub.endpoint}/user/model/commit/{pushed.commit}"
    assert not repository.is_private
    by_xet = {name for name, file in repository.at("main").files.items() if file.xet_hash}
    assert by_xet == ({name for name in weights if "json" not in name} if transfer == "xet" else set())
    assert hub.count("PUT /lfs/") == (0 if transfer == "xet" else 2)


def test_nothing_is_uploaded_twice(hub, lfs, checkpoint):  # noqa: F811
    first = push_checkpoint(checkpoint, "user/model")
    again = push_checkpoint(checkpoint, "user/model")
    assert (again.commit, again.deleted) == (first.commit, [])
    assert (first.is_unchanged, again.is_unchanged) == (False, True)
    assert push_checkpoint(checkpoint, "user/model", create_pr=True).is_unchanged
    assert hub.repository("user/model").refs.keys() == {"main"}
    assert (hub.count(COMMIT), hub.count("PUT /lfs/")) == (1, 2)
    (checkpoint / "README.md").write_text(CARD + "More.\n")
    third = push_checkpoint(checkpoint, "user/model", commit_message="Better card")
    assert third.commit != first.commit
    assert not third.is_unchanged
    assert hub.repository("user/model").history()[0].title == "Better card (sparse-moe-vlm)"
    assert hub.count("PUT /lfs/") == 2
    assert stored(hub)["README.md"] == (CARD + "More.\n").encode()


def test_outdated_files_are_deleted_and_those_of_others_are_kept(hub, transfer, checkpoint):  # noqa: F811
    push_checkpoint(checkpoint, "user/model")
    repository = hub.repository("user/model")
    repository.write({"assets/figure.png": b"figure", "results.csv": b"1"})
    (name,) = write_weights(checkpoint, 500)
    pushed = push_checkpoint(checkpoint, "user/model")
    old = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert pushed.deleted == old
    left = {"README.md", "config.json", "tokenizer.json", "tokenizer_config.json", name}
    assert stored(hub).keys() == {*left, "assets/figure.png", "results.csv"}
    assert stored(hub)[name] == (checkpoint / name).read_bytes()


def test_repositories_of_others_need_force(hub, lfs, checkpoint):  # noqa: F811
    repository = hub.store.repositories["user/model"] = Repository.new("user/model", False)
    repository.write({"config.json": b"{}", "notes.txt": b"mine"}, "Upload model")
    before = repository.files()
    with pytest.raises(PushError, match=r"user/model contains files that .* did not write: config\.json, notes\.txt\."):
        push_checkpoint(checkpoint, "user/model")
    assert repository.files() == before
    assert hub.count("PUT /lfs/") == hub.count("POST /api/models/user/model/commit") == 0
    push_checkpoint(checkpoint, "user/model", force=True)
    assert repository.files() == before | contents(plan_push(checkpoint, "user/model"))


OURS = {"model_type": "sparse_moe_vlm", "auto_map": {"AutoConfig": "code.Config"}, "architectures": ["OurModel"]}


@pytest.fixture
def own_checkpoint(checkpoint):
    """The same with the code of the model in the folder."""
    (checkpoint / "config.json").write_text(json.dumps(OURS))
    (checkpoint / "code.py").write_text("class Config:\n    pass\n")
    return checkpoint


@pytest.mark.parametrize(
    ("title", "is_replaced"),
    [
        ("Upload OurModel", True),
        ("Upload model", True),
        ("Upload config", True),
        ("End of training", True),
        ("Training in progress, step 20", True),
        ("Training in progress, epoch 2, checkpoint", True),
        ("Upload OtherModel", False),
        ("Upload config.json", False),  # on the website
        ("Do not Upload model", False),
        ("Training in progress, step 20, by hand", False),
    ],
)
def test_what_transformers_uploaded_is_replaced(title, is_replaced, hub, lfs, own_checkpoint):  # noqa: F811
    repository = hub.store.repositories["user/model"] = Repository.new("user/model", False)
    there = {"config.json": json.dumps(OURS | {"architectures": ["OurModel", 1]}).encode(), "README.md": b"empty"}
    repository.write(there | {"model.safetensors": b"old"}, title)
    repository.write({"tokenizer.json": b"old"}, "Upload processor")
    repository.write({"notes.txt": b"mine"}, "Create notes.txt")
    if not is_replaced:
        with pytest.raises(PushError, match=r"did not write: README\.md, config\.json, model\.safetensors\."):
            push_checkpoint(own_checkpoint, "user/model")
        return
    assert push_checkpoint(own_checkpoint, "user/model").deleted == ["model.safetensors"]
    assert repository.files() == contents(plan_push(own_checkpoint, "user/model")) | {"notes.txt": b"mine"}
    repository.write({"README.md": b"edited"}, "Update README.md")
    with pytest.raises(PushError, match=r"did not write: README\.md\."):
        push_checkpoint(own_checkpoint, "user/model")


@pytest.mark.parametrize(
    "config",
    [
        OURS | {"model_type": "llama"},
        OURS | {"auto_map": {"AutoConfig": "other.Config"}},
        OURS | {"auto_map": {}},
        {"architectures": ["OurModel"]},
        b"\xff",
        [],
        OURS | {"architectures": 3, "model_type": "llama"},
    ],
)
def test_other_models_that_transformers_uploaded_need_force(config, hub, lfs, own_checkpoint):  # noqa: F811
    repository = hub.store.repositories["user/model"] = Repository.new("user/model", False)
    content = config if isinstance(config, bytes) else json.dumps(config).encode()
    repository.write({"config.json": content}, "Upload model")
    with pytest.raises(PushError, match=r"did not write: config\.json\."):
        push_checkpoint(own_checkpoint, "user/model")


def test_models_without_code_that_transformers_uploaded_need_force(hub, lfs, checkpoint):  # noqa: F811
    repository = hub.store.repositories["user/model"] = Repository.new("user/model", False)
    repository.write({"config.json": (checkpoint / "config.json").read_bytes() + b" "}, "Upload model")
    with pytest.raises(PushError, match=r"did not write: config\.json\."):
        push_checkpoint(checkpoint, "user/model")


def test_changes_by_others_need_force(hub, lfs, checkpoint):  # noqa: F811
    push_checkpoint(checkpoint, "user/model")
    repository = hub.repository("user/model")
    repository.write({"README.md": b"edited on the website"}, "Update README.md")
    with pytest.raises(PushError, match=r"did not write: README\.md\."):
        push_checkpoint(checkpoint, "user/model")
    (checkpoint / "README.md").write_bytes(b"edited on the website")  # the same change here
    assert push_checkpoint(checkpoint, "user/model").commit == repository.refs["main"]
    (checkpoint / "README.md").write_text(CARD)
    push_checkpoint(checkpoint, "user/model", force=True)
    assert stored(hub)["README.md"] == CARD.encode()


def test_outdated_files_of_others_need_force(hub, lfs, checkpoint):  # noqa: F811
    push_checkpoint(checkpoint, "user/model")
    hub.repository("user/model").write({"model.safetensors": b"other weights"})
    with pytest.raises(PushError, match=r"did not write: model\.safetensors\."):
        push_checkpoint(checkpoint, "user/model")
    assert push_checkpoint(checkpoint, "user/model", force=True).deleted == ["model.safetensors"]


def test_branches(hub, transfer, checkpoint):  # noqa: F811
    first = push_checkpoint(checkpoint, "user/model")
    (checkpoint / "README.md").write_text(CARD + "v2\n")
    second = push_checkpoint(checkpoint, "user/model", revision="v2")
    repository = hub.repository("user/model")
    assert (repository.refs["main"], repository.refs["v2"]) == (first.commit, second.commit)
    assert repository.files("main")["README.md"] == CARD.encode()
    assert repository.files("v2")["README.md"] == (CARD + "v2\n").encode()
    assert push_checkpoint(checkpoint, "user/model", revision="v2").commit == second.commit
    repository.write({"README.md": b"edited"}, "Update README.md", ref="v2")
    with pytest.raises(PushError, match=r"did not write: README\.md\."):
        push_checkpoint(checkpoint, "user/model", revision="v2")


def test_pull_requests(hub, transfer, checkpoint):  # noqa: F811
    repository = hub.store.repositories["someone/model"] = Repository.new("someone/model", False)
    repository.write({"config.json": b"{}"}, "Upload model")
    before = repository.files()
    pushed = push_checkpoint(checkpoint, "someone/model", create_pr=True)
    assert pushed.url == f"{hub.endpoint}/someone/model/discussions/1"
    assert repository.files() == before
    assert repository.files("refs/pr/1") == contents(plan_push(checkpoint, "someone/model"))
    own = hub.store.repositories["user/model"] = Repository.new("user/model", False)
    push_checkpoint(checkpoint, "user/model", create_pr=True)
    (checkpoint / "README.md").write_text(CARD + "More.\n")
    push_checkpoint(checkpoint, "user/model", revision="refs/pr/1")  # a further commit of the pull request
    assert own.files("refs/pr/1")["README.md"] == (CARD + "More.\n").encode()
    assert own.refs.keys() == {"main", "refs/pr/1"}
    assert own.files() == {}
    with pytest.raises(PushError, match=r"no write access to someone/model \(.*Forbidden"):
        push_checkpoint(checkpoint, "someone/model", force=True)
    with pytest.raises(PushError, match="cannot be combined"):
        push_checkpoint(checkpoint, "someone/model", create_pr=True, revision="v2")


def test_private_repositories(hub, lfs, checkpoint):  # noqa: F811
    push_checkpoint(checkpoint, "user/secret", private=True)
    assert hub.repository("user/secret").is_private
    push_checkpoint(checkpoint, "user/secret", private=True)
    push_checkpoint(checkpoint, "user/model")
    with pytest.raises(PushError, match="user/model exists and is public"):
        push_checkpoint(checkpoint, "user/model", private=True)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (EXPIRED_TOKEN, r"does not accept your token, which may have expired .*hf auth login"),
        (READ_TOKEN, r"no write access to user/model \(.*you need a token with write access"),
        ("", r"does not accept your token|not logged in"),
    ],
)
def test_tokens(token, message, hub, checkpoint, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PushError, match=message) as raised:
        push_checkpoint(checkpoint, "user/model")
    assert not isinstance(raised.value, PushInterruptedError)
    assert hub.store.repositories == {}


LARGE = "PUT /lfs/"
# Each fault ends the upload, and its message.
FAULTS = {
    "cut while uploading": ([Fault(LARGE, "cut", times=6, after=1)], "connection to .* failed"),
    "wrong hash": ([Fault(LARGE, "corrupt", after=1)], r"status 400 .*does not match its SHA-256"),
    "server error": ([Fault(LARGE, 503, times=9, after=1)], r"status 503"),
    "not verified": ([Fault(r"POST /user/model\.git/info/lfs/verify", 404, after=1)], r"status 404"),
    "cut commit": ([Fault(COMMIT, "cut")], "connection to .* failed"),
    "commit refused": ([Fault(COMMIT, 500)], "status 500"),
    "rate limit": ([Fault(COMMIT, 429, headers={"Retry-After": "30"})], "rate of requests, try again in 30 seconds"),
    "changed meanwhile": ([Fault(COMMIT, 412)], "was changed by someone else during the upload"),
    "expired meanwhile": (
        [Fault(COMMIT, 401, message="Invalid credentials in Authorization header")],
        "does not accept your token",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_second_try_completes_an_interrupted_upload(name, hub, lfs, checkpoint):  # noqa: F811
    faults, message = FAULTS[name]
    hub.faults = copy.deepcopy(faults)
    with pytest.raises(PushError, match=message) as raised:
        push_checkpoint(checkpoint, "user/model")
    assert isinstance(raised.value, PushInterruptedError) == (name != "expired meanwhile")
    if name != "expired meanwhile":
        assert str(raised.value).endswith(": files that were uploaded completely are not uploaded again.")
    assert stored(hub) == {}
    finished = len(hub.store.large_files)
    assert finished == (1 if faults[0].request.pattern == LARGE else 2)
    hub.faults, before = [], hub.count(LARGE)
    push_checkpoint(checkpoint, "user/model")
    assert stored(hub) == contents(plan_push(checkpoint, "user/model"))
    assert hub.count(LARGE) - before == 2 - finished


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("GET /api/models/user/model/xet-write-token", 404, times=9), "failed while uploading to user/model"),
        (Fault(COMMIT, 500), "status 500"),
    ],
)
def test_the_second_try_completes_an_interrupted_upload_to_xet(fault, message, hub, checkpoint):  # noqa: F811
    hub.faults = [fault]
    with pytest.raises(PushInterruptedError, match=message):
        push_checkpoint(checkpoint, "user/model")
    assert stored(hub) == {}
    hub.faults = []
    push_checkpoint(checkpoint, "user/model")
    assert stored(hub) == contents(plan_push(checkpoint, "user/model"))


def test_passing_faults_are_repeated_by_the_client(hub, lfs, checkpoint):  # noqa: F811
    hub.faults = [Fault(LARGE, 503), Fault("POST .*/preupload/", 429), Fault(LARGE, "cut", after=2)]
    push_checkpoint(checkpoint, "user/model")
    assert stored(hub) == contents(plan_push(checkpoint, "user/model"))


def test_uploads_in_parts(hub, lfs, checkpoint):  # noqa: F811
    hub.part_size = 50_000
    push_checkpoint(checkpoint, "user/model")
    assert stored(hub) == contents(plan_push(checkpoint, "user/model"))
    sizes = [(checkpoint / f"model-0000{number}-of-00002.safetensors").stat().st_size for number in (1, 2)]
    assert hub.count(r"PUT /lfs/\w+/\d+") == sum(-(-size // 50_000) for size in sizes)


def test_a_change_between_reading_and_committing_is_not_overwritten(hub, lfs, checkpoint, monkeypatch):  # noqa: F811
    push_checkpoint(checkpoint, "user/model")
    repository = hub.repository("user/model")
    (checkpoint / "README.md").write_text(CARD + "mine\n")
    create_commit = HfApi.create_commit

    def late(*args, **kwargs):
        repository.write({"README.md": b"theirs"}, "Update README.md")
        return create_commit(*args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(PushInterruptedError, match="was changed by someone else"):
        push_checkpoint(checkpoint, "user/model")
    assert stored(hub)["README.md"] == b"theirs"


def test_metadata_that_the_hub_does_not_accept(hub, lfs, checkpoint):  # noqa: F811
    hub.faults = [Fault("POST /api/validate-yaml", 400)]
    with pytest.raises(PushError, match=r"user/model: Invalid metadata in README\.md"):
        push_checkpoint(checkpoint, "user/model")
    for metadata in ("- a list", "license: [mit"):
        (checkpoint / "README.md").write_text(f"---\n{metadata}\n---\n")
        with pytest.raises(PushError, match=r"metadata at the top of README\.md cannot be read"):
            plan_push(checkpoint, "user/model")


def test_without_a_network(checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(PushInterruptedError, match=r"connection to http://127\.0\.0\.1:1 failed while uploading"):
        push_checkpoint(checkpoint, "user/model")
    assert "config.json" in plan_push(checkpoint, "user/model").files


def test_titles_of_uploads_by_transformers():
    """Contract: `push` knows what Transformers uploaded by these titles."""
    source = inspect.getsource(PushToHubMixin)
    for name in ("model", "config", "tokenizer", "feature extractor", "processor", "{self.__class__.__name__}"):
        assert f'"Upload {name}"' in source
    assert 'commit_message: str | None = "End of training"' in inspect.getsource(Trainer.push_to_hub)
    source = inspect.getsource(Trainer._push_from_checkpoint)
    assert 'f"Training in progress, step {self.state.global_step}"' in source
    assert 'f"Training in progress, epoch {int(self.state.epoch)}"' in source
    assert 'commit_message + ", checkpoint"' in source


def test_what_uploads_of_the_trainer_use_of_transformers():
    """Contract: `SparseMoeTrainer` replaces these methods, which `Trainer` calls, and calls the others."""
    assert list(inspect.signature(Trainer._push_from_checkpoint).parameters) == ["self", "checkpoint_folder"]
    given = list(inspect.signature(Trainer.push_to_hub).parameters)
    assert given[:5] == ["self", "commit_message", "blocking", "token", "revision"]
    assert "self._push_from_checkpoint(output_dir)" in inspect.getsource(Trainer._save_checkpoint)
    assert "push_in_progress.wait_until_done()" in inspect.getsource(Trainer._finish_current_push)
    assert PushInProgress([]).is_done()
    assert {strategy.value for strategy in HubStrategy} == {"end", "every_save", "checkpoint", "all_checkpoints"}


def test_imports_of_remote_code(tmp_path):
    """Contract: Transformers finds the files of remote code by these imports."""
    (tmp_path / "a.py").write_text("import os\nfrom .b import x\nfrom .c import (\n    y,\n)\n")
    assert sorted(get_relative_imports(tmp_path / "a.py")) == ["b", "c"]
