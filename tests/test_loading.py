"""Checkpoints: their files, and loading them in every way, also where the package is not installed."""

import copy
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.dynamic_module_utils import get_relative_imports
from transformers.models.auto import modeling_auto

import modeling_sparse_moe_vlm
from modeling_sparse_moe_vlm import (
    SparseMoeVlmConfig,
    SparseMoeVlmForCausalLM,
    SparseMoeVlmForConditionalGeneration,
    SparseMoeVlmModel,
    SparseMoeVlmProcessor,
    SparseMoeVlmTextConfig,
    SparseMoeVlmTextModel,
)
from tests.support.models import TEXT_CONFIG, make_config, make_inputs, make_model
from tests.support.processors import make_image, make_processor, make_speaking_model
from tests.test_code_revisions import OF_RETRIEVAL, OF_THE_PROCESSOR, OF_UPCYCLED, OF_UPCYCLED_RETRIEVAL
from tests.test_modeling import TOWERS

OTHER_GROUPS = [
    {"name": "words", "num_experts": 2, "modalities": ["text"]},
    {"name": "pixels", "num_experts": 3, "modalities": ["image"]},
    {"name": "helper", "num_experts": 1, "always_on": True},
]
MODELS = {
    "hybrid": {},
    "joint": {"expert_groups": "joint"},
    "isolated": {"expert_groups": "isolated"},
    "groups": {"expert_groups": OTHER_GROUPS, "num_experts": None},
    "partly dense": {"num_hidden_layers": 3, "mlp_only_layers": [1], "tie_word_embeddings": True},
}
CHAT = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}


def make_text_model(**text_config) -> SparseMoeVlmForCausalLM:
    torch.manual_seed(0)
    return SparseMoeVlmForCausalLM(SparseMoeVlmTextConfig(**TEXT_CONFIG | text_config)).eval()


def logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def tensors_on_disk(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        loaded = load_file(path)
        assert not set(loaded) & set(tensors)
        tensors |= loaded
    return tensors


def map_around(model: torch.nn.Module, offloaded: str) -> dict[str, str]:
    """Returns a device map with one module on the disk and all others on the CPU."""
    device_map = {offloaded: "disk"}
    parts = offloaded.split(".")
    for depth in range(len(parts)):
        parent = ".".join(parts[:depth])
        for name, _ in model.get_submodule(parent).named_children():
            if name != parts[depth]:
                device_map[f"{parent}.{name}".removeprefix(".")] = "cpu"
    return device_map


def without_dtype(config: dict) -> dict:
    """Returns a saved configuration without the dtype, which Transformers adds when it loads a model."""
    kept = {key: value for key, value in config.items() if key != "dtype"}
    return {key: without_dtype(value) if isinstance(value, dict) else value for key, value in kept.items()}


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    expected, actual = one.state_dict(), other.state_dict()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


# ------------------------------------------------------------------------------------------------ on disk


@pytest.mark.parametrize("kind", MODELS)
def test_experts_are_saved_one_by_one_and_loaded_exactly(kind, tmp_path):
    model = make_model(**MODELS[kind])
    model.save_pretrained(tmp_path)
    disk = tensors_on_disk(tmp_path)
    assert not [name for name in disk if "gate_up_proj" in name]
    config = model.config.text_config
    several = len(config.routed_group_names) > 1
    for layer, block in enumerate(model.model.language_model.layers):
        for group in config.layer_expert_groups(layer, always_on=False):
            experts = block.mlp.experts[group.name] if several else block.mlp.experts
            for expert in range(group.num_experts):
                prefix = f"model.language_model.layers.{layer}.mlp.experts"
                prefix += f".{group.name}.{expert}" if several else f".{expert}"
                gate, up = experts.gate_up_proj[expert].chunk(2)
                assert torch.equal(disk[f"{prefix}.gate_proj.weight"], gate)
                assert torch.equal(disk[f"{prefix}.up_proj.weight"], up)
                assert torch.equal(disk[f"{prefix}.down_proj.weight"], experts.down_proj[expert])
    reloaded, info = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_weights(model, reloaded)
    assert torch.equal(logits(reloaded, make_inputs()), logits(model, make_inputs()))


def test_models_with_other_groups_in_one_process(tmp_path):
    """Transformers has one table of conversions per model type, but our models have their own conversions."""
    models = {kind: make_model(**text_config) for kind, text_config in MODELS.items()}
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
    for kind in reversed(models):
        reloaded = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path / kind)
        assert_same_weights(models[kind], reloaded)
        reloaded.save_pretrained(tmp_path / "again")
        assert tensors_on_disk(tmp_path / "again").keys() == tensors_on_disk(tmp_path / kind).keys()
        shutil.rmtree(tmp_path / "again")


@pytest.mark.parametrize("kind", MODELS)
def test_fused_checkpoints_can_be_loaded(kind, tmp_path):
    model = make_model(**MODELS[kind])
    model.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reloaded, info = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_weights(model, reloaded)


@pytest.mark.parametrize("kind", MODELS)
def test_sharded_checkpoints(kind, tmp_path):
    model = make_model(**MODELS[kind])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same_weights(model, SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tower", ["siglip", "dinov2", "vit"])
def test_states_read_from_disk_load_without_conversion(kind, tower, tmp_path):
    """`Trainer` resumes like this: it reads the file and calls `load_state_dict`. State dicts in memory load, too."""
    config = make_config(vision_config=TOWERS[tower], **MODELS[kind])
    model = SparseMoeVlmForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()

    other = SparseMoeVlmForConditionalGeneration(config)
    result = other.load_state_dict(tensors_on_disk(tmp_path / "whole"), strict=False)
    assert (set(result.missing_keys), result.unexpected_keys) == (tied, [])
    assert_same_weights(model, other)
    other = SparseMoeVlmForConditionalGeneration(config)
    for shard in (tmp_path / "shards").glob("*.safetensors"):
        assert not other.load_state_dict(load_file(shard), strict=False).unexpected_keys
    assert_same_weights(model, other)
    other = SparseMoeVlmForConditionalGeneration(config)
    assert not other.load_state_dict(model.state_dict()).missing_keys
    assert_same_weights(model, other)

    lacking = tensors_on_disk(tmp_path / "whole")
    lost = next(name for name in lacking if "experts" in name and name.endswith("1.up_proj.weight"))
    del lacking[lost]
    missing = other.load_state_dict(lacking, strict=False).missing_keys
    assert set(missing) == {lost.replace("1.up_proj.weight", "gate_up_proj")} | tied


def test_tied_embeddings_are_saved_once(tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in tensors_on_disk(tmp_path)
    reloaded = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path)
    assert reloaded.lm_head.weight is reloaded.get_input_embeddings().weight
    assert reloaded.config.tie_word_embeddings
    assert reloaded.config.text_config.tie_word_embeddings
    text = make_text_model(tie_word_embeddings=True)
    text.save_pretrained(tmp_path / "text")
    assert "lm_head.weight" not in tensors_on_disk(tmp_path / "text")
    assert_same_weights(text, SparseMoeVlmForCausalLM.from_pretrained(tmp_path / "text"))


# ------------------------------------------------------------------------------------------------ into memory


@pytest.mark.parametrize("kind", MODELS)
def test_base_models_and_models_with_heads_load_each_others_checkpoints(kind, tmp_path):
    model = make_model(**MODELS[kind])
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert type(base) is SparseMoeVlmModel
    assert_same_weights(model.model, base)
    base.save_pretrained(tmp_path / "base")
    for name, tensor in tensors_on_disk(tmp_path / "base").items():
        assert not name.startswith("model."), name
        assert torch.isfinite(tensor).all()
    reloaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(info["missing_keys"]) == (set() if model.config.tie_word_embeddings else {"lm_head.weight"})
    assert_same_weights(model.model, reloaded.model)

    text = make_text_model(**MODELS[kind])
    text.save_pretrained(tmp_path / "text")
    decoder = AutoModel.from_pretrained(tmp_path / "text")
    assert type(decoder) is SparseMoeVlmTextModel
    assert_same_weights(text.model, decoder)
    decoder.save_pretrained(tmp_path / "decoder")
    assert_same_weights(decoder, AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").model)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "auto"])
def test_dtypes(dtype, tmp_path):
    model = make_model(**MODELS["groups"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    reloaded = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in reloaded.parameters()} == {torch.bfloat16}
    assert_same_weights(model, reloaded)
    # Positions are computed in float32 for weights of any dtype.
    assert reloaded.model.language_model.rotary_emb.inv_freq.dtype is torch.float32
    full = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in full.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_stays_uninitialised(kind, tmp_path):
    """Models are created on the meta device, so tensors and buffers that the checkpoint lacks must be initialised."""
    model = make_model(**MODELS[kind])
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lacking = [
        name
        for name in tensors
        if any(part in name for part in ("layers.0.mlp", "norm", "projector", "k_proj", "embed_tokens"))
    ]
    save_file({name: tensors[name] for name in tensors if name not in lacking}, path, metadata={"format": "pt"})
    reloaded, _ = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    fresh = SparseMoeVlmForConditionalGeneration(model.config)
    for (name, tensor), (_, expected) in zip(reloaded.named_parameters(), fresh.named_parameters(), strict=True):
        assert tensor.device.type == "cpu"
        assert torch.isfinite(tensor).all(), name
        spread = expected.std() if expected.numel() > 1 else torch.tensor(0.0)
        assert abs(tensor.std() - spread) < 0.5 * spread + 1e-6, name
    buffers = dict(fresh.named_buffers())
    assert buffers.keys() == dict(reloaded.named_buffers()).keys()
    for name, buffer in reloaded.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_models_are_made_on_the_meta_device():
    with torch.device("meta"):
        model = SparseMoeVlmForConditionalGeneration(make_config())
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


def test_shapes_that_do_not_match(tmp_path):
    make_model().save_pretrained(tmp_path)
    other = make_config(moe_intermediate_size=40)
    with pytest.raises(RuntimeError, match="mismatch"):
        SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path, config=other)
    loaded = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path, config=other, ignore_mismatched_sizes=True)
    assert torch.isfinite(logits(loaded, make_inputs())).all()


@pytest.mark.parametrize("kind", ["hybrid", "isolated"])
@pytest.mark.parametrize("place", ["auto", "disk"])
def test_device_maps(kind, place, tmp_path):
    """The device maps of Accelerate name modules. Here the experts of a layer or one of its groups are on disk."""
    model = make_model(**MODELS[kind])
    model.save_pretrained(tmp_path / "model")
    device_map = place
    if place == "disk":
        offloaded = "model.language_model.layers.1.mlp.experts" + (".image" if kind == "isolated" else "")
        device_map = map_around(model, offloaded)
    loaded = SparseMoeVlmForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    if place == "disk":
        assert loaded.get_parameter(f"{offloaded}.gate_up_proj").device.type == "meta"
    torch.testing.assert_close(logits(loaded, make_inputs()), logits(model, make_inputs()))
    generated = loaded.generate(**make_inputs(), max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, model.generate(**make_inputs(), max_new_tokens=3, do_sample=False))


def test_no_module_of_a_layer_is_split_over_devices():
    from accelerate import infer_auto_device_map

    model = make_model()
    sizes = {0: 60_000, "cpu": 10**9}
    device_map = infer_auto_device_map(model, sizes, no_split_module_classes=model._no_split_modules)
    assert not [name for name in device_map if "layers." in name and name.count(".") > 3]


# ------------------------------------------------------------------------------------------------ registered by import


def test_auto_classes_by_registration(tmp_path):
    model, processor = make_speaking_model(), make_processor()
    model.save_pretrained(tmp_path / "vlm")
    processor.save_pretrained(tmp_path / "vlm")
    assert type(AutoConfig.from_pretrained(tmp_path / "vlm")) is SparseMoeVlmConfig
    assert type(AutoProcessor.from_pretrained(tmp_path / "vlm")) is SparseMoeVlmProcessor
    for auto, expected in {
        AutoModel: SparseMoeVlmModel,
        AutoModelForImageTextToText: SparseMoeVlmForConditionalGeneration,
        AutoModelForMultimodalLM: SparseMoeVlmForConditionalGeneration,
        AutoModelForCausalLM: SparseMoeVlmForConditionalGeneration,
    }.items():
        assert type(auto.from_pretrained(tmp_path / "vlm")) is expected
        assert type(auto.from_config(model.config)) is expected

    text = make_text_model()
    text.save_pretrained(tmp_path / "text")
    processor.tokenizer.save_pretrained(tmp_path / "text")
    assert type(AutoConfig.from_pretrained(tmp_path / "text")) is SparseMoeVlmTextConfig
    assert type(AutoModel.from_pretrained(tmp_path / "text")) is SparseMoeVlmTextModel
    # `transformers serve` finds the type in this table and uses the second class.
    served = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    assert served[SparseMoeVlmTextConfig.model_type] == "SparseMoeVlmForCausalLM"
    for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
        assert type(auto.from_pretrained(tmp_path / "text")) is SparseMoeVlmForCausalLM
    assert AutoTokenizer.from_pretrained(tmp_path / "text").get_vocab() == processor.tokenizer.get_vocab()


def test_auto_maps_name_every_class(tmp_path):
    """It does not matter which class is saved first, although `save_pretrained` itself writes only one class."""
    model = make_model()
    model.model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "head")
    expected = {
        "AutoConfig": "configuration_sparse_moe_vlm.SparseMoeVlmConfig",
        "AutoModel": "modeling_sparse_moe_vlm.SparseMoeVlmModel",
        "AutoModelForCausalLM": "modeling_sparse_moe_vlm.SparseMoeVlmForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_sparse_moe_vlm.SparseMoeVlmForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_sparse_moe_vlm.SparseMoeVlmForConditionalGeneration",
    }
    for folder in ("base", "head"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["auto_map"] == expected
    files = {path.name for path in Path(modeling_sparse_moe_vlm.__file__).parent.glob("*.py")}
    saved = {path.name for path in (tmp_path / "head").glob("*.py")}
    # Files of the processor are saved with the processor, and those of upcycled and retrieval models with these. The
    # fusion layer and `__init__` are only in the package.
    of_others = {f"{name}.py" for name in OF_THE_PROCESSOR | OF_UPCYCLED | OF_RETRIEVAL | OF_UPCYCLED_RETRIEVAL}
    assert files - saved == {"__init__.py", "fusion.py"} | of_others


def test_code_saved_under_fsdp(tmp_path):
    """FSDP2 replaces the class of the model by a subclass from torch. The code and `auto_map` must still be ours."""
    from torch.distributed.fsdp import FSDPModule

    model = make_model()
    names = type(model).__module__, type(model).__name__
    sharded = copy.deepcopy(model)
    sharded.__class__ = type("FSDPModel", (FSDPModule, type(model)), {"__module__": FSDPModule.__module__})
    sharded.save_pretrained(tmp_path / "sharded")
    model.save_pretrained(tmp_path / "plain")
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("plain", "sharded")]
    assert configs[0] == configs[1]
    assert sorted(os.listdir(tmp_path / "plain")) == sorted(os.listdir(tmp_path / "sharded"))
    assert (type(sharded).__module__, type(sharded).__name__) == (FSDPModule.__module__, "FSDPModel")
    assert (type(model).__module__, type(model).__name__) == names


# ------------------------------------------------------------------------------------------------ remote code

# The package must not be importable. Otherwise, a file that is missing in the folder would not be noticed.
PRELUDE = """
import importlib, importlib.abc, json, os, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_sparse_moe_vlm":
            raise ModuleNotFoundError(f"{name} is not installed")

sys.meta_path.insert(0, Blocker())
try:
    import modeling_sparse_moe_vlm
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the package is importable")

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

def chat(processor):
    inputs = load_file("inputs.safetensors")
    messages = json.load(open("messages.json"))
    made = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert made.keys() == inputs.keys(), (made.keys(), inputs.keys())
    for key in inputs:  # torchvision, if installed, resizes slightly differently than Pillow
        torch.testing.assert_close(made[key], inputs[key], rtol=0, atol=0.02)
    return inputs

def check(model, inputs, key="logits"):
    expected = load_file("expected.safetensors")[key]
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    torch.testing.assert_close(outputs.logits if key == "logits" else outputs.last_hidden_state, expected)

REMOTE = {"trust_remote_code": True}
"""


def run_isolated(folder: Path, code: str) -> str:
    """Runs a script in a new process, which finds neither the package nor the repository."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", PRELUDE + textwrap.dedent(code)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".py", ".json", ".jinja")}


@pytest.fixture(params=["hybrid", "groups"])
def remote_folder(request, tmp_path) -> Path:
    """A folder with `model` as a user would download it, with inputs and with the outputs that are expected."""
    model = make_speaking_model(**MODELS[request.param])
    processor = make_processor()
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    shutil.copytree(saved, tmp_path / "elsewhere" / "model")
    shutil.rmtree(saved)
    (tmp_path / "elsewhere" / "model").rename(tmp_path / "model")

    make_image().save(tmp_path / "image.png")
    image = {"type": "image", "url": str(tmp_path / "image.png")}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "What is <image> here?"}]}]
    (tmp_path / "messages.json").write_text(json.dumps(messages))
    inputs = processor.apply_chat_template(messages, **CHAT)
    save_file(dict(inputs), tmp_path / "inputs.safetensors")
    with torch.no_grad():
        outputs = model(**inputs)
        hidden = model.model(**inputs).last_hidden_state
    save_file({"logits": outputs.logits, "hidden": hidden}, tmp_path / "expected.safetensors")
    return tmp_path


def test_remote_code(remote_folder):
    before = snapshot(remote_folder / "model")
    run_isolated(
        remote_folder,
        """
        config = AutoConfig.from_pretrained("model", **REMOTE)
        assert config.num_active_parameters("image") > 0
        processor = AutoProcessor.from_pretrained("model", **REMOTE)
        inputs = chat(processor)
        for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
            model = auto.from_pretrained("model", **REMOTE)
            assert type(model).__name__ == "SparseMoeVlmForConditionalGeneration"
            check(model, inputs)
        base = AutoModel.from_pretrained("model", **REMOTE)
        assert type(base).__name__ == "SparseMoeVlmModel"
        check(base, inputs, "hidden")
        assert AutoModelForImageTextToText.from_config(config, **REMOTE).num_parameters() == model.num_parameters()
        answer = model.generate(**inputs, max_new_tokens=3)
        assert isinstance(processor.decode(answer[0]), str)
        fast = AutoModelForImageTextToText.from_pretrained("model", experts_implementation="grouped_mm", **REMOTE)
        assert fast.config.text_config._experts_implementation == "grouped_mm"
        check(fast, inputs)

        model.save_pretrained("again")
        processor.save_pretrained("again")
        base.save_pretrained("base")
        """,
    )
    assert snapshot(remote_folder / "model") == before
    again = snapshot(remote_folder / "again")
    assert again.keys() == before.keys()
    for name in before:
        if name.endswith((".py", ".jinja")):
            assert again[name] == before[name], name
    for name in ("config.json", "processor_config.json"):
        assert without_dtype(json.loads(again[name])) == without_dtype(json.loads(before[name]))
    base = json.loads((remote_folder / "base" / "config.json").read_text())
    assert base["auto_map"] == json.loads(before["config.json"])["auto_map"]

    shutil.rmtree(remote_folder / "model")
    (remote_folder / "again").rename(remote_folder / "moved")
    run_isolated(
        remote_folder,
        """
        inputs = chat(AutoProcessor.from_pretrained("moved", **REMOTE))
        check(AutoModelForImageTextToText.from_pretrained("moved", **REMOTE), inputs)
        check(AutoModel.from_pretrained("base", **REMOTE), inputs, "hidden")
        chatter = pipeline("image-text-to-text", model="moved", **REMOTE)
        messages = json.load(open("messages.json"))
        answer = chatter(text=messages, max_new_tokens=3, return_full_text=False)[0]["generated_text"]
        assert isinstance(answer, str)
        """,
    )


def test_remote_code_of_a_text_only_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = make_text_model(vocab_size=280)
    model.save_pretrained(tmp_path / "model")
    make_processor().tokenizer.save_pretrained(tmp_path / "model")
    ids = make_processor().tokenizer("the cat", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
    save_file({"logits": logits(model, {"input_ids": ids}), "hidden": hidden}, tmp_path / "expected.safetensors")
    before = snapshot(tmp_path / "model")
    run_isolated(
        tmp_path,
        """
        tokenizer = AutoTokenizer.from_pretrained("model", **REMOTE)
        inputs = {"input_ids": tokenizer("the cat", return_tensors="pt")["input_ids"]}
        for folder in ("model", "again"):
            model = AutoModelForCausalLM.from_pretrained(folder, **REMOTE)
            assert type(model).__name__ == "SparseMoeVlmForCausalLM"
            check(model, inputs)
            check(AutoModel.from_pretrained(folder, **REMOTE), inputs, "hidden")
            model.save_pretrained("again")
            tokenizer.save_pretrained("again")
        assert pipeline("text-generation", model="again", **REMOTE)("the cat", max_new_tokens=3)
        """,
    )
    again = snapshot(tmp_path / "again")
    assert again.keys() == before.keys()
    assert without_dtype(json.loads(again["config.json"])) == without_dtype(json.loads(before["config.json"]))


def test_remote_code_beside_the_installed_package(tmp_path):
    """Both in one process: the code of the folder is another set of classes, and neither must affect the other."""
    model, inputs = make_model(), make_inputs()
    model.save_pretrained(tmp_path)
    remote = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    torch.testing.assert_close(logits(remote, inputs), logits(model, inputs))
    local = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path)
    assert type(local) is SparseMoeVlmForConditionalGeneration
    torch.testing.assert_close(logits(local, inputs), logits(model, inputs))
    local.save_pretrained(tmp_path / "again")
    assert_same_weights(model, SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path / "again"))


@pytest.mark.parametrize("start", ["configuration", "processing"])
def test_files_that_older_releases_look_for(start):
    """
    Transformers 4 copies the files that the entry file imports, and then looks for the imports of these files. If they
    import another file, it is missing, and Transformers fails before our check of the release raises its error.
    """
    folder = Path(modeling_sparse_moe_vlm.__file__).parent
    entry = f"{start}_sparse_moe_vlm"
    direct = get_relative_imports(folder / f"{entry}.py")
    assert "versions" in direct
    for name in direct:
        assert set(get_relative_imports(folder / f"{name}.py")) <= {entry, *direct}, (
            f"{entry}.py must import what {name}.py does"
        )


@pytest.mark.parametrize("text_class", [SparseMoeVlmTextModel, SparseMoeVlmForCausalLM])
@pytest.mark.parametrize("name", MODELS)
def test_decoder_from_a_checkpoint_of_the_whole_model(name, text_class, tmp_path):
    model = make_model(**MODELS[name])
    model.save_pretrained(tmp_path / "whole")
    decoder = text_class.from_pretrained(tmp_path / "whole")
    decoder.save_pretrained(tmp_path / "decoder")
    for text_model in (decoder, text_class.from_pretrained(tmp_path / "decoder")):
        assert_same_weights(model.model.language_model, getattr(text_model, "model", text_model))
        if text_class is SparseMoeVlmForCausalLM:
            inputs = make_inputs(images_per_row=0)
            assert torch.equal(logits(text_model, inputs), logits(model, inputs))


def test_weights_are_safetensors(tmp_path):
    make_model().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pth")]


@pytest.mark.parametrize(("width", "dtype", "multiple"), [(12, torch.bfloat16, 8), (10, torch.float32, 4)])
def test_grouped_products_need_rows_of_a_multiple_of_16_bytes(width, dtype, multiple, tmp_path):
    make_model(moe_intermediate_size=width).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"needs widths that are multiples of {multiple}, which .*: {width}"):
        SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype, experts_implementation="grouped_mm")
    make_model(moe_intermediate_size=2 * width).to(dtype).set_experts_implementation("grouped_mm")
