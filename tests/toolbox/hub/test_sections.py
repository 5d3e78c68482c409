"""Sections of model cards: only what is known, without paths of a machine, and readable by `huggingface_hub`."""

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from peft import get_peft_model
from transformers.pipelines import SUPPORTED_TASKS

from modeling_sparse_moe_vlm.modeling_upcycled_classification import classification_model_class
from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config
from modeling_sparse_moe_vlm.toolbox.hub import add_results_to_card, sections, write_model_card
from modeling_sparse_moe_vlm.toolbox.retrieval import to_retrieval
from modeling_sparse_moe_vlm.toolbox.training.recipes import Recipe
from modeling_sparse_moe_vlm.toolbox.upcycling import to_native
from tests.support.models import make_config, make_model
from tests.support.processors import make_processor, make_tokenizer
from tests.support.retrieval import make_retrieval_model
from tests.support.upcycled import make_few_experts

ROOT = Path(__file__).parents[3]
OWN = Recipe(
    "some/base",
    {"train": "/home/someone/data/train.jsonl", "eval": "some/questions"},
    {"learning_rate": 1e-5, "logging_dir": "C:\\runs\\one"},
    stages=[{"name": "connector", "data": {"train": "some/captions"}}, {"name": "experts"}],
)
SCENES = Recipe("model.json", {"num_train": 5}, {"learning_rate": 1e-5})


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Cards of models on the Hub are read only from the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def ours(folder):
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return write_model_card(folder)


def on_own_data(folder):
    make_model().save_pretrained(folder)
    return write_model_card(folder, recipe=OWN, metrics={"training_seconds": 1234.5}, base_model="some/base")


def upcycled(folder):
    model = make_few_experts("llava")
    model.config.experts_config.start["base_model"] = str(folder / "dense")
    model.save_pretrained(folder)
    return write_model_card(folder)


def from_parts(folder):
    config = make_config()
    start = make_few_experts("llama").config.experts_config.start
    config.text_config.start = start | {"base_model": "some/llama", "vision_encoder": "some/siglip"}
    return write_model_card(folder, config=config)


def native(folder):
    sparse = make_few_experts("qwen3_vl", "joint", start="copy")
    to_native(sparse).save_pretrained(folder)
    return write_model_card(folder, base_model="some/qwen", start=sparse.config.experts_config.start)


def retrieval(folder):
    make_retrieval_model().save_pretrained(folder)
    return write_model_card(folder)


def upcycled_retrieval(folder):
    to_retrieval(make_few_experts("qwen3_vl"), make_tokenizer()).save_pretrained(folder)
    return write_model_card(folder)


def adapter(folder):
    model = make_model()
    model.save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    model.name_or_path = str(folder / "base")
    torch.manual_seed(0)
    get_peft_model(model, expert_lora_config(model, r=2)).save_pretrained(folder)
    return write_model_card(folder)


CARDS = {
    make.__name__: make
    for make in (ours, on_own_data, upcycled, from_parts, native, retrieval, upcycled_retrieval, adapter)
}
# Keys that the Hub documents for model cards.
KEYS = {
    *("license", "language", "library_name", "pipeline_tag", "tags", "datasets", "metrics", "base_model"),
    *("base_model_relation", "model-index", "model_name", "license_name", "license_link"),
}
RELATIONS = {"finetune": 1, "merge": 2, "adapter": 1}


@pytest.mark.parametrize("kind", CARDS)
def test_cards_of_every_kind(kind, tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    card = CARDS[kind](folder)
    text = (folder / "README.md").read_text()
    loaded = ModelCard.load(folder / "README.md")
    data = loaded.data.to_dict()
    assert data == card.data.to_dict()
    assert str(tmp_path) not in text
    assert "/home/" not in text
    assert "None" not in text
    assert "``" not in text.replace("```", "")
    assert "\n\n\n" not in text
    for heading in re.findall(r"^#+ .*\n+(?=#|\Z)", text, re.MULTILINE):
        assert heading.startswith("# my-model"), f"{heading!r} has no content"

    assert data.keys() <= KEYS
    assert all(value not in (None, "", []) for value in data.values())
    assert data["library_name"] == ("peft" if kind == "adapter" else "transformers")
    assert data.get("pipeline_tag") in {None, *SUPPORTED_TASKS}
    bases = data.get("base_model", [])
    bases = [bases] if isinstance(bases, str) else bases
    assert len(bases) == RELATIONS.get(data.get("base_model_relation"), 0)
    assert "## Limits and risks\n\n- Answers can be wrong." in text
    assert "## Citation\n\n```bibtex\n@software{sparse_moe_vlm," in text
    program = text.split("```python\n")[1].split("```")[0]
    compile(program, "usage", "exec")

    add_results_to_card(folder, {"anls": 12.345}, dataset="Mine", split="test", task="visual-question-answering")
    loaded = ModelCard.load(folder / "README.md")
    (result,) = loaded.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("anls", round(12.345, 2), "Mine")
    index = eval_results_to_model_index("my-model", loaded.data.eval_results)
    assert model_index_to_eval_results(index) == ("my-model", loaded.data.eval_results)
    assert f"| Mine | test | anls | {round(12.345, 2)} |" in loaded.text.splitlines()
    assert "Nothing was measured" not in loaded.text
    assert loaded.text.count("## Evaluation") == 1
    add_results_to_card(folder, {"cider": 1.0}, dataset="Mine", split=None, task="image-to-text")
    text = ModelCard.load(folder / "README.md").text
    assert "| Mine |  | cider | 1.0 |" in text.splitlines()
    assert text.count("## Evaluation") == 1


def test_relations_and_licences(tmp_path):
    data = {
        kind: CARDS[kind](_made(tmp_path / kind)).data for kind in ("on_own_data", "from_parts", "native", "adapter")
    }
    assert data["on_own_data"].base_model == "some/base"
    assert data["on_own_data"].base_model_relation == "finetune"
    assert data["on_own_data"].license is data["on_own_data"].language is None
    assert data["on_own_data"].datasets == ["some/questions", "some/captions"]
    assert data["from_parts"].base_model == ["some/llama", "some/siglip"]
    assert data["from_parts"].base_model_relation == "merge"
    assert data["native"].base_model_relation == "finetune"
    assert data["adapter"].base_model is data["adapter"].get("base_model_relation") is None  # it is not on the Hub
    assert data["adapter"].license == "mit"
    assert data["adapter"].tags == ["lora", "moe"]
    scratch = write_model_card(_made(tmp_path / "a"), config=make_config(), recipe=OWN)
    assert scratch.data.license is scratch.data.language is None  # those of own data are not known
    built_in = write_model_card(_made(tmp_path / "b"), config=make_config(), recipe=SCENES)
    assert (built_in.data.license, built_in.data.language) == ("apache-2.0", "en")
    assert built_in.data.datasets is None


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_training_of_own_data(tmp_path):
    text = on_own_data(tmp_path).text
    sentence = (
        "Trained on `train.jsonl`, [some/captions](https://huggingface.co/datasets/some/captions). Stages: connector, "
        "experts. The training took 1,234.5 seconds."
    )
    assert sentence in text.splitlines()
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("\n```")[0])
    assert shown["data"] == {"train": "train.jsonl", "eval": "some/questions"}
    assert shown["training"] == {"learning_rate": 1e-5, "logging_dir": "one"}
    assert "- It has the limits and biases of [some/base](https://huggingface.co/some/base): read what" in text
    assert "- It has the limits and biases of the data that it was trained on." in text.splitlines()


def test_the_recipe_of_a_run_is_found(tmp_path):
    for name, place in (("model", tmp_path), ("other", tmp_path / "other")):
        folder = tmp_path / name
        folder.mkdir()
        (place / "recipe.yaml").write_text(SCENES.to_yaml())
        assert (
            "Trained on the built-in scenes: emoji on a grid, with questions."
            in write_model_card(folder, config=make_config()).text
        )
    (tmp_path / "third").mkdir()
    assert "No record of the training" in write_model_card(tmp_path / "third", config=make_config()).text


def test_architecture_and_memory(tmp_path):
    config = make_config(
        router="sigmoid",
        expert_pool=[0, 0],
        num_experts_per_tok_by_modality={"image": 1},
        norm_topk_prob=False,
    )
    lines = write_model_card(tmp_path, config=config).text.splitlines()
    for line in (
        "| router | sigmoid |",
        "| routed experts per image token | 1 |",
        "| sparse layers | 2 of 2 |",
        "| expert pools | 0 (layers 0, 1) |",
        f"| weights in float32 | {config.num_parameters() * 4 / 1e3:.1f} kB |",
        f"| weights in bfloat16 | {config.num_parameters() * 2 / 1e3:.1f} kB |",
    ):
        assert line in lines


def test_facts_of_an_adapter(tmp_path):
    text = adapter(tmp_path).text
    for line in (
        "| type | LORA |",
        "| rank | 2 |",
        "A LoRA adapter of rank 2 for `base`.",
        "from peft import PeftModel",
    ):
        assert line in text.splitlines()
    assert re.search(r"\| target parameters \| `.*mlp\.experts\.down_proj`", text)
    assert re.search(r"\| parameters \| [\d,]{5,} \|", text)
    assert 'AutoModelForImageTextToText.from_pretrained("path/to/base", trust_remote_code=True)' in text
    assert "Load the base model first, then the adapter." in text


def test_adapters_of_models_without_code(tmp_path):
    """What the card says follows from the configuration of the base model."""
    base = tmp_path / "base"
    base.mkdir()
    adapter = {"peft_type": "LORA", "r": 2, "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    (base / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    card = write_model_card(tmp_path)
    assert (card.data.pipeline_tag, card.data.tags) == ("text-generation", ["lora"])
    assert 'base = AutoModelForCausalLM.from_pretrained("path/to/base")' in card.text
    assert "runs on your machine" not in card.text
    (base / "config.json").write_text('{"architectures": ["LlavaForImageTextRetrieval"], "auto_map": {}}')
    card = write_model_card(tmp_path)
    assert card.data.pipeline_tag is None
    assert 'base = AutoModel.from_pretrained("path/to/base", trust_remote_code=True)' in card.text
    assert "The code of the base model runs on your machine: read it, and pin a revision." in card.text
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter | {"peft_type": "IA3", "r": None}))
    card = write_model_card(tmp_path)
    assert card.data.tags is None
    assert "\nAn adapter (IA3) for `base`.\n" in card.text


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_models_with_other_heads_read_images_if_they_have_a_vision_tower(kind, tmp_path):
    config = make_few_experts(kind).config
    scorer = classification_model_class(type(config))(config)
    scorer.save_pretrained(tmp_path / "scorer")
    text = write_model_card(tmp_path / "scorer").text
    has_images = kind == "llava"
    assert ("Tokens are routed by their modality" in text) == has_images
    assert f"including the {'processor' if has_images else 'tokenizer'}." in text
    to_retrieval(make_few_experts(kind), make_tokenizer()).save_pretrained(tmp_path / "retrieval")
    card = write_model_card(tmp_path / "retrieval")
    assert ("Tokens are routed by their modality" in card.text) == has_images
    assert ("it embeds texts, images, and texts with images." in card.text) == has_images
    assert ("a head for text retrieval (`upcycled_llama_retrieval`): it embeds texts." in card.text) != has_images
    assert ("image-text-retrieval" in card.data.tags) == has_images


def test_figures_in_the_folder(tmp_path):
    for name in ("expert_load.png", "unknown.png"):
        (tmp_path / name).touch()
    text = write_model_card(tmp_path, config=make_config()).text
    assert "![Load of the experts by layer and modality](expert_load.png)" in text.splitlines()
    assert "unknown.png" not in text


def test_the_citation_is_that_of_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    template = (ROOT / "model_card.md").read_text()
    for value in (citation["title"], citation["authors"][0]["name"]):
        assert value in template


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/data.jsonl", "data.jsonl"),
        ("~/data/", "data"),
        ("../data.jsonl", "data.jsonl"),
        ("C:\\data\\a.jsonl", "a.jsonl"),
        ("D:/data/a.jsonl", "a.jsonl"),
        ("data/train.jsonl", "data/train.jsonl"),
        ("some/dataset", "some/dataset"),
        ({"a": ["/b/c", 1, None, True]}, {"a": ["c", 1, None, True]}),
    ],
)
def test_paths_of_a_machine_are_shortened(value, expected):
    assert sections.without_paths(value) == expected


def test_scores_replace_those_before():
    result = EvalResult("a-task", "mine", "Mine", "anls", 1.5, dataset_split="test")
    card = f"text\n{sections.NOTHING_MEASURED}\n{sections.scores_text([])}\nrest"
    once = sections.with_scores(card, [result])
    assert "| Mine | test | anls | 1.5 |" in once.splitlines()
    assert once.startswith("text\n\n" + sections.SCORES)
    assert once.endswith(sections.END_OF_SCORES + "\nrest")
    assert sections.with_scores(once, [result]) == once
    assert sections.with_scores("a card of another program", [result]) == "a card of another program"


def test_limits_of_models_without_more_knowledge():
    options = {"parents": [], "is_upcycled": False, "recipe": None, "reads_images": False, "needs_code": False}
    assert sections.limits_text(**options) == "- Answers can be wrong. Nothing in the model checks or filters them."
    lines = sections.limits_text(**options | {"is_upcycled": True}).splitlines()
    assert lines[1:] == [
        "- It has the limits and biases of its dense model: read what is known about them first.",
        "- No training after upcycling is recorded.",
    ]
    assert "`mm_token_type_ids`" in sections.limits_text(**options | {"reads_images": True, "needs_code": True})
