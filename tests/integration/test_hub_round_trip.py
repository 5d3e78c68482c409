"""
What is uploaded loads in a process without this package: through the Auto classes, the pipeline and PEFT, pinned to a
revision. With the unmodified client of the Hub in its oldest supported and its installed release, through Xet and LFS.
"""

import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig

from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config
from modeling_sparse_moe_vlm.toolbox.hub import plan_push, push_checkpoint
from modeling_sparse_moe_vlm.toolbox.upcycling import upcycle
from tests.support.hub_client import hub, lfs  # noqa: F401
from tests.support.hub_server import TOKEN, hub_environment, running_hub
from tests.support.in_tree_models import make_llava, prepare
from tests.support.models import TINY_DECODER, make_inputs
from tests.support.processes import ROOT
from tests.support.processors import VOCAB_SIZE, make_image, make_processor, make_speaking_model, speak_printably
from tests.support.upcycled import make_dense_inputs
from tests.toolbox.upcycling.test_processors import make_llava_processor

pytestmark = pytest.mark.newest

OLDEST_CLIENT = "1.31.0"

PUSH = """
import json, sys
sys.path.insert(0, sys.argv[1])
from modeling_sparse_moe_vlm.toolbox.commands.main import main

root = sys.argv[2]
for name in ("own", "upcycled"):
    main(["push", f"{root}/{name}", f"user/{name}", "--json", "--private"])
main(["push", f"{root}/adapter", "user/adapter", "--base-model", "user/own", "--json"])
main(["push", f"{root}/own-v2", "user/own", "--json", "--message", "Second version"])
"""

# This package cannot be imported here.
LOAD = """
import json, sys
import huggingface_hub, torch
from PIL import Image
from peft import AutoPeftModel, PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

root, first, version = sys.argv[1:]
assert huggingface_hub.__version__ == version, huggingface_hub.__version__
expected = torch.load(f"{root}/expected.pt")
code = {"trust_remote_code": True}

def check(name, model):
    assert type(model.get_base_model() if name == "adapter" else model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        inputs, logits = expected[name]
        torch.testing.assert_close(model.eval()(**inputs).logits, logits, rtol=1e-4, atol=1e-5)

check("own-v2", AutoModelForImageTextToText.from_pretrained("user/own", **code))
base = AutoModelForImageTextToText.from_pretrained("user/own", revision=first, **code)
check("own", base)
check("upcycled", AutoModelForImageTextToText.from_pretrained("user/upcycled", **code))

assert PeftConfig.from_pretrained("user/adapter").base_model_name_or_path == "user/own"
check("adapter", PeftModel.from_pretrained(base, "user/adapter"))

image = Image.open(f"{root}/image.png")
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
for name, revision in (("user/own", first), ("user/upcycled", None)):
    pipe = pipeline("image-text-to-text", model=name, revision=revision, **code)
    answer = pipe(text=messages, max_new_tokens=3, return_full_text=False)[0]["generated_text"]
    processor = AutoProcessor.from_pretrained(name, revision=revision, **code)
    assert isinstance(answer, str) and processor.chat_template
assert "modeling_sparse_moe_vlm" not in sys.modules
print("loaded")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints, and the outputs that they must have after a round trip."""
    root, expected = tmp_path_factory.mktemp("saved"), {}
    torch.manual_seed(0)
    own = speak_printably(make_speaking_model())
    second = make_speaking_model(num_experts_per_tok=1)
    dense = prepare(make_llava(LlamaConfig(**TINY_DECODER | {"vocab_size": VOCAB_SIZE, "head_dim": 8})))
    upcycled = upcycle(dense, "isolated", num_experts=4)
    for name, model, processor in (
        ("own", own, make_processor()),
        ("own-v2", second, make_processor()),
        ("upcycled", upcycled, make_llava_processor()),
    ):
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    inputs = {name: make_inputs() for name in ("own", "own-v2")} | {"upcycled": make_dense_inputs("llava")}
    with torch.no_grad():
        for name, model in (("own", own), ("own-v2", second), ("upcycled", upcycled)):
            expected[name] = (inputs[name], model.eval()(**inputs[name]).logits)
        adapted = get_peft_model(own, expert_lora_config(own, init_lora_weights=False)).eval()
        expected["adapter"] = (inputs["own"], adapted(**inputs["own"]).logits)
        assert not torch.allclose(expected["adapter"][1], expected["own"][1], atol=1e-3)
    adapted.save_pretrained(root / "adapter")
    (root / "own" / "recipe.yaml").write_text("model: tiny.json\n")  # trained on the built-in data
    torch.save(expected, root / "expected.pt")
    make_image().save(root / "image.png")
    return root


@pytest.fixture(scope="module", params=["installed", OLDEST_CLIENT])
def client(request, tmp_path_factory):
    """Release of the client of the Hub, and the folder to import it from."""
    if request.param == "installed":
        import huggingface_hub

        return huggingface_hub.__version__, ""
    folder = tmp_path_factory.mktemp("client")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    installed = subprocess.run([*command, f"huggingface_hub=={request.param}"], capture_output=True, check=False)
    if installed.returncode:
        pytest.skip(f"huggingface_hub {request.param} cannot be installed")
    return request.param, str(folder)


def run(program, server, home, client, *arguments, **environment):
    _, folder = client
    program = f"import sys; sys.path[:0] = {[folder] if folder else []}\n{program}"
    command = [sys.executable, "-I", "-c", program, *map(str, arguments)]
    variables = hub_environment(server.endpoint, home) | {"HF_TOKEN": TOKEN} | environment
    result = subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.extensive
@pytest.mark.slow
@pytest.mark.parametrize("transfer", ["xet", "lfs"])
def test_round_trip(transfer, client, saved, tmp_path):
    variables = {"HF_HUB_DISABLE_XET": "1"} if transfer == "lfs" else {}
    with running_hub() as server:
        run(PUSH, server, tmp_path, client, ROOT, saved, **variables)
        own, adapter = server.repository("user/own"), server.repository("user/adapter")
        assert (own.is_private, adapter.is_private) == (True, False)
        assert own.history()[0].title == "Second version (sparse-moe-vlm)"
        is_xet = {file.xet_hash is not None for file in own.at("main").files.values() if file.is_large}
        assert is_xet == {transfer == "xet"}
        assert b"license: apache-2.0" in adapter.files()["README.md"]  # that of the base model
        assert adapter.files().keys() >= {"LICENSE", "adapter_model.safetensors"}
        first = own.history()[1].sha
        (home := tmp_path / "home").mkdir()
        assert run(LOAD, server, home, client, saved, first, client[0], **variables).splitlines()[-1] == "loaded"


@pytest.mark.extensive
def test_push_to_hub_of_models_and_processors(hub, lfs, saved):  # noqa: F811
    """Both together upload what `push` uploads, but with the empty card of Transformers and without a licence."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    for name in ("own", "upcycled"):
        model = AutoModelForImageTextToText.from_pretrained(saved / name, trust_remote_code=True)
        model.push_to_hub(f"user/{name}", max_shard_size="60KB")
        AutoProcessor.from_pretrained(saved / name, trust_remote_code=True).push_to_hub(f"user/{name}")
        found = hub.repository(f"user/{name}").files()
        expected = dict(plan_push(saved / name, f"user/{name}").files)
        weights = {file for file in found if file.startswith("model") and not file.endswith(".py")}
        assert "model.safetensors.index.json" in weights
        assert found.keys() - weights == expected.keys() - {"model.safetensors", "LICENSE", "LICENSE-CODE"}
        # `tokenizer_config.json` records where the tokenizer was loaded from.
        for file in expected.keys() & found.keys() - {"README.md", "config.json", "tokenizer_config.json"}:
            content = expected[file].content
            assert found[file] == (content if isinstance(content, bytes) else content.read_bytes()), file
        pushed = push_checkpoint(saved / name, f"user/{name}")  # without `force`
        assert set(pushed.deleted) == weights
        assert hub.repository(f"user/{name}").files().keys() == expected.keys()
