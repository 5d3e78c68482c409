import pytest

from modeling_sparse_moe_vlm.toolbox.training.processor_options import set_processor_options
from modeling_sparse_moe_vlm.toolbox.training.recipes import (
    Recipe,
    data_arguments,
    find_model,
    load_recipe,
    read_recipe,
    tokenizer_arguments,
    training_arguments,
)
from tests.support.processes import ROOT
from tests.support.processors import make_processor


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
        ("max_steps: -1", -1),
        ("max_steps: 2.0", 2),
        ("learning_rate: -.5E+1", -5.0),
        ("learning_rate: 3", 3),
        ("learning_rate: .inf", float("inf")),
        ("max_grad_norm: 0", 0),
        ("save_total_limit: null", None),
        ("save_total_limit: 3e0", 3),
        ("bf16: true", True),
        ("bf16: 0", 0),
        ("save_strategy: no", "no"),
        ("eval_strategy: false", "no"),
        ("bf16: no", False),
        ("tf32: null", None),
        ("report_to: [tensorboard]", ["tensorboard"]),
        ("include_for_metrics: []", []),
    ],
)
def test_numbers_with_exponents_are_numbers_if_a_number_is_expected(tmp_path, line, value):
    recipe = load_recipe(write(tmp_path, f"model: m\ntraining:\n  {line}\n"))
    (got,) = recipe.training.values()
    assert got == value
    assert type(got) is type(value)


def test_sections_can_be_empty_and_overridden(tmp_path):
    path = write(tmp_path, "model: m\ndata:\ntraining:\n")
    assert load_recipe(path, ["training.max_steps=3"]) == Recipe(model="m", training={"max_steps": 3})


def test_a_recipe_reads_what_it_writes(tmp_path):
    recipe = Recipe("m", {"grid": [2, 3]}, {"learning_rate": 1e-5, "run_name": "2024"}, {"vocab_size": 300})
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_tiles_in_a_recipe(tmp_path):
    path = write(tmp_path, "model: m\nprocessor: {max_tiles: 4, do_pad: true}\n")
    recipe = load_recipe(path, ["processor.max_image_tokens=80", "processor.min_tiles=2"])
    assert recipe.processor == {"max_tiles": 4, "do_pad": True, "max_image_tokens": 80, "min_tiles": 2}
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert "processor" not in load_recipe(write(tmp_path, "model: m")).to_yaml()
    with pytest.raises(ValueError, match=r"`processor.max_tiles` must be a whole number, got 1.5"):
        load_recipe(path, ["processor.max_tiles=1.5"])
    with pytest.raises(
        ValueError, match=r"`processor` of the recipe .* has keys \['tiles'\].* It can have min_tiles, "
    ):
        load_recipe(path, ["processor.tiles=2"])


def test_tiles_of_the_processor_of_a_run():
    processor = make_processor()
    set_processor_options(processor, {})
    assert processor.tile_grid(20, 50) == (1, 1)
    set_processor_options(processor, {"max_tiles": 6, "max_image_tokens": 27})
    assert processor.tile_grid(45, 70) == (1, 2)
    set_processor_options(processor, {"max_frames": 3, "video_fps": 0.5})
    assert (processor.max_frames, processor.video_fps) == (3, 0.5)
    with pytest.raises(ValueError, match="`max_frames` must be an integer of at least 1, got 0"):
        set_processor_options(processor, {"max_frames": 0})
    with pytest.raises(ValueError, match=r"`min_tiles` \(7\) must not be larger than `max_tiles` \(6\)"):
        set_processor_options(processor, {"min_tiles": 7})
    with pytest.raises(ValueError, match=r"`processor` of a recipe is for `SparseMoeVlmProcessor`, .* remove"):
        set_processor_options(processor.tokenizer, {"max_tiles": 2})
    set_processor_options(processor.tokenizer, {})


def test_parts_of_a_recipe_and_their_overrides(tmp_path):
    path = write(tmp_path, "model: m\nparts: {vision_encoder: freeze, connector: 1e-3, experts: {image: 1e-4}}\n")
    recipe = load_recipe(path, ["parts.routers=freeze", "parts.experts.text=2e-4", "parts.connector=5.0e-4"])
    assert recipe.parts == {
        "vision_encoder": "freeze",
        "connector": 0.0005,
        "experts": {"image": 0.0001, "text": 0.0002},
        "routers": "freeze",
    }
    assert type(recipe.parts["experts"]["text"]) is float
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert load_recipe(write(tmp_path, "model: m")).parts == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "parts.router=freeze",
            r"`parts` of the recipe .*recipe.yaml has keys \['router'\].* It can have vision_encoder, .*rest",
        ),
        (
            "parts.routers=stop",
            r"`parts.routers` must be 'freeze', 'train' or a learning rate above 0, but got 'stop'.*recipe.yaml",
        ),
        ("parts.experts.image=0", r"`parts.experts.image` must be .* but got 0\. \(in the recipe .*recipe.yaml\)"),
        ("parts=freeze", "`parts` of the recipe .*recipe.yaml must be a mapping, got 'freeze'"),
    ],
)
def test_wrong_parts_name_the_recipe(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, "model: m"), [override])


def test_long_lists_of_keys_are_not_shown(tmp_path):
    with pytest.raises(ValueError, match=r"`training` of the recipe .* correct or remove them\.$"):
        load_recipe(write(tmp_path, "model: m"), ["training.max_step=1"])


def test_keys_that_a_recipe_can_set():
    assert {"max_steps", "learning_rate", "seed"} <= training_arguments().keys()
    assert not {"output_dir", "remove_unused_columns"} & training_arguments().keys()
    assert training_arguments()["max_steps"] is int
    expected = {
        "num_train",
        "num_heldout",
        "seed",
        "grid",
        "cell_size",
        "vocabulary",
        "held_out_style",
        "jitter",
        "kinds",
    }
    assert data_arguments().keys() == expected
    assert data_arguments()["num_heldout"] is int
    assert tokenizer_arguments() == {"vocab_size": int}


def test_an_override_creates_sections_at_any_depth(tmp_path):
    path = write(tmp_path, "model: m\ntraining:\n")
    overrides = ["training.lr_scheduler_kwargs.num_cycles=2", "model=other", "data.grid=[3, 2]", "tokenizer="]
    assert load_recipe(path, overrides) == Recipe(
        "other", {"grid": [3, 2]}, {"lr_scheduler_kwargs": {"num_cycles": 2}}, {}
    )


def test_the_last_override_counts_and_values_can_contain_equals_signs(tmp_path):
    recipe = load_recipe(write(tmp_path, "model: m"), ["model=a", "model=b=c", "training.run_name=x=1"])
    assert (recipe.model, recipe.training) == ("b=c", {"run_name": "x=1"})


def test_recipes_of_other_kinds_have_their_own_sections(tmp_path):
    path = write(tmp_path, "model: m\nown: {rate: 1e-2, name: 1e-2}")
    assert read_recipe(path, [], {"own": {"rate": float, "name": str}, "other": {}}) == {
        "model": "m",
        "own": {"rate": 0.01, "name": "1e-2"},
        "other": {},
    }
    with pytest.raises(ValueError, match=r"unknown keys \['own'\]; known ones are \['model', 'other'\]"):
        read_recipe(path, [], {"other": {}})


def test_models_are_found_in_the_current_directory_or_in_the_repository(tmp_path, monkeypatch):
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


def test_presets_are_found_by_name_if_no_file_has_this_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model("tiny") == str(ROOT / "configuration/models/tiny.json")
    assert find_model("configuration/models/large.json") == str(ROOT / "configuration/models/large.json")
    (tmp_path / "tiny").mkdir()
    assert find_model("tiny") == str(tmp_path / "tiny")
    assert find_model("gpt2") == "gpt2"
    assert find_model("organisation/tiny") == "organisation/tiny"


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
        ("model: [", [], r"^the recipe .*recipe\.yaml is not YAML: "),
        ("model: \x00", [], r"^the recipe .*recipe\.yaml is not YAML: "),
        ("model: m", ["training.max_steps=["], r"^the value of override 'training\.max_steps=\[' is not YAML: "),
        ("", [], r"recipe\.yaml must be a mapping with the key `model`"),
        (
            "model: m",
            ["training.max_steps=ten"],
            r"`training.max_steps` must be a whole number, got ten \(in the recipe .*recipe\.yaml\)",
        ),
        ("model: m", ["training.max_steps="], "`training.max_steps` must be a whole number, got None"),
        ("model: m", ["training.max_steps=1.5"], "`training.max_steps` must be a whole number, got 1.5"),
        ("model: m", ["training.max_steps=.nan"], "`training.max_steps` must be a whole number, got nan"),
        ("model: m", ["training.max_steps=true"], "`training.max_steps` must be a whole number, got True"),
        ("model: m", ["training.save_total_limit=few"], "`training.save_total_limit` must be a whole number, got few"),
        ("model: m", ["training.learning_rate=[1]"], r"`training.learning_rate` must be a number, got \[1\]"),
        ("model: m", ["training.learning_rate=1e-3x"], "`training.learning_rate` must be a number, got 1e-3x"),
        ("model: m", ["training.learning_rate=false"], "`training.learning_rate` must be a number, got False"),
        ("model: m", ["training.bf16=maybe"], "`training.bf16` must be true or false, got maybe"),
        ("model: m", ["training.bf16=2"], "`training.bf16` must be true or false, got 2"),
        ("model: m", ["tokenizer.vocab_size=1000001"], "`vocab_size` must be at most 1000000, got 1000001"),
        ("model: m", ["tokenizer.vocab_size=259"], "`vocab_size` must be at least 260, got 259"),
        ("model: m", ["data.num_train=many"], "`data.num_train` must be a whole number, got many"),
        ("model: m", ["data.cell_size=null"], "`data.cell_size` must be a whole number, got None"),
        ("model: m", ["tokenizer.vocab_size=1e-3"], "`tokenizer.vocab_size` must be a whole number, got 1e-3"),
    ],
)
def test_errors_name_the_mistake(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, text), overrides)
