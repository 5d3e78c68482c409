"""Metrics of tasks, and texts and images for models from scratch."""

from inspect import signature

import pytest
from datasets import Dataset, IterableDataset

from modeling_sparse_moe_vlm.toolbox.evaluation import evaluate_rows
from modeling_sparse_moe_vlm.toolbox.expert_lora.recipes import load_lora_recipe
from modeling_sparse_moe_vlm.toolbox.shipped_files import find_preset
from modeling_sparse_moe_vlm.toolbox.training import examples
from modeling_sparse_moe_vlm.toolbox.training.examples import first_rows, images_of, texts_of
from modeling_sparse_moe_vlm.toolbox.training.own_data import check_own_data, has_evaluation
from modeling_sparse_moe_vlm.toolbox.training.own_evaluation import check_task, metrics_of, score_lines
from modeling_sparse_moe_vlm.toolbox.training.recipes import load_recipe
from modeling_sparse_moe_vlm.toolbox.training.stages import Stage, stages_of
from tests.toolbox.data.data_files import turn, write_lines


@pytest.mark.parametrize(
    ("task", "format", "metrics"),
    [
        (None, "vqa", ["vqa_accuracy", "exact_match"]),
        (None, "captions", ["cider", "bleu", "rouge_l"]),
        (None, "llava", ["exact_match", "rouge_l"]),
        ("captioning", "messages", ["cider", "bleu", "rouge_l"]),
        ("document_vqa", "vqa", ["anls", "exact_match"]),
        ("chart_vqa", "vqa", ["relaxed_accuracy", "exact_match"]),
        ("chat", "captions", ["exact_match", "rouge_l"]),
    ],
)
def test_metrics_of_a_task(task, format, metrics):
    check_task(task)
    assert metrics_of(task, format, {"batch_size": 3}) == metrics
    assert metrics_of(task, format, {"metrics": ["anls"]}) == ["anls"]


@pytest.mark.parametrize("metrics", ["anls", [], {"anls": 1}, ["anls", "bleurt"]])
def test_wrong_metrics(metrics):
    with pytest.raises(ValueError, match=r"`evaluation.metrics` must be a list|there is no metric 'bleurt'"):
        metrics_of(None, "vqa", {"metrics": metrics})


def test_recipes_and_the_command_have_the_same_defaults():
    parameters = signature(evaluate_rows).parameters
    for recipe in (load_recipe(find_preset("finetune", "training")), load_lora_recipe(find_preset("finetune", "lora"))):
        assert recipe.evaluation == {name: parameters[name].default for name in ("batch_size", "max_new_tokens")}


def test_scores_are_shown_as_a_table():
    assert score_lines({"cider": 0.123, "rouge_l": 100.0}) == (
        "cider                   0.12\nrouge_l               100.00"
    )


def test_texts_and_images_of_examples():
    conversation = [turn("user", None, "a", "b"), {"role": "assistant", "content": "c"}]
    assert list(texts_of([{"messages": conversation, "images": ["i"]}])) == ["ab\nc"]
    scenes = Dataset.from_list([{"question": f"q{i}", "answer": f"a{i}", "image": i} for i in range(7)])
    assert list(texts_of(scenes)) == [f"q{i}\na{i}" for i in range(7)]
    assert images_of(scenes, 3) == [0, 2, 4, 6]
    assert images_of(scenes, 7) == images_of(scenes, 90) == list(range(7))
    assert images_of([{"images": [1, 2]}, {"images": []}, {"images": [3]}], 5) == [1, 2, 3]


def test_the_first_rows_of_a_stream(monkeypatch):
    monkeypatch.setattr(examples, "NUM_ROWS_OF_STREAM", 3)
    stream = IterableDataset.from_generator(lambda: ({"number": i, "images": [i]} for i in range(9)))
    assert first_rows(stream, 2) == [
        {"number": 0, "images": [0]},
        {"number": 1, "images": [1]},
        {"number": 2, "images": []},
    ]


def test_stages_have_all_values():
    training, parts, data = {"seed": 1, "max_steps": 2}, {"rest": "freeze"}, {"train": "a", "max_length": 3}
    assert stages_of([], training, parts, data) == [Stage("", training, parts, data)]
    stages = [{"name": "a"}, {"name": "b", "training": {"seed": 5}, "parts": {"routers": 1.0}, "data": {"train": "c"}}]
    assert stages_of(stages, training, parts, data) == [
        Stage("a", training, parts, data),
        Stage("b", {"seed": 5, "max_steps": 2}, {"routers": 1.0}, {"train": "c", "max_length": 3}),
    ]


def test_evaluation_data_differ_from_training_data(tmp_path, monkeypatch):
    file = str(write_lines(tmp_path / "a.jsonl", []))
    monkeypatch.chdir(tmp_path)
    for data in (
        {"train": file},
        {"train": "owner/name", "eval": "owner/other"},
        {"train": "owner/name", "eval_split": "test"},
        {"train": str(tmp_path), "eval": str(tmp_path), "eval_split": "test"},
        {"train": str(tmp_path), "split": "dev", "eval": str(tmp_path)},
    ):
        check_own_data(data, -1)
        assert has_evaluation(data) == (len(data) > 1)
    for data in (
        {"train": file, "eval": "a.jsonl"},
        {"train": file, "eval": file, "eval_split": "test"},
        {"train": "owner/name", "eval": "owner/name"},
        {"train": "owner/name", "split": "test", "eval_split": "test"},
        {"train": str(tmp_path), "eval": "."},
    ):
        with pytest.raises(ValueError, match=r"`data.train` and the data for evaluation are the same"):
            check_own_data(data, -1)
    check_own_data({"train": file, "streaming": True}, 1)
    with pytest.raises(ValueError, match=r"`data.streaming` needs `training.max_steps`"):
        check_own_data({"train": file, "streaming": True}, 0)
