"""The model card agrees with the configuration, the scores and the recipe."""

import yaml
from huggingface_hub import ModelCard

from modeling_sparse_moe_vlm.toolbox.hub import write_model_card
from modeling_sparse_moe_vlm.toolbox.training.recipes import Recipe
from tests.support.models import make_config

METRICS = {
    "training_seconds": 1.5,
    "test": {
        "overall": {"model": 92.25, "blind": 31.04, "most_frequent_answer": 12.96},
        "count": {"model": 1.0, "blind": 2.0, "most_frequent_answer": 3.0},
    },
    "test_style": {"overall": {"model": 6.75, "blind": 5.0, "most_frequent_answer": 4.0}},
}


def test_metadata(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    card = write_model_card(folder, config=make_config(), metrics=METRICS)
    data = ModelCard.load(folder / "README.md").data
    assert data.to_dict() == card.data.to_dict()
    expected = {
        "license": "apache-2.0",
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["moe", "vision-language", "custom_code"],
        "metrics": ["exact_match"],
    }
    assert {key: data.to_dict()[key] for key in expected} == expected
    assert data.model_name == "my-model"
    results = [
        (r.task_type, r.dataset_type, r.dataset_name, r.dataset_split, r.metric_type, r.metric_value)
        for r in data.eval_results
    ]
    task = ("visual-question-answering", "emoji-scenes")
    assert results == [
        (*task, "Emoji scenes, held-out arrangements", "test", "exact_match", 92.2),
        (*task, "Emoji scenes, held-out drawing style", "test_style", "exact_match", 6.8),
    ]


def test_text(tmp_path):
    config = make_config()
    recipe = Recipe("model.json", {"num_train": 5}, {"learning_rate": 1e-5, "run_name": "größer"}, {"vocab_size": 300})
    text = write_model_card(tmp_path / "my-model", config=config, metrics=METRICS, recipe=recipe).text
    lines = text.splitlines()
    assert "# my-model" in lines
    assert f"| parameters | {config.num_parameters():,} |" in lines
    for modality in ("text", "image"):
        assert f"| active per {modality} token | {config.num_active_parameters(modality):,} |" in lines
    assert f"| routed experts per token | {config.text_config.num_experts_per_tok} |" in lines
    assert f"(`{config.vision_config.model_type}`)" in text
    assert text.count('.from_pretrained("my-model", trust_remote_code=True)') == 2
    assert "`transformers>=5.20,<6`" in text
    assert "| Emoji scenes, held-out arrangements | 92.2 | 31.0 | 13.0 |" in lines
    assert "| Emoji scenes, held-out drawing style | 6.8 | 5.0 | 4.0 |" in lines
    assert "Nothing was measured" not in text
    assert "No record of the training" not in text
    shown = text.split("```yaml\n")[1].split("\n```")[0]
    assert shown == recipe.to_yaml().strip()
    assert Recipe(**yaml.safe_load(shown)) == recipe


def test_groups(tmp_path):
    groups = [
        {"name": "both", "modalities": ["text", "image"], "num_experts": 4, "intermediate_size": 24},
        {"name": "words", "modalities": ["text"], "num_experts": 1, "intermediate_size": 8, "always_on": True},
    ]
    text = write_model_card(tmp_path, config=make_config(expert_groups=groups)).text
    assert "| expert groups | both (4 × 24), words (1 × 8, always on) |" in text.splitlines()


def test_only_measured_results_are_in_the_card(tmp_path):
    card = write_model_card(tmp_path, config=make_config(), metrics={"training_seconds": 3})
    assert card.data.eval_results is None
    assert card.data.metrics is None
    assert "Nothing was measured when this model was saved." in card.text
    assert "Exact match" not in card.text
    assert "No record of the training is saved with this model." in card.text
    assert "```yaml" not in card.text

    card = write_model_card(tmp_path, config=make_config(), metrics={"test_style": METRICS["test_style"]})
    assert [result.dataset_split for result in card.data.eval_results] == ["test_style"]


def test_a_custom_template(tmp_path):
    (tmp_path / "template.md").write_text("---\n{{ card_data }}\n---\n\n{{ model_name }}: {{ num_parameters }}")
    config = make_config()
    card = write_model_card(tmp_path, config=config, template=tmp_path / "template.md")
    assert card.text.strip() == f"{tmp_path.name}: {config.num_parameters():,}"
