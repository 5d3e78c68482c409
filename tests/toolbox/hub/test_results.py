"""Scores in the metadata of model cards."""

import pytest
from huggingface_hub import ModelCard

from modeling_sparse_moe_vlm.toolbox.hub import add_results_to_card
from tests.support.models import make_config


def results_of(folder) -> list[tuple]:
    data = ModelCard.load(folder / "README.md").data
    return [
        (r.task_type, r.dataset_type, r.dataset_name, r.dataset_split, r.metric_type, r.metric_value)
        for r in data.eval_results
    ]


def test_scores_are_added_and_replaced(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nmetrics:\n- bleu\n---\n\n# My model\n\nMy text.\n")
    task = "visual-question-answering"
    add_results_to_card(tmp_path, {"anls": 12.346, "exact_match": 5.0}, dataset="My Data", split="test", task=task)
    expected = [
        (task, "my-data", "My Data", "test", "anls", 12.35),
        (task, "my-data", "My Data", "test", "exact_match", 5.0),
    ]
    assert results_of(tmp_path) == expected
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert card.data.model_name == tmp_path.name
    assert card.data.metrics == ["bleu", "anls", "exact_match"]
    assert card.text.strip() == "# My model\n\nMy text."

    add_results_to_card(tmp_path, {"anls": 20.0}, dataset="My Data", split="test", task=task)
    add_results_to_card(tmp_path, {"anls": 30.0}, dataset="My Data", split=None, task=task)
    add_results_to_card(tmp_path, {"anls": 40.0}, dataset="Other", split="test", task=task)
    assert sorted(results_of(tmp_path), key=lambda result: result[-1]) == [
        expected[1],
        (task, "my-data", "My Data", "test", "anls", 20.0),
        (task, "my-data", "My Data", None, "anls", 30.0),
        (task, "other", "Other", "test", "anls", 40.0),
    ]


def test_a_folder_without_a_card_gets_one(tmp_path):
    make_config().save_pretrained(tmp_path)
    add_results_to_card(tmp_path, {"cider": 1.0}, dataset="…", split="test", task="image-to-text")
    assert results_of(tmp_path) == [("image-to-text", "data", "…", "test", "cider", 1.0)]
    assert "A sparse mixture-of-experts vision-language model" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / ".README.md.saving").exists()
    with pytest.raises(OSError, match="none"):
        add_results_to_card(tmp_path / "none", {"cider": 1.0}, dataset="a", split=None, task="image-to-text")
