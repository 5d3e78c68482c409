"""Stages of `sparse-moe-vlm lora`: they train the same adapters one after the other, and resume."""

import itertools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from modeling_sparse_moe_vlm.toolbox.expert_lora.recipe_run import LoraRun
from modeling_sparse_moe_vlm.toolbox.expert_lora.recipes import load_lora_recipe
from tests.support.own_data import write_own_data
from tests.support.processors import make_processor, make_speaking_model

RECIPE = """
lora: {{r: 2, attention: true, lora_dropout: 0.1}}
data: {{train: {data}/0.jsonl, on_bad_row: skip}}
training:
  max_steps: 2
  per_device_train_batch_size: 2
  learning_rate: 1.0e-2
  logging_steps: 1
  save_strategy: steps
  save_steps: 1
  report_to: none
  use_cpu: true
  disable_tqdm: true
stages:
- {{name: attention, parts: {{attention: train, rest: freeze}}}}
- {{name: experts, parts: {{experts: 5e-3, rest: freeze}}, training: {{max_steps: 3}}, data: {{train: {data}/1.jsonl}}}}
- {{name: all, training: {{max_steps: 1}}}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    data = write_own_data(folder, bad=(5,))
    make_speaking_model(expert_groups="isolated").save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    path = folder / "recipe.yaml"
    path.write_text(f"model: {folder}/model" + RECIPE.format(data=data))
    return path


def run(recipe: Path, folder: Path, resume: bool = False, overrides: Sequence[str] = ()) -> LoraRun:
    lora = LoraRun(load_lora_recipe(recipe, overrides), folder, resume)
    lora.print_size()
    assert lora.train()
    return lora


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_stages_train_their_parts(recipe, tmp_path, capsys):
    output = tmp_path / "run"
    lora = run(recipe, output)
    printed = capsys.readouterr().out
    titles = ["attention:", "experts:", "all:", "attention (1 of 3)", "experts (2 of 3)", "all (3 of 3)"]
    assert re.findall(r"^Stage (.*)$", printed, re.MULTILINE) == titles

    states = [weights(output / name) for name in ("stages/attention", "stages/experts", "adapter")]
    is_attention = {name: "self_attn" in name for name in states[0]}
    moved = {name for name, tensor in states[0].items() if "lora_B" in name and tensor.any()}
    assert moved == {name for name in states[0] if "lora_B" in name and is_attention[name]}
    changed = [
        {name for name in before if not torch.equal(before[name], after[name])}
        for before, after in itertools.pairwise(states)
    ]
    assert changed[0]
    assert not any(is_attention[name] for name in changed[0])
    assert any(is_attention[name] for name in changed[1])
    assert not all(is_attention[name] for name in changed[1])

    sizes = [sum(tensor.numel() for name, tensor in states[0].items() if is_attention[name] == own) for own in (1, 0)]
    metrics = lora.metrics["stages"]
    assert [(name, own["steps"], own["num_trained_parameters"]) for name, own in metrics.items()] == [
        ("attention", 2, sizes[0]),
        ("experts", 3, sizes[1]),
        ("all", 1, sum(sizes)),
    ]

    # The resolved recipe gives the same result.
    assert load_lora_recipe(output / "recipe.yaml") == lora.recipe


@pytest.mark.extensive
def test_a_stopped_run_resumes_in_its_stage(recipe, tmp_path, capsys):
    output = tmp_path / "run"
    run(recipe, output)
    expected = weights(output / "adapter")
    capsys.readouterr()
    for kept in ("checkpoint-1", None):
        # The run was killed in the second stage: after its first step, or before its first checkpoint.
        stopped = tmp_path / f"stopped-{kept}"
        shutil.copytree(output, stopped)
        for path in (stopped / "adapter", stopped / "checkpoints/all", stopped / "stages/experts"):
            shutil.rmtree(path)
        for path in (stopped / "checkpoints/experts").iterdir():
            if path.name != kept:
                shutil.rmtree(path)
        run(recipe, stopped, resume=True)
        printed = capsys.readouterr().out
        where = "its start" if kept is None else str(stopped / "checkpoints/experts/checkpoint-1")
        assert f"The training resumes in the stage experts from {where}." in printed
        assert "Stage attention (1 of 3)" not in printed
        for name, tensor in weights(stopped / "adapter").items():
            assert torch.equal(tensor, expected[name]), name


def test_the_connector_trains_in_full_beside_adapters(recipe, tmp_path):
    """In every stage, at its own learning rate, also when the run resumes. The adapter loads onto the base, merges."""
    base = AutoModelForImageTextToText.from_pretrained(recipe.parent / "model").eval()
    connector = {name: tensor.clone() for name, tensor in base.state_dict().items() if "multi_modal_projector" in name}
    overrides = [
        "lora.connector=true",
        "stages=[{name: connector, parts: {connector: 1e-2, rest: freeze}}, {name: all, parts: {connector: 1e-3}}]",
    ]
    output = tmp_path / "run"
    lora = run(recipe, output, overrides=overrides)
    of_stage, saved = weights(output / "stages/connector"), weights(output / "adapter")
    names = {name: f"base_model.model.{name}" for name in connector}
    assert set(names.values()) <= saved.keys()
    for name, key in names.items():
        assert not torch.equal(of_stage[key], connector[name])
        assert not torch.equal(of_stage[key], saved[key])
    assert not any(tensor.any() for name, tensor in of_stage.items() if "lora_B" in name)
    sizes = [own["num_trained_parameters"] for own in lora.metrics["stages"].values()]
    assert sizes == [sum(map(torch.numel, connector.values())), sum(map(torch.numel, saved.values()))]

    expected = {name: tensor.clone() for name, tensor in saved.items()}
    for path in (output / "adapter", output / "checkpoints/all/checkpoint-2"):
        shutil.rmtree(path)
    run(recipe, output, resume=True, overrides=overrides)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(output / "adapter").items())

    row = lora.own.train[0]
    batch = lora.collator([row])
    with torch.no_grad():
        before = base(**batch).logits
        trained = lora.model.eval().cpu()(**batch).logits
        with lora.model.disable_adapter():
            torch.testing.assert_close(lora.model(**batch).logits, before)
        loaded = PeftModel.from_pretrained(base, output / "adapter").eval()
        torch.testing.assert_close(loaded(**batch).logits, trained)
        assert (trained - before).abs().max() > 1e-3
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, trained, rtol=1e-4, atol=1e-5)
    for name, key in names.items():
        assert torch.equal(merged.state_dict()[name], expected[key])


def test_mistakes_in_stages_are_named(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"has keys \['lora'\]; known ones are name, training, data, parts"):
        load_lora_recipe(recipe, ["stages.all.lora={r: 3}"])
    wrong = load_lora_recipe(recipe, ["stages.0.parts={connector: train, rest: freeze}"])
    with pytest.raises(
        ValueError,
        match=r"`parts.connector` .* frozen already. In a model with adapters, .* `lora.connector=true` .*stage .a",
    ):
        LoraRun(wrong, tmp_path)
