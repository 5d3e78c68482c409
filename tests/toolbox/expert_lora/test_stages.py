"""Stages of `sparse-moe-vlm lora`: they train the same adapters one after the other, and resume."""

import itertools
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


def run(recipe: Path, folder: Path, resume: bool = False) -> LoraRun:
    lora = LoraRun(load_lora_recipe(recipe), folder, resume)
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


def test_mistakes_in_stages_are_named(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"has keys \['lora'\]; known ones are name, training, data, parts"):
        load_lora_recipe(recipe, ["stages.all.lora={r: 3}"])
    wrong = load_lora_recipe(recipe, ["stages.0.parts={connector: train, rest: freeze}"])
    with pytest.raises(
        ValueError, match=r"`parts.connector` .* frozen already. In a model with adapters, .*stage 'attention'"
    ):
        LoraRun(wrong, tmp_path)
