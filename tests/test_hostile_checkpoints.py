"""Checkpoints with missing, unexpected or hostile files and tensors are refused with an error that names them."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM, SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.checkpoint_integrity import check_number_of_weights, read_index
from modeling_sparse_moe_vlm.toolbox.retrieval import to_retrieval
from tests.support.models import make_model
from tests.support.processors import make_tokenizer
from tests.support.retrieval import make_retrieval_model
from tests.support.upcycled import make_few_experts

pytestmark = pytest.mark.newest

KINDS = {
    "ours": make_model,
    "upcycled": lambda: make_few_experts("llava"),
    "retrieval": make_retrieval_model,
    "upcycled retrieval": lambda: to_retrieval(make_few_experts("qwen3_vl"), make_tokenizer()),
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """The class of a model, and the folder of a checkpoint."""
    model, folder = KINDS[request.param](), tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return type(model), folder


@pytest.fixture
def copied(saved, tmp_path) -> tuple[type, Path]:
    model_class, folder = saved
    shutil.copytree(folder, tmp_path / "copy")
    return model_class, tmp_path / "copy"


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def name_with(folder: Path, part: str) -> str:
    return next(name for name in sorted(load_file(folder / "model.safetensors")) if part in name)


@pytest.mark.parametrize("part", ["layers.0.input_layernorm", "layers.1.mlp.gate.", "layers.1.self_attn.q_proj"])
def test_missing_tensors(part, copied):
    model_class, folder = copied
    name = name_with(folder, part)
    edit(folder, lambda tensors: tensors.pop(name))
    message = f"the tensors of {folder} are not those of {model_class.__name__}: the checkpoint lacks '"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        model_class.from_pretrained(folder)
    assert part in str(error.value)
    assert "no place for" not in str(error.value)
    _, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert len(report["missing_keys"]) == 1
    model_class.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_missing_experts(copied):
    """Transformers would initialise them at random."""
    model_class, folder = copied

    def drop(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]

    edit(folder, drop)
    with pytest.raises(ValueError, match=r"the checkpoint lacks '.*experts.*down_proj'.* and \d+ more\. Compare"):
        model_class.from_pretrained(folder)


def test_unexpected_tensors(copied):
    model_class, folder = copied
    name = name_with(folder, "layers.0.input_layernorm").replace("layers.0.", "layers.7.")
    edit(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    with pytest.raises(
        ValueError, match=r"the model has no place for '[\w.]*layers\.7\.input_layernorm.weight'\. Comp"
    ):
        model_class.from_pretrained(folder)


def test_other_numbers_of_layers(saved):
    """A model with fewer layers than its checkpoint would silently be another model."""
    if saved[0] is not SparseMoeVlmForConditionalGeneration:
        pytest.skip("one kind is enough")
    with pytest.raises(ValueError, match=r"has no place for 'model.language_model.layers.1.* and \d+ more"):
        saved[0].from_pretrained(saved[1], num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"lacks 'model.language_model.layers.2.* and \d+ more"):
        saved[0].from_pretrained(saved[1], num_hidden_layers=3)


def test_differences_that_are_allowed(tmp_path):
    """Settings that are switched on later start at known values, and other classes have other heads."""
    model = make_model()
    model.save_pretrained(tmp_path)
    load = SparseMoeVlmForConditionalGeneration.from_pretrained
    changed = load(tmp_path, router_bias_update_rate=0.1, learned_modality_priors=True)
    biases = [value for name, value in changed.named_buffers() if name.endswith("e_score_correction_bias")]
    assert biases
    assert not any(value.any() for value in biases)
    config = make_model(modalities=["text", "image", "depth"], expert_groups="joint").config
    config.modality_encoders = {"depth": {"model_type": "vit", "token_id": 4, **_SMALL}}
    joint = make_model(expert_groups="joint")
    joint.save_pretrained(tmp_path / "joint")
    assert "depth" in load(tmp_path / "joint", config=config).model.modality_encoders
    name = "model.modality_encoders.depth.linear_1.weight"
    load(tmp_path / "joint", config=config).save_pretrained(tmp_path / "with-depth")
    edit(tmp_path / "with-depth", lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=re.escape(f"lacks '{name}'. Compare")):
        load(tmp_path / "with-depth")

    model.model.save_pretrained(tmp_path / "base")
    assert load(tmp_path / "base").lm_head.weight.isfinite().all()  # a new head for the base model, with a warning
    decoder = type(model.model.language_model).from_pretrained(tmp_path)
    assert len(decoder.layers) == 2
    edit(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lacks 'lm_head\.weight'"):
        load(tmp_path)
    assert type(model.model).from_pretrained(tmp_path) is not None
    save_file({}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load(tmp_path) is not None  # an empty checkpoint asks for new weights, with a warning


_SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}


def test_a_decoder_does_not_take_the_layers_of_another(tmp_path):
    make_model().save_pretrained(tmp_path)
    name = "model.language_model.layers.7.input_layernorm.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: torch.ones(32)}))
    for model_class in (SparseMoeVlmForCausalLM, type(make_model().model), type(make_model().model.language_model)):
        with pytest.raises(ValueError, match=r"has no place for '[\w.]*layers.7.input_layernorm.weight'"):
            model_class.from_pretrained(tmp_path)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles(name, copied):
    model_class, folder = copied
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(str(folder / "ran"))))
    with pytest.raises(OSError, match=re.escape(f"{folder / name} is a pickle, which can run code when it is read")):
        model_class.from_pretrained(folder)
    with pytest.raises(ValueError, match="`use_safetensors=False` asks for weights in a pickle"):
        model_class.from_pretrained(folder, use_safetensors=False)
    assert not (folder / "ran").exists()


def test_pickles_beside_weights_are_not_read(copied):
    model_class, folder = copied
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    model_class.from_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        model_class.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "a\\b.safetensors", "c:x.safetensors", "model.bin"]
)
def test_indices_that_name_other_files(name, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    shard = tmp_path / "model" / content["weight_map"][first]
    if not name.startswith("/"):
        shutil.copy(shard, tmp_path / "model" / name)
    content["weight_map"][first] = name
    index.write_text(json.dumps(content))
    message = re.escape(f"lists the file {name!r} for the tensor {first!r}, but its files must be safetensors files in")
    with pytest.raises(OSError, match=message):
        SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path / "model")
    with pytest.raises(OSError, match=message):
        read_index(index)


def test_configurations_that_ask_for_far_more_weights(copied, monkeypatch):
    """The error comes before memory is allocated for the weights."""
    model_class, folder = copied
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 2**24
    (folder / "config.json").write_text(json.dumps(config))
    allocated = []
    monkeypatch.setattr(model_class, "_move_missing_keys_from_meta_to_device", lambda *_: allocated.append(1))
    with pytest.raises(
        ValueError, match=r"has [\d,]{11,} weights, but the files of the checkpoint contain [\d,]{5,7}: "
    ):
        model_class.from_pretrained(folder)
    assert not allocated


def test_the_bound_on_the_number_of_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.ones(2)}, path)
    check_number_of_weights([path], 4 * 14 + 2**26)
    check_number_of_weights([], 2**40)
    with pytest.raises(ValueError, match="has 67,108,921 weights, but the files of the checkpoint contain 14:"):
        check_number_of_weights([path], 4 * 14 + 2**26 + 1)


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "[" * 100_000, "null", "\udcff"])
def test_damaged_configurations(text, copied):
    model_class, folder = copied
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(OSError, match=re.escape(f"{folder / 'config.json'} is damaged, it is not a configuration (")):
        model_class.from_pretrained(folder)
