"""Checkpoints that are upcycled block by block are byte-identical to those of the model that `upcycle` returns."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from modeling_sparse_moe_vlm.toolbox.upcycling import streaming
from modeling_sparse_moe_vlm.toolbox.upcycling.blocks import find_blocks
from modeling_sparse_moe_vlm.toolbox.upcycling.dense_checkpoint import DenseCheckpoint, LoadedModel
from modeling_sparse_moe_vlm.toolbox.upcycling.errors import UpcyclingError
from modeling_sparse_moe_vlm.toolbox.upcycling.upcycle import experts_config, upcycle, with_sparse_blocks
from modeling_sparse_moe_vlm.toolbox.upcycling.written_parity import written_parity
from tests.support.in_tree_models import make_gemma3, make_llava, make_qwen3_vl
from tests.support.models import TINY_DECODER


def make_llama(**fields):
    return LlamaForCausalLM(LlamaConfig(**TINY_DECODER | fields))


def make_tied_llama():
    return make_llama(tie_word_embeddings=True)


def make_phi3():
    """Returns a model whose gate and up projections are one matrix."""
    return Phi3ForCausalLM(Phi3Config(**TINY_DECODER))


MODELS = {
    "llava": make_llava,
    "qwen3_vl": make_qwen3_vl,
    "gemma3": make_gemma3,
    "llama": make_llama,
    "tied_llama": make_tied_llama,
    "phi3": make_phi3,
}
REQUESTS = {
    "hybrid": {},
    "isolated": {"expert_groups": "isolated", "modalities": ["text", "image"]},
    "split": {"expert_groups": "joint", "start": "split", "granularity": 2, "router_bias_update_rate": 1e-3},
    "drop": {"expert_groups": "joint", "start": "drop", "seed": 3},
    "pools": {"expert_groups": "joint", "expert_pool": [0, 0], "pool_start": "mean"},
    "one_layer": {"layers": [1], "expert_groups": "hybrid"},
}
# Every model, and every request.
CASES = [*((name, "hybrid") for name in MODELS), *(("llava", name) for name in REQUESTS if name != "hybrid")]


def plan(model, layers=None, seed=0, **request):
    request = {"modalities": None, "placeholders": None, **request}
    found = find_blocks(model, layers)
    start, config = experts_config(model, found, seed=seed, router_init="random", **request)
    return found, start, with_sparse_blocks(model, found, config)


def save_dense(name, folder, dtype="float32", size="50GB"):
    torch.manual_seed(0)
    model = MODELS[name]().to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=size)
    return type(model)


def stream(folder, model_class, output, size="20KB", seed=0, **request):
    output.mkdir()
    with DenseCheckpoint.open(folder, model_class) as checkpoint:
        found, start, sparse = plan(checkpoint.model, seed=seed, **request)
        errors = streaming.write_sparse_weights(
            checkpoint, sparse, found, start, output, seed=seed, max_shard_size=size
        )
        assert all(tensor.is_meta for tensor in sparse.state_dict().values())
    return errors, found, sparse


def check_files(folder, expected):
    """Checks that the weight files are byte-identical."""
    names = sorted(path.name for path in expected.glob("model*.safetensors*"))
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    return names


@pytest.mark.parametrize(("name", "request_name"), CASES)
def test_the_files_equal_those_of_the_model_in_memory(name, request_name, tmp_path):
    request = REQUESTS[request_name]
    model_class = save_dense(name, tmp_path / "dense", size="9KB")
    model = upcycle(model_class.from_pretrained(tmp_path / "dense"), **request, parity_bound=float("inf"))
    model.save_pretrained(tmp_path / "expected", max_shard_size="20KB")
    errors, _, _ = stream(tmp_path / "dense", model_class, tmp_path / "sparse", **request)
    names = check_files(tmp_path / "sparse", tmp_path / "expected")
    assert len(names) > 4
    assert list(errors) == model.config.experts_config.sparse_layers
    is_exact = request_name not in ("drop", "pools")
    assert all((error <= 1e-6) == is_exact for error in errors.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llava", "tied_llama"])
def test_in_half_precision_and_in_one_file(name, dtype, tmp_path):
    model_class = save_dense(name, tmp_path / "dense", dtype)
    upcycle(model_class.from_pretrained(tmp_path / "dense")).save_pretrained(tmp_path / "expected")
    errors, _, _ = stream(tmp_path / "dense", model_class, tmp_path / "sparse", "50GB")
    assert check_files(tmp_path / "sparse", tmp_path / "expected") == ["model.safetensors"]
    assert set(errors.values()) == {0.0}


def test_a_model_in_memory(tmp_path):
    """Models from GGUF files are read in this way."""
    model_class = save_dense("tied_llama", tmp_path / "dense")
    dense = model_class.from_pretrained(tmp_path / "dense")
    upcycle(dense).save_pretrained(tmp_path / "expected")
    loaded = LoadedModel(dense)
    found, start, sparse = plan(loaded.on_meta())
    (tmp_path / "sparse").mkdir()
    streaming.write_sparse_weights(loaded, sparse, found, start, tmp_path / "sparse")
    check_files(tmp_path / "sparse", tmp_path / "expected")


def change_tied(folder, **changes):
    state = load_file(folder / "model.safetensors")
    embedding = state.pop("model.embed_tokens.weight")
    state |= {name: embedding + value for name, value in changes.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_a_tied_tensor_under_its_other_name(tmp_path):
    model_class = save_dense("tied_llama", tmp_path / "dense")
    stream(tmp_path / "dense", model_class, tmp_path / "expected")
    change_tied(tmp_path / "dense", **{"lm_head.weight": 0})
    stream(tmp_path / "dense", model_class, tmp_path / "sparse")
    check_files(tmp_path / "sparse", tmp_path / "expected")


def test_a_tied_tensor_under_both_names(tmp_path):
    model_class = save_dense("tied_llama", tmp_path / "dense")
    stream(tmp_path / "dense", model_class, tmp_path / "expected")
    change_tied(tmp_path / "dense", **{"lm_head.weight": 0, "model.embed_tokens.weight": 0})
    stream(tmp_path / "dense", model_class, tmp_path / "sparse")
    check_files(tmp_path / "sparse", tmp_path / "expected")
    change_tied(tmp_path / "dense", **{"lm_head.weight": 0, "model.embed_tokens.weight": 1})
    with pytest.raises(
        UpcyclingError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ in the checkpoint"
    ):
        stream(tmp_path / "dense", model_class, tmp_path / "differs")


def test_a_tensor_that_is_never_written(tmp_path, monkeypatch):
    model_class = save_dense("llama", tmp_path / "dense")
    monkeypatch.setattr(streaming._Run, "_write_rest", lambda self: None)
    with pytest.raises(
        UpcyclingError, match=r"the dense checkpoint lacks lm_head\.weight, model\.embed_tokens\.weight"
    ):
        stream(tmp_path / "dense", model_class, tmp_path / "sparse")


# ------------------------------------------------------------------------------------------------ parity of the files


@pytest.mark.parametrize(("name", "request_name"), CASES)
def test_the_receipt_equals_that_of_the_model_in_memory(name, request_name, tmp_path):
    request = REQUESTS[request_name]
    model_class = save_dense(name, tmp_path / "dense")
    dense = model_class.from_pretrained(tmp_path / "dense")
    expected = upcycle(dense, **request, parity_bound=float("inf")).config.experts_config.start["parity"]
    _, found, sparse = stream(tmp_path / "dense", model_class, tmp_path / "sparse", **request)
    seed = request.get("seed", 0)
    receipt = written_parity(dense, sparse, found, tmp_path / "sparse", bound=float("inf"), seed=seed)
    assert receipt.to_dict() == expected


def test_the_receipt_is_computed_from_the_files(tmp_path):
    """A file with other contents is detected."""
    model_class = save_dense("llama", tmp_path / "dense")
    _, found, sparse = stream(tmp_path / "dense", model_class, tmp_path / "sparse", "50GB")
    file = tmp_path / "sparse/model.safetensors"
    state = load_file(file)
    state["model.layers.1.mlp.experts.3.down_proj.weight"] += 1
    save_file(state, file, {"format": "pt"})
    dense = model_class.from_pretrained(tmp_path / "dense")
    assert written_parity(dense, sparse, found, tmp_path / "sparse", bound=1e-5).relative_difference > 1e-2


def test_at_most_one_sparse_block_is_in_memory(tmp_path, monkeypatch):
    model_class = save_dense("llama", tmp_path / "dense")
    _, found, sparse = stream(tmp_path / "dense", model_class, tmp_path / "sparse")
    dense = model_class.from_pretrained(tmp_path / "dense")
    in_memory = []
    read = DenseCheckpoint.read

    def watched(self, names):
        blocks = [dense.get_submodule(block.name) for block in found.blocks]
        if hasattr(blocks[0], "gate"):  # in addition to the tensors that both models share
            in_memory.append([not block.gate.weight.is_meta for block in blocks])
        return read(self, names)

    monkeypatch.setattr(DenseCheckpoint, "read", watched)
    written_parity(dense, sparse, found, tmp_path / "sparse")
    assert {tuple(row) for row in in_memory} == {(False, False), (True, False), (False, True)}
    assert all(tensor.is_meta for block in found.blocks for tensor in dense.get_submodule(block.name).parameters())


def test_a_model_that_does_not_run_on_text_only(tmp_path, monkeypatch):
    model_class = save_dense("llama", tmp_path / "dense")
    _, found, sparse = stream(tmp_path / "dense", model_class, tmp_path / "sparse")
    dense = model_class.from_pretrained(tmp_path / "dense")

    def fail(*args, **kwargs):
        raise ValueError("images are needed")

    monkeypatch.setattr(dense, "forward", fail)
    with pytest.raises(UpcyclingError, match=r"LlamaForCausalLM does not run on text only \(images are needed\)"):
        written_parity(dense, sparse, found, tmp_path / "sparse")
    with pytest.raises(ValueError, match=r"^images are needed$"):
        written_parity(dense, sparse, found, tmp_path / "sparse", batch={"input_ids": torch.ones(1, 2, dtype=int)})


def test_the_index_lists_every_tensor(tmp_path):
    model_class = save_dense("llava", tmp_path / "dense")
    _, _, sparse = stream(tmp_path / "dense", model_class, tmp_path / "sparse")
    index = json.loads((tmp_path / "sparse/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == sparse.num_parameters()
    assert index["metadata"]["total_size"] == 4 * sparse.num_parameters()
