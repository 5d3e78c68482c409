"""The model cards of upcycled models and of models made from them, line by line."""

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from modeling_sparse_moe_vlm.toolbox.hub import parents, write_model_card
from modeling_sparse_moe_vlm.toolbox.training.recipes import Recipe
from modeling_sparse_moe_vlm.toolbox.upcycling import to_native, upcycle
from modeling_sparse_moe_vlm.toolbox.upcycling.costs import costs_of, costs_table
from tests.support.in_tree_models import make_llava
from tests.support.models import TINY_DECODER, make_config
from tests.support.processors import make_tokenizer
from tests.toolbox.upcycling.test_processors import make_llava_processor

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Cards of models on the Hub are read only from the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def make_card(folder, source, model, **request):
    torch.manual_seed(0)
    sparse = upcycle(model, **request)
    sparse.save_pretrained(folder)
    write_model_card(folder, base_model=source, model_name="my-model")
    table = costs_table({"dense": costs_of(model), "sparse": costs_of(sparse)})
    return ModelCard.load(folder / "README.md"), table, sparse


def usage_of(card):
    """Returns the program in a card, line by line. It must compile."""
    program = card.content.split("```python\n")[1].split("```")[0]
    compile(program, "usage", "exec")
    return program.splitlines()


def test_a_vision_language_model_from_the_hub(tmp_path):
    card, table, sparse = make_card(tmp_path, "some/llava", make_llava())
    assert card.data.base_model == "some/llava"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["moe", "upcycled", "custom_code"]
    assert card.data.license is None
    assert "# my-model" in card.content
    assert "made from the dense model [some/llava](https://huggingface.co/some/llava) by upcycling" in card.content
    assert table in card.content
    for line in (
        "| start | residual (router rows random, seed 0) |",
        "| groups | joint (8 × 48), text (1 × 48, always on), image (1 × 48, always on) |",
        "| routed experts per token | 2 |",
        "| sparse layers | 2 of 2 |",
        'model = AutoModelForImageTextToText.from_pretrained("my-model", trust_remote_code=True)',
    ):
        assert line in card.content.splitlines()
    assert "Before any training: parity on 32 tokens (random batch, float32)" in card.content
    assert "Transformers has the class" not in card.content
    assert "Nothing was measured" not in card.content
    assert "record of its training" not in card.content
    del sparse.config.experts_config.start["parity"]
    write_model_card(tmp_path, config=sparse.config)
    assert "parity" not in (tmp_path / "README.md").read_text()
    assert f"# {tmp_path.name}\n" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("request_", "start"),
    [
        ({"start": "split", "granularity": 2, "seed": 7}, "split (granularity 2, router rows random, seed 7)"),
        ({"start": "drop", "drop_ratio": 0.25}, "drop (drop_ratio 0.25, router rows random, seed 0)"),
        ({"layers": [1]}, "copy (router rows random, seed 0)"),
    ],
)
def test_a_language_model_in_a_folder(request_, start, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**TINY_DECODER))
    card, _, _ = make_card(tmp_path, str(tmp_path), model, expert_groups="joint", **request_)
    assert card.data.base_model is None
    assert card.data.pipeline_tag == "text-generation"
    assert f"the dense model `{tmp_path.name}` by upcycling" in card.content
    assert str(tmp_path) not in card.content
    lines = card.content.splitlines()
    assert f"| start | {start} |" in lines
    assert f"| sparse layers | {2 if 'layers' not in request_ else 1} of 2 |" in lines
    assert 'model = AutoModelForCausalLM.from_pretrained("my-model", trust_remote_code=True)' in lines


def test_the_base_model_in_the_configuration(tmp_path):
    model = make_llava()
    sparse = upcycle(model, "joint")
    sparse.save_pretrained(tmp_path / "nameless")
    card = write_model_card(tmp_path / "nameless")
    assert card.data.base_model is None
    assert "made from a dense model by upcycling" in card.content

    model.name_or_path = "some/llava"
    upcycle(model, "joint").save_pretrained(tmp_path / "named")
    card = write_model_card(tmp_path / "named")
    assert card.data.base_model == "some/llava"
    assert card.data.model_name == "named"


def test_without_a_head(tmp_path):
    card, table, _ = make_card(tmp_path, "some/llama", LlamaModel(LlamaConfig(**TINY_DECODER)), expert_groups="joint")
    assert card.data.pipeline_tag is None
    assert table in card.content
    make_tokenizer().save_pretrained(tmp_path)
    card = write_model_card(tmp_path, model_name="my-model")
    assert usage_of(card) == [
        "from transformers import AutoModel, AutoTokenizer",
        "",
        'model = AutoModel.from_pretrained("my-model", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("my-model")',
    ]


# ------------------------------------------------------------------------------------------------------- usage


def test_usage_with_images(tmp_path):
    sparse = upcycle(make_llava(), "joint")
    sparse.save_pretrained(tmp_path)
    assert usage_of(write_model_card(tmp_path)) == [
        "from transformers import AutoModelForImageTextToText",
        "",
        f'model = AutoModelForImageTextToText.from_pretrained("{tmp_path.name}", trust_remote_code=True)',
    ]
    make_llava_processor().save_pretrained(tmp_path)
    lines = usage_of(write_model_card(tmp_path))
    assert lines[0] == "from transformers import AutoModelForImageTextToText, AutoProcessor"
    assert lines[3] == f'processor = AutoProcessor.from_pretrained("{tmp_path.name}")'
    assert lines[5] == "inputs = processor.apply_chat_template("
    assert lines[-1].startswith("print(processor.decode(output[0, ")


@pytest.mark.parametrize(("template", "line"), [(None, 'inputs = tokenizer("'), (CHAT, "inputs = tokenizer.apply_")])
def test_usage_with_text(template, line, tmp_path):
    upcycle(LlamaForCausalLM(LlamaConfig(**TINY_DECODER))).save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    lines = usage_of(write_model_card(tmp_path))
    assert lines[0] == "from transformers import AutoModelForCausalLM, AutoTokenizer"
    assert lines[3] == f'tokenizer = AutoTokenizer.from_pretrained("{tmp_path.name}")'
    assert lines[4].startswith(line)
    assert lines[-1].startswith("print(tokenizer.decode(output[0, ")


# -------------------------------------------------------------------------------------------------- from parts

START = {"name": "split", "granularity": 2, "seed": 3, "router_init": "data"}


def test_from_parts_of_the_hub(tmp_path):
    config = make_config()
    config.text_config.start = START | {"base_model": "some/llama", "vision_encoder": "some/siglip"}
    card = write_model_card(tmp_path, config=config, model_name="my-model")
    assert card.data.base_model == ["some/llama", "some/siglip"]
    assert (card.data.license, card.data.language) == (None, None)
    assert card.data.pipeline_tag == "image-text-to-text"
    lines = card.content.splitlines()
    assert (
        "The decoder was made from the language model [some/llama](https://huggingface.co/some/llama) by upcycling: "
        "its feed-forward blocks became experts. The vision tower is that of "
        "[some/siglip](https://huggingface.co/some/siglip). The connector between them started at random."
    ) in lines
    assert "Start of the experts: split (granularity 2, router rows data, seed 3)." in lines
    assert "Before any training" not in card.content
    assert "Nothing was measured" not in card.content


def test_a_part_without_a_name(tmp_path):
    config = make_config()
    config.text_config.start = START | {"base_model": "", "vision_encoder": "some/siglip"}
    card = write_model_card(tmp_path, config=config)
    assert card.data.base_model == "some/siglip"
    assert "The decoder was made from a dense language model by upcycling" in card.content
    assert "The vision tower is that of [some/siglip]" in card.content


def test_our_language_model(tmp_path):
    config = make_config().text_config
    config.start = START | {"base_model": "some/llama"}
    make_tokenizer().save_pretrained(tmp_path)
    card = write_model_card(tmp_path, config=config, model_name="my-model")
    assert card.data.base_model == "some/llama"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["moe", "upcycled", "custom_code"]
    lines = card.content.splitlines()
    assert (
        "A sparse mixture-of-experts language model (`sparse_moe_vlm_text`): a decoder whose feed-forward blocks are "
        "experts."
    ) in lines
    assert f"| active per text token | {config.num_active_parameters('text'):,} |" in lines
    assert "active per image token" not in card.content
    assert "vision tower" not in card.content
    assert usage_of(card)[2:4] == [
        'model = AutoModelForCausalLM.from_pretrained("my-model", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("my-model")',
    ]


def test_our_model_that_was_trained_on(tmp_path):
    """It is not from scratch, so what is known of the built-in data and the licence of this package does not hold."""
    card = write_model_card(tmp_path, config=make_config(), base_model=write_parent(tmp_path / "a", license="mit"))
    assert (card.data.license, card.data.language, card.data.base_model) == ("mit", None, None)
    assert card.data.tags == ["moe", "vision-language", "custom_code"]
    card = write_model_card(tmp_path, config=make_config())
    assert (card.data.license, card.data.language) == (None, None)
    recipe = Recipe(str(tmp_path / "a"), {"num_train": 5}, {})  # a checkpoint with the built-in data
    card = write_model_card(tmp_path, config=make_config(), recipe=recipe)
    assert (card.data.license, card.data.language) == (None, None)


# ------------------------------------------------------------------------------------- classes of Transformers


def test_a_native_export(tmp_path):
    sparse = upcycle(LlamaForCausalLM(LlamaConfig(**TINY_DECODER)), "joint", num_experts=4)
    twin = to_native(sparse)
    twin.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    card = write_model_card(tmp_path, base_model="some/llama", start=sparse.experts_config.start, model_name="twin")
    assert card.data.base_model == "some/llama"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["moe", "upcycled"]
    lines = card.content.splitlines()
    assert (
        "A sparse mixture of experts, made from the dense model [some/llama](https://huggingface.co/some/llama) by "
        "upcycling and saved as a `MixtralForCausalLM`."
    ) in lines
    assert f"| parameters | {twin.num_parameters():,} |" in lines
    assert f"| active per text token | {costs_of(sparse).active['text']:,} |" in lines
    assert "Start of the experts: copy (router rows random, seed 0)." in lines
    assert "Before any training: parity on 32 tokens (random batch, float32)" in card.content
    assert "Transformers has the class of this model, so no remote code is needed." in lines
    assert usage_of(card)[2] == 'model = AutoModelForCausalLM.from_pretrained("twin")'
    assert "trust_remote_code" not in card.content


def test_a_model_that_was_not_upcycled(tmp_path):
    make_llava().save_pretrained(tmp_path)
    card = write_model_card(tmp_path)
    assert card.data.tags is None or card.data.tags == []
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.license is None
    assert "A `LlavaForConditionalGeneration`, which is a class of Transformers." in card.content
    assert "upcycl" not in card.content
    assert "Nothing was measured when this model was saved." in card.content


# ----------------------------------------------------------------------------------------------------- licences


def write_parent(folder, **metadata):
    folder.mkdir(exist_ok=True)
    lines = "".join(f"{key}: {value}\n" for key, value in metadata.items())
    (folder / "README.md").write_text(f"---\n{lines}---\n\n# Parent\n")
    return str(folder)


def test_licences_are_inherited(tmp_path):
    apache = write_parent(tmp_path / "a", license="apache-2.0")
    mit = write_parent(tmp_path / "b", license="mit")
    none = write_parent(tmp_path / "c", language="en")
    assert parents.inherited_metadata([apache]) == {"license": "apache-2.0"}
    assert parents.inherited_metadata([apache, apache]) == {"license": "apache-2.0"}
    for differ in ([apache, mit], [apache, none], [apache, ""], [none], [""], []):
        assert parents.inherited_metadata(differ) == {}
    sparse = upcycle(make_llava(), "joint")
    assert write_model_card(tmp_path, config=sparse.config, base_model=mit).data.license == "mit"


def test_licences_with_a_name_and_a_link(tmp_path, monkeypatch):
    fields = {"license": "other", "license_name": "special", "license_link": "https://example.org/licence"}
    linked = write_parent(tmp_path / "a", **fields)
    assert parents.inherited_metadata([linked]) == fields
    relative = write_parent(tmp_path / "b", **fields | {"license_link": "LICENSE"})
    assert parents.inherited_metadata([relative]) == {"license": "other", "license_name": "special"}
    monkeypatch.setattr(parents, "try_to_load_from_cache", lambda name, file: f"{relative}/{file}")
    assert parents.inherited_metadata(["some/llava"]) == fields | {
        "license_link": "https://huggingface.co/some/llava/blob/main/LICENSE"
    }


def test_a_parent_whose_card_cannot_be_read(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert parents.inherited_metadata([str(tmp_path)]) == {}
    assert parents.inherited_metadata([str(tmp_path / "absent"), "some/model"]) == {}
