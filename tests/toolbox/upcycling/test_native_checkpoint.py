"""Folders of upcycled models are exported to folders of their twins."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_sparse_moe_vlm.toolbox.upcycling import UpcyclingError, upcycle
from modeling_sparse_moe_vlm.toolbox.upcycling.costs import costs_of
from modeling_sparse_moe_vlm.toolbox.upcycling.native_checkpoint import (
    export_checkpoint,
    is_upcycled_checkpoint,
    plan_export,
)
from tests.support.processors import make_tokenizer
from tests.toolbox.upcycling.native_models import make_dense, make_input_ids, randomize


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    model = randomize(upcycle(make_dense("qwen3"), "joint", num_experts=4))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder, model


@torch.no_grad()
def test_folder_of_a_trained_model(trained, tmp_path, capfd):
    folder, model = trained
    made = export_checkpoint(folder, tmp_path / "twin", max_shard_size="20KB")
    assert is_upcycled_checkpoint(folder)
    assert not is_upcycled_checkpoint(tmp_path / "twin")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "twin")
    input_ids = make_input_ids()
    expected = model(input_ids).logits
    assert (twin(input_ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert len(list((tmp_path / "twin").glob("*.safetensors"))) > 1
    assert not list((tmp_path / "twin").glob("*.py"))
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "twin")("the cat").input_ids == make_tokenizer()("the cat").input_ids
    )
    assert (made.source, made.output) == (str(folder), str(tmp_path / "twin"))
    assert made.model_class == type(twin).__name__ == "Qwen3MoeForCausalLM"
    assert made.dense == costs_of(make_dense("qwen3"))
    assert made.sparse == costs_of(twin)
    assert made.processor == type(AutoTokenizer.from_pretrained(tmp_path / "twin")).__name__
    assert "custom code" not in capfd.readouterr().out  # without a question whether to run it
    assert made.start["name"] == "copy"
    assert not {"parity", "block_error"} & set(made.start)


def test_type_and_folder(trained, tmp_path):
    folder, _ = trained
    export_checkpoint(folder, tmp_path, dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    with pytest.raises(UpcyclingError, match="already contains a model"):
        export_checkpoint(folder, tmp_path)
    export_checkpoint(folder, tmp_path, overwrite=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float32
    with pytest.raises(UpcyclingError, match="`dtype` must be"):
        export_checkpoint(folder, tmp_path, dtype="int8", overwrite=True)


def test_a_plan_equals_the_export(trained, tmp_path):
    folder, _ = trained
    made = export_checkpoint(folder, tmp_path / "twin")
    planned = plan_export(folder)
    assert planned == replace(made, output=None, processor=None)


def test_a_plan_reads_only_biases(tmp_path):
    folder = tmp_path / "sparse"
    sparse = upcycle(make_dense("qwen3"), "joint", num_experts=4, router_bias_update_rate=1e-3)
    biases = [buffer for name, buffer in sparse.named_buffers() if name.endswith("e_score_correction_bias")]
    sparse.save_pretrained(folder)
    assert plan_export(folder).model_class == "Qwen3MoeForCausalLM"
    biases[-1][0, 2] = 1.0
    sparse.save_pretrained(folder)
    for refuse in (plan_export, lambda source: export_checkpoint(source, tmp_path / "twin")):
        with pytest.raises(UpcyclingError, match="qwen3_moe: its routers have no bias"):
            refuse(folder)


def test_a_plan_with_biases_that_differ_between_modalities(tmp_path):
    sparse = upcycle(
        make_dense("qwen3"), "joint", router_bias_update_rate=1e-3, router="sigmoid", modalities=["text", "image"]
    )
    biases = [buffer for name, buffer in sparse.named_buffers() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    biases[0][:, 2] = 1.0
    sparse.save_pretrained(tmp_path)
    assert plan_export(tmp_path).model_class == "Glm4MoeForCausalLM"
    biases[1][1, 0] = 1.0
    sparse.save_pretrained(tmp_path)
    with pytest.raises(UpcyclingError, match="differ between modalities"):
        plan_export(tmp_path)


def test_exports_are_refused_before_weights_are_read(tmp_path):
    upcycle(make_dense("qwen3")).save_pretrained(tmp_path / "hybrid")
    (tmp_path / "hybrid/model.safetensors").unlink()
    with pytest.raises(UpcyclingError, match="qwen3_moe: it has no always-on experts"):
        export_checkpoint(tmp_path / "hybrid", tmp_path / "twin")
    with pytest.raises(UpcyclingError, match="qwen3_moe: it has no always-on experts"):
        plan_export(tmp_path / "hybrid")


def test_nothing_is_written_without_a_twin(tmp_path):
    upcycle(make_dense("qwen3")).save_pretrained(tmp_path / "hybrid")
    with pytest.raises(UpcyclingError, match="qwen3_moe: it has no always-on experts"):
        export_checkpoint(tmp_path / "hybrid", tmp_path / "twin")
    make_dense("qwen3").save_pretrained(tmp_path / "dense")
    with pytest.raises(UpcyclingError, match="dense is not an upcycled model"):
        export_checkpoint(tmp_path / "dense", tmp_path / "twin")
    assert not (tmp_path / "twin").exists()
