"""Errors for damaged adapters name the file and what is missing in it."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config, load_expert_lora
from modeling_sparse_moe_vlm.toolbox.expert_lora.adapter_files import read_adapter_files
from modeling_sparse_moe_vlm.toolbox.expert_lora.peft_0_18 import upgrade_expert_adapter
from modeling_sparse_moe_vlm.toolbox.expert_lora.shards import load_adapter
from tests.support.models import make_model

FACTOR = "base_model.model.model.language_model.layers.1.mlp.experts.lora_{}.weight"


@pytest.fixture
def folder(tmp_path):
    model = make_model()
    get_peft_model(model, expert_lora_config(model, r=2, lora_alpha=6)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_files_that_are_read(folder):
    config, weights = read_adapter_files(folder)
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 6, "LORA")
    expected = load_file(folder / "adapter_model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("kept", "lost"), ["AB", "BA"])
def test_a_factor_without_its_other_one(folder, kept, lost):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    del weights[FACTOR.format(lost)]
    save_file(weights, path, metadata={"format": "pt"})
    message = f"{path} has '{FACTOR.format(kept)}', but lacks '{FACTOR.format(lost)}': copy or download the file again"
    for load in (load_expert_lora, load_adapter):
        with pytest.raises(OSError, match=message):
            load(make_model(), folder)
    with pytest.raises(OSError, match=message):
        upgrade_expert_adapter(folder, folder.parent / "upgraded", make_model())


def test_factors_of_embeddings_are_pairs_as_well(folder):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    save_file(weights | {"model.embed_tokens.lora_embedding_B": torch.ones(2, 2)}, path)
    with pytest.raises(OSError, match=r"lacks 'model.embed_tokens.lora_embedding_A'"):
        read_adapter_files(folder)
    save_file(weights | {f"model.embed_tokens.lora_embedding_{factor}": torch.ones(2, 2) for factor in "AB"}, path)
    assert len(read_adapter_files(folder)[1]) == len(weights) + 2


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_files_that_were_cut_off(folder, kept):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[:kept].rstrip())
        with pytest.raises(OSError, match=f"^{path} is (incomplete|damaged)"):
            load_expert_lora(make_model(), folder)
        path.unlink()
        with pytest.raises(OSError, match=f"^{path} is missing"):
            load_expert_lora(make_model(), folder)
        path.write_bytes(content)
    load_expert_lora(make_model(), folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": None}, "must set `peft_type` to 'LORA', but it is None"),
        ({"peft_type": "IA3"}, "must set `peft_type` to 'LORA', but it is 'IA3'"),
        ({"r": None}, "must set the rank `r` to a positive integer, but it is None"),
        ({"r": 0}, "must set the rank `r` to a positive integer, but it is 0"),
        ({"r": True}, "must set the rank `r` to a positive integer, but it is True"),
        ({"r": "2"}, "must set the rank `r` to a positive integer, but it is '2'"),
        ({"lora_alpha": None}, "must set the scale `lora_alpha` to a number, but it is None"),
        ({"lora_alpha": "6"}, "must set the scale `lora_alpha` to a number, but it is '6'"),
        ({"target_modules": None, "target_parameters": []}, "must set `target_modules` or `target_parameters`"),
    ],
)
def test_fields_that_are_missing_or_wrong(folder, fields, message):
    """PEFT would use its defaults, and scale the adapter differently than in training."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for field, value in fields.items():
        config.pop(field)
        if value is not None:
            config[field] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^{path} {message}"):
        load_expert_lora(make_model(), folder)


def test_a_configuration_that_is_not_one(folder):
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(OSError, match=r"adapter_config.json is damaged \(it is not a JSON object\)"):
        read_adapter_files(folder)


def test_fields_that_may_be_left_out(folder):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for changes in ({"lora_alpha": 1.5, "r": 1}, {"target_modules": None}, {"target_parameters": None}):
        path.write_text(json.dumps(config | changes))
        assert read_adapter_files(folder)[0] == config | changes


def test_tensors_of_wrong_shapes_are_named(folder):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    name = FACTOR.format("B")
    save_file(weights | {name: weights[name][:-1].contiguous()}, path)
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.experts' has factors of shapes .* which do not fit a stack of shape"
    ):
        load_expert_lora(make_model(), folder)


def test_pickles_are_refused(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    assert len(read_adapter_files(folder)[1]) > 10
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(
        OSError, match=f"^{folder / 'adapter_model.bin'} is a pickle, which can run code when it is read"
    ):
        load_expert_lora(make_model(), folder)
