import pytest

from modeling_sparse_moe_vlm.toolbox.recipes import load_recipe


def write(tmp_path, text: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_values_and_overrides(tmp_path):
    path = write(tmp_path, "model: m.json\ntraining:\n  learning_rate: 1.5e-3\n  report_to: none\n")
    recipe = load_recipe(path, ["training.max_steps=10", "data.num_train=50", "training.learning_rate=2e-3"])
    assert recipe.model == "m.json"
    assert recipe.data == {"num_train": 50}
    assert recipe.training == {"learning_rate": 0.002, "report_to": "none", "max_steps": 10}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("- 1", [], "must be a mapping"),
        ("training: {}", [], "needs the key `model`"),
        ("model: m\nmodels: n", [], r"unknown keys \['models'\]"),
        ("model: m", ["training.max_steps"], "has no value"),
        ("model: m", ["model.size=3"], "is a value, not a section"),
    ],
)
def test_mistakes_are_named(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, text), overrides)
