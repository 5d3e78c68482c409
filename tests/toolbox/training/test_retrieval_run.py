"""Runs of recipes with `task: retrieval`."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoProcessor

from modeling_sparse_moe_vlm import SparseMoeVlmForImageTextRetrieval
from modeling_sparse_moe_vlm.toolbox.commands.main import main
from modeling_sparse_moe_vlm.toolbox.data import load_pairs
from modeling_sparse_moe_vlm.toolbox.demo import scene_pairs, scenes
from modeling_sparse_moe_vlm.toolbox.evaluation import evaluate_retrieval
from modeling_sparse_moe_vlm.toolbox.expert_lora.recipes import load_lora_recipe
from modeling_sparse_moe_vlm.toolbox.shipped_files import shipped_presets
from modeling_sparse_moe_vlm.toolbox.training import RetrievalMetrics
from modeling_sparse_moe_vlm.toolbox.training.recipes import load_recipe
from tests.support.processors import make_image, make_processor, make_speaking_model

SMALL = ["--set", "data.num_train=44", "--set", "data.num_heldout=11", "--set", "training.max_steps=2"]
SMALL += ["--set", "training.per_device_train_batch_size=4", "--set", "training.use_cpu=true"]


def test_the_recipe_on_built_in_scenes(tmp_path, capsys):
    main(["train", "--recipe", "retrieval", "--output-dir", str(tmp_path), *SMALL])
    model = AutoModel.from_pretrained(tmp_path / "model")
    assert type(model) is SparseMoeVlmForImageTextRetrieval
    assert model.config.trained_sizes == [32, 128]
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert recipe["task"] == "retrieval"
    assert recipe["retrieval"]["pooling"] == "last_token"
    test = scenes("test", 11, grid=(2, 2), cell_size=16, vocabulary=recipe["data"]["vocabulary"])
    assert metrics["eval"] == pytest.approx(evaluate_retrieval(model, processor, scene_pairs(test)))
    printed = capsys.readouterr().out
    assert "image_to_text/recall@1" in printed
    assert f'SentenceTransformer("{tmp_path / "model"}", trust_remote_code=True)' in printed
    assert "image-text retrieval" in (tmp_path / "model" / "README.md").read_text()


def write_data(folder) -> None:
    for seed in range(3):
        make_image(seed).save(folder / f"{seed}.png")
    rows = [{"image": f"{seed}.png", "captions": [f"the cat {seed}", f"mat {seed}"]} for seed in range(3)]
    rows[0]["negatives"] = ["wrong", {"image": "2.png"}]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows.append({"image": "none.png", "caption": "sat"})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_own_pairs_and_a_trained_model(tmp_path, capsys):
    write_data(tmp_path)
    make_speaking_model().save_pretrained(tmp_path / "start")
    make_processor().save_pretrained(tmp_path / "start")
    options = [
        "--data",
        str(tmp_path / "train.jsonl"),
        "--eval-data",
        str(tmp_path / "test.jsonl"),
        "--on-bad-row",
        "skip",
    ]
    options += ["--model", str(tmp_path / "start"), "--recipe", "retrieval", "--output-dir", str(tmp_path / "run")]
    options += ["--set", "training.max_steps=2", "--set", "training.use_cpu=true", "--set", "retrieval.pooling=mean"]
    main(["train", *options, "--set", "retrieval.matryoshka_dims=[8]"])
    model = AutoModel.from_pretrained(tmp_path / "run/model")
    assert model.config.pooling == "mean"
    assert model.config.trained_sizes == [8, 32]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    expected = evaluate_retrieval(model, make_processor(), load_pairs(tmp_path / "test.jsonl"))
    assert metrics["eval"] == pytest.approx(expected)
    results = ModelCard.load(tmp_path / "run/model/README.md").data.eval_results
    assert {(r.task_type, r.dataset_name, r.dataset_split, r.metric_type, r.metric_value) for r in results} == {
        ("image-text-retrieval", "test", None, name, round(value, 2)) for name, value in expected.items()
    }
    assert "Skipped bad rows: 1 (1 × missing file)" in capsys.readouterr().out
    # A retrieval model is trained further.
    again = ["--model", str(tmp_path / "run/model"), "--output-dir", str(tmp_path / "again")]
    main(["train", *options, *again, "--set", "retrieval.matryoshka_dims=null"])
    assert AutoModel.from_pretrained(tmp_path / "again/model").config.trained_sizes == [8, 32]


def test_recall_stops_the_training_early(tmp_path, capsys):
    """The first evaluation is the best one, because the model hardly changes. `--task` chooses the recipe."""
    write_data(tmp_path)
    make_speaking_model().save_pretrained(tmp_path / "start")
    make_processor().save_pretrained(tmp_path / "start")
    values = {
        "max_steps": 9,
        "learning_rate": 1e-9,
        "use_cpu": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "metric_for_best_model": "image_to_text/median_rank",
        "greater_is_better": False,
    }
    command = [
        "train",
        "--task",
        "retrieval",
        "--model",
        str(tmp_path / "start"),
        "--output-dir",
        str(tmp_path / "run"),
    ]
    command += ["--data", str(tmp_path / "train.jsonl"), "--on-bad-row", "skip"]
    command += ["--eval-data", str(tmp_path / "test.jsonl")]
    command += [f"--set=training.{name}={value}" for name, value in values.items()]
    main([*command, "--set", "evaluation={early_stopping_patience: 2, sample: 2, batch_size: 1}"])
    state = json.loads((tmp_path / "run/checkpoints/checkpoint-3/trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2, 3]
    assert not (tmp_path / "run/checkpoints/checkpoint-4").exists()
    rows = load_pairs(tmp_path / "test.jsonl")
    model = AutoModel.from_pretrained(tmp_path / "run/model")
    sample = RetrievalMetrics(make_processor(), rows, num_samples=2).sample
    expected = evaluate_retrieval(model, make_processor(), rows.select(sample))
    assert {name: evaluations[-1][f"eval_{name}"] for name in expected} == pytest.approx(expected)
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["retrieval"]["matryoshka_dims"] == [32]

    for change, message in (
        (["training.greater_is_better=true"], "the best model has the smallest 'image_to_text/median_rank'"),
        (
            ["training.eval_strategy=no", "evaluation.sample=2"],
            "`evaluation.sample` only has an effect with evaluation",
        ),
        (["evaluation.batch_size=0"], "`evaluation.batch_size` must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            main([*command, *(f"--set={value}" for value in change)])
        assert message in capsys.readouterr().err


def test_built_in_scenes_are_evaluated_during_training(tmp_path, capsys):
    options = [*SMALL, "--set", "training.eval_strategy=steps", "--set", "training.eval_steps=2"]
    main(
        [
            "train",
            "--task",
            "retrieval",
            "--output-dir",
            str(tmp_path),
            *options,
            "--set",
            "training.save_strategy=steps",
        ]
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    state = json.loads((tmp_path / "checkpoints/checkpoint-2/trainer_state.json").read_text())
    (entry,) = (entry for entry in state["log_history"] if "eval_loss" in entry)
    assert {name: entry[f"eval_{name}"] for name in metrics["eval"]} == pytest.approx(metrics["eval"])
    with pytest.raises(SystemExit):
        main(["train", "--task", "retrieval", "--output-dir", str(tmp_path), *SMALL, "--set", "evaluation.sample=2"])
    assert "`evaluation.sample` only has an effect with evaluation" in capsys.readouterr().err


def test_mistakes_in_recipes(tmp_path, capsys):
    write_data(tmp_path)
    recipe = shipped_presets("training")["retrieval"]
    with pytest.raises(ValueError, match="the section `retrieval` only has an effect with `task: retrieval`"):
        load_recipe(recipe, ["task=vqa"])
    with pytest.raises(ValueError, match=r"`retrieval` of .* has keys .'pool'."):
        load_recipe(recipe, ["retrieval.pool=mean"])
    with pytest.raises(ValueError, match=r"`task` must be one of vqa, .*, retrieval, but got 'search'"):
        load_recipe(recipe, ["task=search"])
    lora = next(iter(shipped_presets("lora").values()))
    with pytest.raises(ValueError, match="`task: retrieval` is only for `sparse-moe-vlm train`"):
        load_lora_recipe(lora, ["task=retrieval"])
    command = ["train", "--recipe", "retrieval", "--data", str(tmp_path / "test.jsonl"), "--output-dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        main([*command, "--set", "data.max_length=20"])
    assert "`data` has ['max_length'], which `task: retrieval` does not support" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--set", "evaluation.max_new_tokens=20"])
    assert "`evaluation` has ['max_new_tokens'], but `task: retrieval` only has `batch_size`" in capsys.readouterr().err
