"""Small runs of train.py, from the recipe to the complete output folder."""

import json
import shlex
import shutil
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from modeling_sparse_moe_vlm.processing_sparse_moe_vlm import DEFAULT_CHAT_TEMPLATE
from modeling_sparse_moe_vlm.toolbox import report
from modeling_sparse_moe_vlm.toolbox.demo import scenes, train_tokenizer
from modeling_sparse_moe_vlm.toolbox.shipped_files import find_preset
from modeling_sparse_moe_vlm.toolbox.training import model_parts, recipe_run
from modeling_sparse_moe_vlm.toolbox.training.recipes import load_recipe
from modeling_sparse_moe_vlm.toolbox.upcycling import upcycle
from tests.scripts.conftest import run_in_two_processes, run_train, train_arguments
from tests.support.small_run import SMALL_RUN


def history(output_dir, step: int) -> list[dict]:
    """Returns the losses of the steps up to a checkpoint."""
    state = json.loads((output_dir / f"checkpoints/checkpoint-{step}/trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def test_a_run_writes_model_metrics_card_and_figures(trained):
    output_dir, printed = trained
    assert AutoModelForImageTextToText.from_pretrained(output_dir / "model").num_parameters() > 1e6
    metrics = json.loads((output_dir / "metrics.json").read_text())
    assert set(metrics) == {"training_seconds", "test", "test_style"}
    assert set(metrics["test"]["overall"]) == {"model", "blind", "most_frequent_answer"}
    assert (output_dir / "answers.png").stat().st_size > 5000
    assert (output_dir / "expert_load.png").stat().st_size > 5000
    assert "active per image token" in printed
    assert "are resized" not in printed

    card = ModelCard.load(output_dir / "model/README.md")
    assert [result.dataset_split for result in card.data.eval_results] == ["test", "test_style"]
    titles = {
        "answers.png": "Answers to held-out questions",
        "expert_load.png": "Load of the experts by layer and modality",
    }
    for name, title in titles.items():
        assert card.text.count(f"![{title}]({name})\n\n") == 1
        assert (output_dir / "model" / name).read_bytes() == (output_dir / name).read_bytes()
    assert card.text.index("expert_load.png") < card.text.index("## Limits and risks")
    shown = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert shown["training"]["max_steps"] == 2, "the card shows the recipe without what was changed"


def test_a_run_prints_what_trains_and_saves_the_resolved_recipe(trained):
    output_dir, printed = trained
    lines = [line.split() for line in printed.splitlines()]
    assert ["part", "parameters", "train", "learning", "rate"] in lines
    (total,) = (line for line in lines if line[:1] == ["all"])
    assert total[1] == total[2], "nothing is frozen"
    overrides = [f"{key}={value}" for key, value in SMALL_RUN.items()]
    assert load_recipe(output_dir / "recipe.yaml") == load_recipe(find_preset("demo", "training"), overrides)


def test_parts_of_a_recipe_train(trained, tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(recipe_run.TrainingRun, "evaluate", lambda run: {})
    monkeypatch.setattr(recipe_run.TrainingRun, "draw", lambda run: None)
    start, output_dir = trained[0] / "model", tmp_path / "output"
    parts = {"rest": "freeze", "connector": 1e-3, "experts.image": "train"}
    changes = [f"--set=model={start}", *(f"--set=parts.{part}={value}" for part, value in parts.items())]
    printed = run_here("train.py", *train_arguments(output_dir), *changes)
    settings = {line.split()[0]: line.split()[-1] for line in printed.splitlines() if len(line.split()) == 4}
    assert settings["connector"] == "0.001"
    assert settings["experts.image"] == "0.002"
    assert settings["attention"] == "frozen"
    assert load_recipe(output_dir / "recipe.yaml").parts == {
        "rest": "freeze",
        "connector": 0.001,
        "experts": {"image": "train"},
    }
    before, after = (AutoModelForImageTextToText.from_pretrained(path) for path in (start, output_dir / "model"))
    changed = {name for name, own in after.named_parameters() if not torch.equal(own, before.get_parameter(name))}
    by_part = model_parts(after)
    assert changed == {*by_part["connector"], *by_part["experts.image"]}


def test_the_printed_question_is_about_the_printed_image(trained):
    output_dir, printed = trained
    (command,) = (line.strip() for line in printed.splitlines() if line.strip().startswith("sparse-moe-vlm generate"))
    verb, *arguments = shlex.split(command)[1:]
    values = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert verb == "generate"
    assert values["--model"] == str(output_dir / "model")
    assert values["--image"] == str(output_dir / "scene.png")
    data = scenes("test", 1, cell_size=16)[0]
    assert values["--question"] == data["question"]
    assert Image.open(values["--image"]).tobytes() == data["image"].tobytes()


def test_an_interrupted_run_resumes(trained, tmp_path):
    output_dir = tmp_path / "output"
    shutil.copytree(trained[0] / "checkpoints", output_dir / "checkpoints")
    before = history(output_dir, 2)
    result = run_train(tmp_path, "--resume", *train_arguments(output_dir, max_steps=3, save_steps=3))
    assert result.returncode == 0, result.stderr
    after = history(output_dir, 3)
    assert [entry["step"] for entry in after] == [1, 2, 3]
    assert after[:2] == before
    assert (output_dir / "model/config.json").exists()


@pytest.mark.extensive
@pytest.mark.slow
def test_two_processes_with_half_a_model_each_save_one_model(tmp_path):
    output_dir = tmp_path / "output"
    result = run_in_two_processes(tmp_path, "fsdp2.yaml", "train.py", *train_arguments(output_dir))
    assert result.returncode == 0, result.stderr[-8000:]
    for printed in ("active per image token", "held-out arrangements:", "drawing style (never", "Wrote the model"):
        assert result.stdout.count(printed) == 1, printed
    assert result.stdout.count("'loss':") == 2
    assert result.stderr.count("Drawing train scenes:   0%") == 1

    checkpoint = output_dir / "checkpoints/checkpoint-2"
    assert (checkpoint / "optimizer.bin").exists(), "nothing was sharded"
    assert history(output_dir, 2)[-1]["epoch"] == pytest.approx(1 / 3), "2 steps of 2 times 4 of the 44 rows"
    assert {path.name for path in output_dir.iterdir()} == {
        "checkpoints",
        "model",
        "recipe.yaml",
        "metrics.json",
        "scene.png",
        "answers.png",
        "expert_load.png",
    }
    assert set(json.loads((output_dir / "metrics.json").read_text())) == {"training_seconds", "test", "test_style"}
    model, saved = (AutoModelForImageTextToText.from_pretrained(path) for path in (output_dir / "model", checkpoint))
    for (name, tensor), other in zip(model.state_dict().items(), saved.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert not (output_dir / "model/training_args.bin").exists()


@pytest.mark.extensive
@pytest.mark.slow
def test_two_processes_resume_and_report_a_failure_in_the_first(trained, tmp_path):
    output_dir = tmp_path / "output"
    shutil.copytree(trained[0] / "checkpoints", output_dir / "checkpoints")
    (output_dir / "answers.png").mkdir()
    before = history(output_dir, 2)
    arguments = train_arguments(output_dir, max_steps=3, save_steps=3)
    result = run_in_two_processes(tmp_path, "ddp.yaml", "train.py", "--resume", *arguments)
    assert result.returncode != 0
    assert "Is a directory" in result.stderr
    after = history(output_dir, 3)
    assert [entry["step"] for entry in after] == [1, 2, 3]
    assert after[:2] == before
    assert (output_dir / "model/config.json").exists()
    assert (output_dir / "metrics.json").exists()


def test_a_failing_figure_loses_no_results(run_here, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no figure today")

    monkeypatch.setattr(report, "draw_answers", fail)
    with pytest.raises(RuntimeError, match="no figure today"):
        run_here("train.py", *train_arguments(tmp_path, max_steps=1))
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "model").num_parameters() > 1e6
    assert (tmp_path / "metrics.json").exists()
    assert (tmp_path / "model/README.md").exists()


def test_without_matplotlib_there_are_no_figures(run_here, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not hasattr(recipe_run, "drawings"), "importing it would fail"
    printed = run_here("train.py", *train_arguments(tmp_path, max_steps=1))
    assert (
        "Drawing `answers.png` and `expert_load.png` needs matplotlib: pip install 'sparse-moe-vlm[report]'." in printed
    )
    assert "Ask the model about an image" in printed
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["scene.png"]
    assert (tmp_path / "model/config.json").exists()


@pytest.mark.parametrize("is_upcycled", [False, True])
def test_models_of_other_classes_train_too(is_upcycled, run_here, tmp_path):
    tokenizer = train_tokenizer(["Can you see the cat?"], vocab_size=270)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=3,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=1)
    model = LlavaForConditionalGeneration(config)
    if is_upcycled:
        model = upcycle(model, "joint", num_experts=2)
    model.save_pretrained(tmp_path / "llava")
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=DEFAULT_CHAT_TEMPLATE,
    ).save_pretrained(tmp_path / "llava")

    output_dir = tmp_path / "output"
    printed = run_here(
        "train.py", *train_arguments(output_dir, max_steps=1), f"--set=model={tmp_path / 'llava'}", "--set=tokenizer={}"
    )
    assert ("LlavaForConditionalGeneration with" in printed) == (not is_upcycled)
    assert "images of 32×32 pixels are resized to the 16×16 of the model" in printed
    assert ("`expert_load.png` is not written" in printed) == (not is_upcycled)
    assert (output_dir / "answers.png").exists()
    assert (output_dir / "expert_load.png").exists() == is_upcycled
    trained = AutoModelForImageTextToText.from_pretrained(output_dir / "model", trust_remote_code=is_upcycled)
    assert trained.config.model_type == ("upcycled_llava" if is_upcycled else "llava")

    card = ModelCard.load(output_dir / "model/README.md")
    assert [result.dataset_split for result in card.data.eval_results] == ["test", "test_style"]
    assert card.data.pipeline_tag == "image-text-to-text"
    assert ("by upcycling" in card.text) == is_upcycled
    assert ("Before any training: parity" in card.text) == is_upcycled
    shown = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert shown["training"]["max_steps"] == 1
