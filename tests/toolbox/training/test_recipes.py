import pytest

from modeling_sparse_moe_vlm.toolbox.training.recipes import Recipe, find_model, load_recipe


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
    ("line", "value"),
    [
        ("learning_rate: 1e-3", 0.001),
        ("learning_rate: 1e-3 # a comment", 0.001),
        ("max_steps: 2e3", 2000),
        ("eval_steps: 5e-1", 0.5),
        ('run_name: "2024"', "2024"),
        ("run_name: 12e4567", "12e4567"),
        ("lr_scheduler_kwargs: 1e-3", "1e-3"),
    ],
)
def test_numbers_with_exponents_are_numbers_where_a_number_is_wanted(tmp_path, line, value):
    recipe = load_recipe(write(tmp_path, f"model: m\ntraining:\n  {line}\n"))
    (got,) = recipe.training.values()
    assert got == value
    assert type(got) is type(value)


def test_sections_may_be_empty_and_overridden(tmp_path):
    path = write(tmp_path, "model: m\ndata:\ntraining:\n")
    assert load_recipe(path, ["training.max_steps=3"]) == Recipe(model="m", training={"max_steps": 3})


def test_a_recipe_reads_what_it_writes(tmp_path):
    recipe = Recipe("m", {"grid": [2, 3]}, {"learning_rate": 1e-5, "run_name": "2024"}, {"vocab_size": 300})
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_models_are_found_here_or_in_the_repository(tmp_path, monkeypatch):
    here, root = tmp_path / "here", tmp_path / "root"
    for folder in (here, root):
        folder.mkdir()
        (folder / "both.json").touch()
    (root / "model").mkdir()
    monkeypatch.chdir(here)
    assert find_model("both.json", root) == str(here / "both.json")
    assert find_model("model", root) == str(root / "model")
    assert find_model(str(root / "both.json"), root) == str(root / "both.json")
    assert find_model("organisation/name-on-the-hub", root) == "organisation/name-on-the-hub"
    for wrong in ("neither.json", "outputs/demo/model"):
        with pytest.raises(FileNotFoundError, match=f"{here / wrong} or {root / wrong}"):
            find_model(wrong, root)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("- 1", [], "must be a mapping"),
        ("training: {}", [], "needs the key `model`"),
        ("model: m\nmodels: n", [], r"unknown keys \['models'\]"),
        ("model: m", ["training.max_steps"], "has no value"),
        ("model: m", ["model.size=3"], "is a value, not a section"),
        ("model: 3", [], "needs the key `model`, a file or a name, got 3"),
        ("model: m", ["training=3"], "`training` of the recipe .* must be a mapping, got 3"),
        ("model: m", ["training.max_step=3"], r"`training` of the recipe .* has keys \['max_step'\]"),
        ("model: m", ["training.output_dir=here"], r"`training` .* has keys \['output_dir'\], which .* cannot set"),
        ("model: m", ["training.max_steps=1e-3"], "`training.max_steps` must be a whole number, got 1e-3"),
        ("model: m\ndata: {grids: [2, 2]}", [], r"`data` of the recipe .* has keys \['grids'\]"),
        ("model: m", ["data.split=test"], r"`data` of the recipe .* has keys \['split'\]"),
        ("model: m", ["tokenizer.texts=[a]"], r"`tokenizer` of the recipe .* has keys \['texts'\]"),
    ],
)
def test_mistakes_are_named(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, text), overrides)
