"""Models by their names on the Hub: upcycling them, and loading the results without this package."""

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaConfig

from tests.support.hub_server import commit_of, hub_environment, hub_server
from tests.support.in_tree_models import make_llava, prepare
from tests.support.models import TINY_DECODER
from tests.support.processes import ROOT
from tests.support.processors import VOCAB_SIZE
from tests.support.upcycled import make_dense_inputs
from tests.toolbox.upcycling.test_processors import make_llava_processor

pytestmark = pytest.mark.newest

# Prints what it finds as one line of JSON.
UPCYCLE = """
import contextlib, io, json, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from transformers import AutoModelForImageTextToText, AutoProcessor
from modeling_sparse_moe_vlm.toolbox.commands.main import main
from modeling_sparse_moe_vlm.toolbox.hub import write_model_card
from modeling_sparse_moe_vlm.toolbox.upcycling import upcycle

root = Path(sys.argv[2])
options = ["--expert-groups", "isolated", "--num-experts", "4"]
main(["upcycle", "user/dense", "--output", str(root / "command"), "--json", *options])

sparse = upcycle(AutoModelForImageTextToText.from_pretrained("user/dense"), "isolated", num_experts=4)
sparse.save_pretrained(root / "python")
AutoProcessor.from_pretrained("user/dense").save_pretrained(root / "python")
write_model_card(root / "python", model_name="command")

mistakes = {}
for name in ("user/absent", "user/gated", "user/forbidden", "user/dense@old"):
    repo, _, revision = name.partition("@")
    printed = io.StringIO()
    arguments = ["upcycle", repo, "--output", str(root / "new"), *(["--revision", revision] if revision else [])]
    try:
        with contextlib.redirect_stderr(printed):
            main(arguments)
    except SystemExit as stopped:
        mistakes[name] = [stopped.code, *printed.getvalue().splitlines()]
print(json.dumps(mistakes))
"""

# This package cannot be imported here.
LOAD = """
import os, sys
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoProcessor

inputs, expected = torch.load(sys.argv[1])
# Its file imports that of the other classes, which Transformers executes again for them.
scorer = AutoModelForSequenceClassification.from_pretrained("user/sparse", trust_remote_code=True)
assert type(scorer.base_model) is type(AutoModel.from_pretrained("user/sparse", trust_remote_code=True))
model = AutoModelForImageTextToText.from_pretrained("user/sparse", trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules.")
with torch.no_grad():
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
assert AutoProcessor.from_pretrained("user/sparse").chat_template
assert sorted(os.listdir(snapshot_download("user/sparse"))) == sorted(os.listdir(sys.argv[2]))
assert "modeling_sparse_moe_vlm" not in sys.modules
"""


def run(program, endpoint, home, *arguments):
    command = [sys.executable, "-I", "-c", program, *map(str, arguments)]
    result = subprocess.run(
        command, cwd=home, env=hub_environment(endpoint, home), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with a dense model, and with a model that a process with this package upcycled from it."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    dense = prepare(make_llava(LlamaConfig(**TINY_DECODER | {"vocab_size": VOCAB_SIZE, "head_dim": 8})))
    dense.save_pretrained(root / "dense")
    make_llava_processor().save_pretrained(root / "dense")
    (root / "dense/README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    (root / "home").mkdir()
    refused = {"user/gated": (401, "GatedRepo"), "user/forbidden": (403, "GatedRepo")}
    with hub_server({"user/dense": root / "dense"}, refused) as endpoint:
        made, mistakes = run(UPCYCLE, endpoint, root / "home", ROOT, root).splitlines()
    return dense, root, json.loads(made), json.loads(mistakes)


def test_upcycling_by_name(hub):
    _, root, made, _ = hub
    assert (made["source"], made["processor"]) == ("user/dense", "LlavaProcessor")
    assert made["start"]["base_model"] == "user/dense"
    names = [{path.name for path in (root / way).iterdir()} for way in ("command", "python")]
    assert names[0] == names[1] >= {"model.safetensors", "README.md", "chat_template.jinja", "modeling_upcycled.py"}
    for name in names[0] - {"config.json", "README.md"}:
        assert (root / "command" / name).read_bytes() == (root / "python" / name).read_bytes(), name
    assert list((root / "home/hub/models--user--dense/snapshots").iterdir()) == [
        root / "home/hub/models--user--dense/snapshots" / commit_of(root / "dense")
    ]


@pytest.mark.parametrize("way", ["command", "python"])
def test_cards_name_the_base_and_its_licence(way, hub):
    data = ModelCard.load(hub[1] / way / "README.md").data
    assert data.base_model == "user/dense"
    assert (data.license, data.license_name) == ("other", "own")
    assert data.license_link == "https://huggingface.co/user/dense/blob/main/LICENSE"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user/absent", "user/absent is not a local folder and is not a valid model identifier"),
        ("user/gated", "gated repo"),
        ("user/forbidden", "gated repo"),
        ("user/dense@old", "old is not a valid git identifier"),
    ],
)
def test_repositories_that_cannot_be_read(name, message, hub):
    _, root, _, mistakes = hub
    code, line = mistakes[name]
    assert code == 2
    assert line.startswith("error: ")
    assert message in line
    assert not (root / "new").exists()


@torch.no_grad()
def test_loading_by_name_without_the_package(hub, tmp_path):
    dense, root, *_ = hub
    inputs = make_dense_inputs("llava")
    torch.save((inputs, dense(**inputs).logits), tmp_path / "expected.pt")
    (tmp_path / "home").mkdir()
    with hub_server({"user/sparse": root / "command"}) as endpoint:
        run(LOAD, endpoint, tmp_path / "home", tmp_path / "expected.pt", root / "command")
