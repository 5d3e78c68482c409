"""Small runs of finetune_lora.py: the adapter loads with PEFT, the metrics are right, and runs can be resumed."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from modeling_sparse_moe_vlm.toolbox.expert_lora.recipes import load_lora_recipe
from tests.scripts.conftest import run_in_two_processes
from tests.support.small_run import SMALL_RUN

RECIPES = Path("configuration/lora")
TARGETS = {
    "attention": {"self_attn"},
    "experts": {"mlp.experts", "shared_experts.text", "shared_experts.image"},
    "image_experts": {"shared_experts.image"},
    "all": {"mlp.experts", "shared_experts.text", "shared_experts.image", "self_attn"},
}


def small(folder: Path, name: str, model: Path, *arguments: str, **changes) -> list[str]:
    values = SMALL_RUN | {f"training.{key}": value for key, value in changes.items()}
    return [
        f"--recipe={RECIPES / name}.yaml",
        f"--model={model}",
        f"--output-dir={folder}",
        *(f"--set={key}={value}" for key, value in values.items()),
        *arguments,
    ]


@pytest.fixture(scope="module")
def model_folder(trained) -> Path:
    return trained[0] / "model"


@pytest.mark.parametrize("name", TARGETS)
def test_every_recipe_leaves_an_adapter_that_peft_loads(run_here, tmp_path, model_folder, name):
    printed = run_here("finetune_lora.py", *small(tmp_path, name, model_folder))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {target for target in TARGETS["all"] if any(target in name for name in trained)} == TARGETS[name]
    assert any("mlp.gate" in name for name in trained) == bool(config["modules_to_save"]) == (name == "all")
    assert any(bool(parameter.any()) for key, parameter in model.named_parameters() if "lora_B" in key)

    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["num_trained_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"Trains {metrics['num_trained_parameters']:,} parameters" in printed
    for split in ("test", "test_style"):
        assert set(metrics[split]) == {"before", "after"}
    assert f'PeftModel.from_pretrained(model, "{tmp_path / "adapter"}")' in printed
    assert ("factor_expert_lora(model)" in printed) == (name in ("experts", "all"))


def test_an_interrupted_run_resumes(run_here, tmp_path, model_folder):
    checkpoints = tmp_path / "checkpoints"

    def losses(number: int) -> list[float]:
        state = json.loads((checkpoints / f"checkpoint-{number}/trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    options = {"save_steps": 1, "save_total_limit": 4, "max_steps": 3}
    run_here("finetune_lora.py", *small(tmp_path, "experts", model_folder, **options))
    expected, adapter = losses(3), (tmp_path / "adapter/adapter_model.safetensors").read_bytes()
    for number in (2, 3):
        shutil.rmtree(checkpoints / f"checkpoint-{number}")
    state = checkpoints / "checkpoint-1/trainer_state.json"
    state.write_text(state.read_text().replace(f'"loss": {json.dumps(expected[0])}', '"loss": 123.0'))
    run_here("finetune_lora.py", *small(tmp_path, "experts", model_folder, "--resume", **options))
    assert losses(3) == [123.0, *expected[1:]], "the run started again, or resumed from another step"
    assert (tmp_path / "adapter/adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.extensive
@pytest.mark.slow
def test_two_processes_resume_and_save_one_adapter(run_here, tmp_path, model_folder):
    output_dir = tmp_path / "output"
    run_here("finetune_lora.py", *small(output_dir, "all", model_folder, save_steps=1, max_steps=1))
    shutil.rmtree(output_dir / "adapter")
    (output_dir / "metrics.json").unlink()
    arguments = small(output_dir, "all", model_folder, "--resume", save_steps=1, save_total_limit=2, max_steps=3)
    result = run_in_two_processes(tmp_path, "ddp.yaml", "finetune_lora.py", *arguments)
    assert result.returncode == 0, result.stderr[-8000:]
    for printed in ("Trains ", "the new style", "Wrote the adapter"):
        assert result.stdout.count(printed) == 1, printed
    assert result.stdout.count("'loss':") == 2, "it did not resume"

    metrics = json.loads((output_dir / "metrics.json").read_text())
    assert all(set(metrics[split]) == {"before", "after"} for split in ("test", "test_style"))
    names = {path.name for path in (output_dir / "adapter").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    adapter = output_dir / "adapter/adapter_model.safetensors"
    assert adapter.read_bytes() == (output_dir / "checkpoints/checkpoint-3/adapter_model.safetensors").read_bytes()
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model_folder), output_dir / "adapter")
    assert any(bool(parameter.any()) for key, parameter in model.named_parameters() if "lora_B" in key)


def test_the_error_without_a_trained_model_says_how_to_get_one(run_here, tmp_path):
    recipe = tmp_path / "experts.yaml"
    recipe.write_text((RECIPES / "experts.yaml").read_text())
    with pytest.raises(SystemExit, match=r"no trained model 'outputs/none/model' yet: `make demo`"):
        run_here("finetune_lora.py", f"--recipe={recipe}", "--set=model=outputs/none/model")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("name", TARGETS)
def test_recipes_differ_only_in_the_adapted_layers(name):
    recipes = [yaml.safe_load((RECIPES / f"{other}.yaml").read_text()) for other in (name, "experts")]
    assert [recipe.pop("lora")["r"] for recipe in recipes] == [8, 8]
    assert recipes[0] == recipes[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank=3", r"`lora` of the recipe .* has keys \['rank'\]"),
        ("lora.target_modules=[q_proj]", r"`lora` of the recipe .* has keys \['target_modules'\]"),
        ("lora.r=few", r"`lora.r` must be a whole number, got few \(in the recipe .*experts\.yaml\)"),
        ("lora.attention=yess", "`lora.attention` must be true or false, got yess"),
        ("lora.lora_alpha=much", "`lora.lora_alpha` must be a number, got much"),
        ("tokenizer.vocab_size=300", r"unknown keys \['tokenizer'\]; known ones are \['model', 'lora', 'data', 'tr"),
    ],
)
def test_mistakes_in_recipes_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_lora_recipe(RECIPES / "experts.yaml", [override])


def test_values_of_lora_recipes_must_be_numbers_if_the_field_is_a_number():
    overrides = ["lora.lora_dropout=1e-1", "lora.lora_alpha=.5", "lora.r=4", "lora.use_rslora=true"]
    recipe = load_lora_recipe(RECIPES / "attention.yaml", overrides)
    assert recipe.lora == {
        "r": 4,
        "lora_alpha": 0.5,
        "attention": True,
        "experts": [],
        "lora_dropout": 0.1,
        "use_rslora": True,
    }
    assert recipe.model == "outputs/demo/model"
