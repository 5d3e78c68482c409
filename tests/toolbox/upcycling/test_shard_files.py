"""Checkpoints that are written tensor by tensor are byte-identical to those of the libraries."""

import json

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from modeling_sparse_moe_vlm.toolbox.upcycling.shard_files import _DTYPES, ShardFiles
from tests.support.in_tree_models import make_llava


def tensors_of_all_types():
    torch.manual_seed(0)
    tensors = {f"{number % 3}.ä.{dtype}": (9 * torch.rand(3, 5)).to(dtype) for number, dtype in enumerate(_DTYPES)}
    return tensors | {"number": torch.tensor(7.5), "empty": torch.zeros(0, 4), "z": torch.rand(4, 2).T}


def on_meta(tensors):
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def test_one_file(tmp_path):
    tensors = tensors_of_all_types()
    files = ShardFiles(tmp_path, on_meta(tensors), num_parameters=1)
    for name in reversed(tensors):
        files.write({name: tensors[name]})
    assert files.missing == {}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "expected", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2, "no index of a single file"


@pytest.mark.parametrize("size", ["10KB", 20_000, "50GB"])
def test_a_model(size, tmp_path):
    """The files and the index equal those of `save_pretrained`."""
    model = make_llava()
    model.save_pretrained(tmp_path / "expected", max_shard_size=size)
    tensors = revert_weight_conversion(model, model.state_dict())
    (tmp_path / "written").mkdir()
    files = ShardFiles(tmp_path / "written", on_meta(tensors), model.num_parameters(), size)
    files.write(tensors)
    expected = {path.name for path in (tmp_path / "expected").glob("model*")}
    assert {path.name for path in (tmp_path / "written").iterdir()} == expected
    assert len(expected) == 1 or size != "50GB"
    for name in expected:
        assert (tmp_path / "written" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name


@pytest.mark.parametrize("size", [1000, 2000, 4000])
def test_views_of_one_tensor_are_in_one_file(size, tmp_path):
    """For example, the experts of a stack that are saved one by one."""

    def make(device):
        stack, other = torch.arange(600.0).view(3, 20, 10).to(device), torch.ones(100, device=device)
        return {"a": stack[0], "b": other, "c": stack[1], "d": stack[2], "e": other + 1}

    expected = split_torch_state_dict_into_shards(make("cpu"), max_shard_size=size)
    files = ShardFiles(tmp_path, make("meta"), 800, size)
    files.write(make("cpu"))
    found = {name: path.name for path in tmp_path.glob("*.safetensors") for name in load_file(path)}
    assert found == expected.tensor_to_filename
    assert found["a"] == found["c"] == found["d"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text()) if expected.is_sharded else {}
    assert index.get("metadata", {}).get("total_size", 3200) == 3200 == expected.metadata["total_size"]


def test_missing_tensors(tmp_path):
    files = ShardFiles(tmp_path, on_meta({"a": torch.zeros(2), "b": torch.zeros(3)}), 5)
    files.write({"b": torch.ones(3)})
    assert list(files.missing) == ["a"]


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a", torch.zeros(3), r"expects \[2\] of torch.float32 under the name 'a', got \[3\] of torch.float32"),
        ("a", torch.zeros(2).half(), r"expects \[2\] of torch.float32 under the name 'a', got \[2\] of torch.float16"),
        ("b", torch.zeros(2), r"expects nothing more under the name 'b'"),
    ],
)
def test_tensors_that_do_not_fit(name, tensor, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ShardFiles(tmp_path, on_meta({"a": torch.zeros(2)}), 2).write({name: tensor})


def test_a_tensor_is_written_once(tmp_path):
    files = ShardFiles(tmp_path, on_meta({"a": torch.zeros(2)}), 2)
    files.write({"a": torch.ones(2)})
    with pytest.raises(ValueError, match="expects nothing more under the name 'a'"):
        files.write({"a": torch.ones(2)})
