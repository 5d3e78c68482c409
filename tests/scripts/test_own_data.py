"""`train` and `lora` on own data, from the options to the evaluated model."""

import json
import shlex

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from modeling_sparse_moe_vlm.toolbox.commands.main import main
from modeling_sparse_moe_vlm.toolbox.expert_lora.recipes import load_lora_recipe
from modeling_sparse_moe_vlm.toolbox.shipped_files import find_preset
from modeling_sparse_moe_vlm.toolbox.training.recipes import load_recipe
from tests.support.processors import make_processor, make_speaking_model
from tests.toolbox.data.data_files import GREEN, RED, write_image, write_lines

SMALL = {
    "training.max_steps": 2,
    "training.per_device_train_batch_size": 2,
    "training.use_cpu": "true",
    "training.logging_steps": 1,
    "training.save_strategy": "steps",
    "training.save_steps": 1,
    "training.disable_tqdm": "true",
    "evaluation.max_new_tokens": 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_image(folder / "images/red.png", (16, 16), RED)
    write_image(folder / "images/green.png", (16, 16), GREEN)
    rows = [{"image": f"{color}.png", "question": "a cat's color?", "answer": color} for color in ("red", "green")]
    write_lines(folder / "train.jsonl", [*rows * 3, {"image": "gone.png", "question": "a", "answer": "b"}])
    write_lines(folder / "test.jsonl", [*rows, {"question": "the", "answers": ["cat", "mat", "cat"]}])
    make_speaking_model().save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    return folder


def arguments(folder, *others: str) -> list[str]:
    options = ["--model", folder / "model", "--data", folder / "train.jsonl", "--eval-data", folder / "test.jsonl"]
    options += ["--image-root", folder / "images", "--on-bad-row", "skip"]
    return [*map(str, options), *(f"--set={key}={value}" for key, value in SMALL.items()), *others]


def test_train(folder, run_verb, tmp_path):
    output = tmp_path / "output"
    printed = run_verb("train", *arguments(folder, "--output-dir", output))
    recipe = load_recipe(output / "recipe.yaml")
    shipped = load_recipe(find_preset("finetune", "training"))
    assert recipe.data == {
        "train": str(folder / "train.jsonl"),
        "eval": str(folder / "test.jsonl"),
        "image_root": str(folder / "images"),
        "on_bad_row": "skip",
    }
    assert recipe.model == str(folder / "model")
    assert recipe.evaluation == {"batch_size": 16, "max_new_tokens": 3}
    assert recipe.training["learning_rate"] == shipped.training["learning_rate"] == 2e-5

    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics) == {"training_seconds", "eval"}
    assert list(metrics["eval"]) == ["vqa_accuracy", "exact_match"]
    entries = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in entries] == [0, 1, 2]
    assert [entry["source"] for entry in entries] == [str(folder / "test.jsonl")] * 3
    assert [entry["references"] for entry in entries] == [["red"], ["green"], ["cat", "mat", "cat"]]
    right = sum(entry["prediction"] in entry["references"] for entry in entries)
    assert metrics["eval"]["exact_match"] == pytest.approx(100 * right / 3, abs=34)
    assert f"Scores on 3 rows for evaluation:\nvqa_accuracy        {metrics['eval']['vqa_accuracy']:>8.2f}\n" in printed
    assert yaml.safe_load(ModelCard.load(output / "model/README.md").text.split("```yaml\n")[1].split("```")[0])

    results = ModelCard.load(output / "model/README.md").data.eval_results
    assert {(result.dataset_name, result.task_type, result.metric_type, result.metric_value) for result in results} == {
        ("test", "visual-question-answering", name, round(value, 2)) for name, value in metrics["eval"].items()
    }

    (command,) = (line.strip() for line in printed.splitlines() if line.strip().startswith("sparse-moe-vlm generate"))
    verb = shlex.split(command)
    assert verb[1:] == [
        *("generate", "--model", str(output / "model"), "--image", str(output / "example.png")),
        *("--question", "a cat's color?"),
    ]
    assert Image.open(output / "example.png").getpixel((0, 0)) == RED
    assert run_verb(*verb[1:], "--max-new-tokens", "2")
    assert printed.endswith(
        f"Skipped bad rows: 1 (1 × missing file). They are listed in {output}/skipped_rows.jsonl.\n"
    )
    program = printed.split("without this package:\n")[1].split("Skipped bad")[0]
    names: dict = {}
    exec("\n".join(line.removeprefix("    ") for line in program.splitlines()), names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_options_override_the_data_of_a_recipe(folder, tmp_path, run_verb):
    """Limits and policies of the recipe stay. Values of `--set` come last."""
    own = tmp_path / "recipe.yaml"
    own.write_text("model: m\ndata: {train: a, eval: b, format: llava, max_length: 90}\ntraining: {max_steps: 1}")
    options = ["--recipe", str(own), "--task", "captioning", "--set=data.max_image_tokens=8", "--set=task=chat"]
    printed = run_verb("train", *arguments(folder, *options, "--output-dir", str(tmp_path / "o"), "--json"))
    assert list(json.loads(printed)["eval"]) == ["exact_match", "rouge_l"]
    recipe = load_recipe(tmp_path / "o/recipe.yaml")
    assert recipe.data["max_length"] == 90
    assert recipe.data["max_image_tokens"] == 8
    assert "format" not in recipe.data
    assert recipe.task == "chat"


def test_lora(folder, run_verb, tmp_path):
    output = tmp_path / "output"
    parts = "--set=parts.attention=freeze"
    printed = run_verb("lora", *arguments(folder, "--output-dir", output, "--task", "chat", parts))
    metrics = json.loads((output / "metrics.json").read_text())
    assert {name: list(values) for name, values in metrics["eval"].items()} == {
        "exact_match": ["before", "after"],
        "rouge_l": ["before", "after"],
    }
    adapter = load_file(output / "adapter/adapter_model.safetensors")
    moved = {name: bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name}
    assert not any(moved[name] for name in moved if "self_attn" in name), "attention is frozen"
    assert any(moved[name] for name in moved if "experts" in name)
    sizes = sum(tensor.numel() for name, tensor in adapter.items() if "self_attn" not in name)
    assert metrics["num_trained_parameters"] == sizes
    assert f"Trains {sizes:,} parameters" in printed
    assert any(line.startswith("attention") and line.endswith("frozen") for line in printed.splitlines())
    assert printed.endswith(
        f"Skipped bad rows: 1 (1 × missing file). They are listed in {output}/skipped_rows.jsonl.\n"
    )
    recipe = load_lora_recipe(output / "recipe.yaml")
    assert recipe.parts == {"attention": "freeze"}
    assert recipe.lora == load_lora_recipe(find_preset("finetune", "lora")).lora

    again = tmp_path / "again"
    run_verb("lora", "--recipe", output / "recipe.yaml", "--output-dir", again)
    other = load_file(again / "adapter/adapter_model.safetensors")
    assert all((tensor == other[name]).all() for name, tensor in adapter.items())


@pytest.mark.parametrize("verb", ["train", "lora"])
def test_mistakes_are_reported_in_one_line(verb, folder, tmp_path, capsys):
    for changes, message in (
        (["--set=evaluation.metrics=[bleurt]"], "there is no metric 'bleurt'"),
        (["--set=data.train=gone.jsonl"], "there is no file or folder 'gone.jsonl'"),
        (["--set=data.num_train=5"], "`data` of the recipe"),
        (["--set=data.on_bad_row=error"], f"{folder}/train.jsonl, row 6: images[0]: there is no file"),
        (["--set=evaluation.batch_size=x"], "`evaluation.batch_size` must be a whole number, got x"),
    ):
        with pytest.raises(SystemExit) as error:
            main([verb, *arguments(folder, "--output-dir", str(tmp_path), *changes)])
        assert error.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ")
        assert message in last
    with pytest.raises(SystemExit):
        main([verb, "--task", "vqa"])
    assert capsys.readouterr().err == "error: `--task` only has an effect with `--data DATA`.\n"


def test_evaluate_names_recipes_with_own_data(folder, tmp_path, capsys):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("model: m\ndata: {train: a.jsonl}")
    with pytest.raises(SystemExit):
        main(["evaluate", "--model", str(folder / "model"), "--recipe", str(recipe)])
    assert f"error: the recipe {recipe} has own data" in capsys.readouterr().err
