"""Tensors that are read a few at a time equal those that `from_pretrained` loads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.utils import logging

from modeling_sparse_moe_vlm.toolbox.upcycling.dense_checkpoint import DenseCheckpoint, model_class_of
from modeling_sparse_moe_vlm.toolbox.upcycling.errors import UpcyclingError
from tests.support.in_tree_models import MODELS, make_llava
from tests.support.models import TINY_DECODER


def make_llama(**fields):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY_DECODER | fields))


def make_dinov2():
    """Returns a model of which the library splits a tensor on disk into two."""
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8, use_swiglu_ffn=True
    )
    return Dinov2Model(config)


def check_against_the_library(folder, model_class, **options):
    """Reads one tensor after the other. Returns the names that the files lack."""
    expected = model_class.from_pretrained(folder, **options)
    with DenseCheckpoint.open(folder, model_class, **options) as checkpoint:
        found = {}
        for name in checkpoint.names:
            read = checkpoint.read([name])
            assert name in read
            found |= read
            assert all(tensor.is_meta for tensor in checkpoint.model.state_dict().values())
        conversions = [repr(step) for step in checkpoint.model._weight_conversions]
        assert type(checkpoint.model) is model_class
    assert conversions == [repr(step) for step in expected._weight_conversions]
    assert checkpoint.model.config.to_dict() == expected.config.to_dict()
    if expected.can_generate():
        assert checkpoint.model.generation_config.to_dict() == expected.generation_config.to_dict()
    state = expected.state_dict()
    assert set(found) == set(checkpoint.names)
    for name, tensor in found.items():
        assert tensor.dtype == state[name].dtype == checkpoint.dtype_of(name)
        assert torch.equal(tensor, state[name]), name
    return set(state) - set(found)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", ["50GB", "10KB"])
def test_models_of_all_kinds(name, size, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path, max_shard_size=size)
    lacking = check_against_the_library(tmp_path, type(model))
    assert lacking == set(model.all_tied_weights_keys)


def test_split_tensors(tmp_path):
    make_dinov2().save_pretrained(tmp_path)
    with DenseCheckpoint.open(tmp_path, Dinov2Model) as checkpoint:
        name = next(name for name in checkpoint.names if name.endswith("up_proj.weight"))
        assert set(checkpoint.read([name])) == {name, name.replace("up_proj", "gate_proj")}
    assert check_against_the_library(tmp_path, Dinov2Model) == set()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes(dtype, tmp_path):
    """Includes tensors that the model keeps in float32."""
    make_llava().save_pretrained(tmp_path)
    check_against_the_library(tmp_path, type(make_llava()), dtype=dtype)

    class KeepsNorms(LlamaForCausalLM):
        _keep_in_fp32_modules_strict = ["input_layernorm"]

    make_llama().save_pretrained(tmp_path / "llama")
    check_against_the_library(tmp_path / "llama", KeepsNorms, dtype=dtype)


def test_names_on_disk_and_in_memory(tmp_path):
    """The library saves LLaVA with names that differ from the model's, and reads both."""
    model = make_llava()
    model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    assert not set(on_disk) & set(model.state_dict())
    check_against_the_library(tmp_path, type(model))
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    assert check_against_the_library(tmp_path, type(model)) == set()


def test_a_model_with_and_without_a_head(tmp_path):
    model = make_llama(tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path / "base")
    assert check_against_the_library(tmp_path / "base", LlamaForCausalLM) == {"lm_head.weight"}


def test_files_of_pytorch(tmp_path):
    model = make_llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert check_against_the_library(tmp_path, LlamaForCausalLM) == set()


def test_several_tensors_at_once(tmp_path):
    model = make_llama()
    model.save_pretrained(tmp_path)
    names = [f"model.layers.1.mlp.{projection}_proj.weight" for projection in ("down", "gate", "up")]
    with DenseCheckpoint.open(tmp_path, LlamaForCausalLM) as checkpoint:
        assert list(checkpoint.read(names)) == names


def test_the_progress_bar_is_restored(tmp_path):
    make_llama().save_pretrained(tmp_path)
    enabled = logging.is_progress_bar_enabled()
    with DenseCheckpoint.open(tmp_path, LlamaForCausalLM) as checkpoint:
        for wanted in (True, False):
            (logging.enable_progress_bar if wanted else logging.disable_progress_bar)()
            checkpoint.read(["model.norm.weight"])
            assert logging.is_progress_bar_enabled() == wanted
    (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()


def change(folder, **tensors):
    """Saves a small Llama with other tensors. `None` removes one."""
    make_llama().save_pretrained(folder)
    state = load_file(folder / "model.safetensors") | {name.replace("__", "."): t for name, t in tensors.items()}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model__extra__weight": torch.zeros(2)}, r"^LlamaForCausalLM has no place for model\.extra\.weight\. Load"),
        (
            {f"model__extra__{number}": torch.zeros(2) for number in range(8)},
            r"no place for model\.extra\.0, .*, model\.extra\.5 and 2 more\.",
        ),
        (
            {"lm_head__weight": None},
            r"^the checkpoint lacks lm_head\.weight\. Load it with `from_pretrained`, and read",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_model(tensors, message, tmp_path):
    change(tmp_path, **tensors)
    with pytest.raises(UpcyclingError, match=message), DenseCheckpoint.open(tmp_path, LlamaForCausalLM):
        pass


def test_tensors_that_the_library_ignores(tmp_path):
    change(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4))
    assert check_against_the_library(tmp_path, LlamaForCausalLM) == set()


def test_a_tensor_of_another_shape(tmp_path):
    change(tmp_path, model__norm__weight=torch.zeros(3))
    message = r"model\.norm\.weight has the shape \[3\] in the checkpoint, but \[32\] according to its"
    with (
        pytest.raises(UpcyclingError, match=message),
        DenseCheckpoint.open(tmp_path, LlamaForCausalLM) as checkpoint,
    ):
        checkpoint.read(["model.norm.weight"])


def test_a_damaged_file(tmp_path):
    make_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OSError, match="is incomplete"), DenseCheckpoint.open(tmp_path, LlamaForCausalLM):
        pass


def test_the_class_of_a_configuration(tmp_path):
    llama = make_llama()
    assert model_class_of(llama.config) is LlamaForCausalLM
    llama.model.save_pretrained(tmp_path)
    assert model_class_of(AutoConfig.from_pretrained(tmp_path)) is LlamaModel
    assert model_class_of(make_llava().config) is type(make_llava())
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == ["LlamaModel"]
