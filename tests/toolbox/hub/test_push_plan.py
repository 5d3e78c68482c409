"""What is uploaded of a checkpoint, without a network: which files, and with which content."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config
from modeling_sparse_moe_vlm.toolbox.hub import PushError, plan_push, push_files, write_model_card
from modeling_sparse_moe_vlm.toolbox.shipped_files import PACKAGE
from modeling_sparse_moe_vlm.toolbox.upcycling import to_native, upcycle
from tests.support.in_tree_models import make_llava, prepare
from tests.support.models import TINY_DECODER
from tests.support.processors import VOCAB_SIZE, make_processor, make_speaking_model, make_tokenizer
from tests.support.retrieval import make_retrieval_model
from tests.toolbox.upcycling.test_processors import make_llava_processor

ROOT = PACKAGE.parent
PROCESSOR = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
MODEL = {"config.json", "model.safetensors", "README.md", "generation_config.json"}
CARD = "---\nlicense: mit\n---\n"
TOKEN = "hf_" + "aB3" * 11
PRIVATE = "/home/someone/models/base"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of all kinds, which tests copy."""
    root = tmp_path_factory.mktemp("saved")
    own = make_speaking_model()
    for name, model, processor in (
        ("own", own, make_processor()),
        ("retrieval", make_retrieval_model(), make_processor()),
    ):
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    torch.manual_seed(0)
    dense = prepare(make_llava(LlamaConfig(**TINY_DECODER | {"vocab_size": VOCAB_SIZE, "head_dim": 8})))
    dense.name_or_path = PRIVATE
    upcycle(dense, "isolated", num_experts=4).save_pretrained(root / "upcycled")
    make_llava_processor().save_pretrained(root / "upcycled")
    language_model = LlamaForCausalLM(LlamaConfig(**TINY_DECODER | {"vocab_size": VOCAB_SIZE}))
    to_native(upcycle(language_model, "joint", num_experts=4)).save_pretrained(root / "native")
    make_tokenizer().save_pretrained(root / "native")
    get_peft_model(own, expert_lora_config(own)).save_pretrained(root / "adapter")
    return root


@pytest.fixture
def copy(saved, tmp_path):
    import shutil

    return lambda name: Path(shutil.copytree(saved / name, tmp_path / name))


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def code(folder):
    return {path.name for path in folder.glob("*.py")}


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("own", {"LICENSE-CODE"}),
        (
            "retrieval",
            {"LICENSE-CODE", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"},
        ),
        ("upcycled", {"LICENSE-CODE"}),
        ("native", set()),
    ],
)
def test_all_files_of_a_model_and_nothing_else(name, others, copy):
    folder = copy(name)
    private = ["optimizer.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "events.out.tfevents"]
    for junk in [*private, "notes.py", ".cache"]:
        (folder / junk).write_bytes(b"private")
    (folder / "__pycache__").mkdir()
    (folder / "checkpoint-1").mkdir()
    plan = plan_push(folder, "user/model")
    expected = MODEL | others | (PROCESSOR if name != "native" else {"tokenizer.json", "tokenizer_config.json"})
    expected |= code(folder) - {"notes.py"}
    if name == "retrieval":
        expected.remove("generation_config.json")
    assert plan.files.keys() == expected
    assert list(plan.files) == sorted(plan.files)
    assert plan.kind == "model"
    assert sorted([*private, "notes.py", ".cache", "__pycache__/", "checkpoint-1/"]) == plan.left_out
    for file in plan.files.values():
        content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        assert file.size == len(content)
        assert str(folder).encode() not in content
        assert PRIVATE.encode() not in content
    assert plan.size == sum(file.size for file in plan.files.values())
    assert not (folder / "README.md").exists()  # the folder does not change
    assert 'from_pretrained("user/model"' in plan.files["README.md"].text


def test_base_models_on_this_machine_are_removed(copy):
    folder = copy("upcycled")
    write_model_card(folder)
    card = folder / "README.md"
    assert PRIVATE not in card.read_text()
    card.write_text(card.read_text() + f"\nMade from {PRIVATE}.\n")  # as a user may write
    plan = plan_push(folder, "user/model")
    config = json.loads(plan.files["config.json"].text)
    assert "base_model" not in config["experts_config"]["start"]
    assert config["experts_config"]["start"]["name"] == "copy"
    assert "made from the dense model `base` by upcycling" in plan.files["README.md"].text
    assert "config.json: paths of this machine removed (experts_config.start.base_model)" in plan.notes
    assert f"README.md: paths of this machine shortened ({PRIVATE})" in plan.notes
    unchanged = json.loads((folder / "config.json").read_text())
    assert unchanged["experts_config"]["start"].pop("base_model") == PRIVATE
    assert config == unchanged


@pytest.mark.parametrize(
    ("base", "kept"),
    [
        ("user/base", "user/base"),
        ("/root/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/0123abc", "Qwen/Qwen3-0.6B"),
        ("outputs/demo/model", None),
        ("../base", None),
        ("C:\\models\\base", None),
    ],
)
def test_base_models_on_the_hub_are_kept(base, kept, copy):
    folder = copy("upcycled")
    config = json.loads((folder / "config.json").read_text())
    config["experts_config"]["start"]["base_model"] = base
    (folder / "config.json").write_text(json.dumps(config))
    plan = plan_push(folder, "user/model")
    assert json.loads(plan.files["config.json"].text)["experts_config"]["start"].get("base_model") == kept


def test_origins_are_removed(copy):
    folder = copy("native")
    edit(folder / "config.json", _name_or_path="/data/model")
    edit(folder / "tokenizer_config.json", name_or_path="/tmp/tokenizer", tokenizer_file="user/tokenizer")
    plan = plan_push(folder, "user/model")
    assert "_name_or_path" not in json.loads(plan.files["config.json"].text)
    tokenizer = json.loads(plan.files["tokenizer_config.json"].text)
    assert "name_or_path" not in tokenizer
    assert tokenizer["tokenizer_file"] == "user/tokenizer"
    assert plan.notes[1:3] == [
        "config.json: paths of this machine removed (_name_or_path)",
        "tokenizer_config.json: paths of this machine removed (name_or_path)",
    ]


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        (
            "config.json",
            {"a": [{"data": "/mnt/data/x"}]},
            r"config\.json .* in the field `a\[0\]\.data` \(/mnt/data/x\)",
        ),
        ("generation_config.json", {"hub_token": "x"}, r"generation_config\.json .* the field `hub_token`"),
        ("tokenizer_config.json", {"note": f"key {TOKEN}"}, r"tokenizer_config\.json, line 1, .*\(hf_aB3…\)"),
        ("tokenizer.json", {"note": TOKEN}, r"tokenizer\.json, line 1, contains an access token"),
    ],
)
def test_tokens_and_paths_in_configurations_are_refused(file, fields, message, copy):
    folder = copy("native")
    edit(folder / file, **fields)
    with pytest.raises(PushError, match=message) as raised:
        plan_push(folder, "user/model")
    assert TOKEN not in str(raised.value)


@pytest.mark.parametrize(
    "secret",
    [TOKEN, "ghp_" + "a" * 36, "AKIA" + "A" * 16, "-----BEGIN RSA PRIVATE KEY-----", "https://me:pass@example.org"],
)
def test_tokens_in_texts_are_refused(secret, copy):
    folder = copy("native")
    (folder / "README.md").write_text(f"# Model\n\nLog in with {secret}\n")
    with pytest.raises(PushError, match=r"README\.md, line 3, contains an access token or a password"):
        plan_push(folder, "user/model")


def test_the_token_in_use_is_refused(copy, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "own-token")
    folder = copy("own")
    with (folder / "connector.py").open("a") as file:
        file.write("\n# own-token\n")
    with pytest.raises(PushError, match=r"connector\.py, line \d+, contains an access token"):
        plan_push(folder, "user/model")


@pytest.mark.parametrize("value", [TOKEN, "/home/someone/run"])
def test_metadata_of_weights_are_checked(value, copy):
    folder = copy("native")
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"run": value})
    with pytest.raises(PushError, match=r"model\.safetensors \(metadata 'run'\)"):
        plan_push(folder, "user/model")


def test_paths_in_cards_are_shortened(copy, tmp_path, monkeypatch):
    folder = copy("native")
    monkeypatch.chdir(tmp_path)
    text = f"Data: /home/me/data/train.jsonl, ~/x/y.json. Saved in {folder}, {tmp_path}/runs/a/metrics.json, from "
    text += "`C:\\data\\b.csv`. See https://example.org/home/page and a/data/b."
    (folder / "README.md").write_text(text)
    shown = plan_push(folder, "user/model").files["README.md"].text
    assert shown == (
        "Data: train.jsonl, y.json. Saved in user/model, metrics.json, from `b.csv`. "
        "See https://example.org/home/page and a/data/b."
    )


def test_cards_call_the_model_by_its_name_on_the_hub(copy):
    folder = copy("native")
    card = "---\nmodel_name: {short}\nmodel-index:\n- name: {short}\n---\n# {short}\n\n## native too\n"
    card += (
        'AutoModel.from_pretrained(\'{long}\')\nSentenceTransformer("{long}")\nfrom_pretrained("native-2")\nnative\n'
    )
    (folder / "README.md").write_text(card.format(short="native", long="native"))
    shown = plan_push(folder, "user/model").files["README.md"].text
    assert shown == card.format(short="model", long="user/model")


def test_missing_code_is_completed(copy):
    folder = copy("own")
    names = code(folder)
    for name in names - {"routing.py"}:
        (folder / name).unlink()
    plan = plan_push(folder, "user/model")
    assert {name for name in plan.files if name.endswith(".py")} == names
    for name in names:
        assert plan.files[name].content.read_bytes() == (PACKAGE / name).read_bytes()
    assert any(
        "modeling_sparse_moe_vlm.py" in note and "added from the installed package" in note for note in plan.notes
    )
    (folder / "routing.py").write_text("# another version\n")
    with pytest.raises(PushError, match=r"another version of this package \(routing\.py differs\)"):
        plan_push(folder, "user/model")
    (folder / "routing.py").unlink()
    edit(folder / "config.json", auto_map={"AutoConfig": "unknown.Config"})
    with pytest.raises(PushError, match=r"lacks .*unknown\.py, .* since unknown\.py is not a file of this package"):
        plan_push(folder, "user/model")
    edit(folder / "config.json", auto_map={"AutoConfig": "user/other--configuration.Config"})
    with pytest.raises(PushError, match="takes its code from the repository user/other"):
        plan_push(folder, "user/model")


def test_without_auto_map(copy):
    folder = copy("upcycled")
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PushError, match="has no `auto_map`"):
        plan_push(folder, "user/model")


@pytest.mark.parametrize(
    ("name", "removed", "message"),
    [
        ("own", PROCESSOR, r"has no processor: save it there with `processor\.save_pretrained"),
        ("own", {"processor_config.json"}, "has a tokenizer, but no processor for images"),
        ("native", {"tokenizer.json", "tokenizer_config.json"}, "has no tokenizer: save it there"),
        ("native", {"model.safetensors"}, r"has no weights \(model\.safetensors\): save the model there"),
        ("native", {"config.json"}, r"is not the folder of a model or an adapter: it has neither"),
        ("adapter", {"adapter_model.safetensors"}, r"has no weights \(adapter_model\.safetensors\)"),
    ],
)
def test_missing_files_are_errors(name, removed, message, copy):
    folder = copy(name)
    for file in removed:
        (folder / file).unlink()
    with pytest.raises(PushError, match=message):
        plan_push(folder, "user/model", base_model="user/base" if name == "adapter" else None)


def test_pickles_are_refused(copy):
    folder = copy("native")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(PushError, match=r"as a pickle \(pytorch_model\.bin\), which can contain code"):
        plan_push(folder, "user/model")


def test_damaged_weights_are_refused(copy):
    folder = copy("native")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=r"model\.safetensors is incomplete"):
        plan_push(folder, "user/model")


def test_files_that_are_too_large_are_refused(copy, monkeypatch):
    folder = copy("native")
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(push_files, "MAX_FILE_SIZE", size)
    assert "model.safetensors" in plan_push(folder, "user/model").files
    monkeypatch.setattr(push_files, "MAX_FILE_SIZE", size - 1)
    with pytest.raises(PushError, match=r"model\.safetensors has 0\.0 GB, .* at most 50 GB: .*max_shard_size"):
        plan_push(folder, "user/model")


def test_the_folder_of_a_run(copy, tmp_path):
    copy("native")
    with pytest.raises(PushError, match=f"did you mean {tmp_path / 'native'}\\?"):
        plan_push(tmp_path, "user/model")
    with pytest.raises(PushError, match="There is no folder"):
        plan_push(tmp_path / "absent", "user/model")


@pytest.mark.parametrize("name", ["model", "user/", "a/b/c", "user/mo del"])
def test_names_of_repositories(name, copy):
    with pytest.raises(PushError, match=f"named as in `user/name`, but got '{name}'"):
        plan_push(copy("native"), name)


def test_licences(copy):
    folder, apache = copy("own"), (ROOT / "LICENSE").read_bytes()
    plan = plan_push(folder, "user/model")  # nothing is known about the data
    assert (plan.files.keys() & {"LICENSE"}, plan.files["LICENSE-CODE"].content) == (set(), apache)
    assert "names no licence" in plan.notes[-1]
    (folder / "recipe.yaml").write_text("model: tiny.json\ntraining: {learning_rate: 0.25}\n")  # on the built-in data
    plan = plan_push(folder, "user/model")
    assert plan.files["LICENSE"].content == apache
    assert "learning_rate: 0.25" in plan.files["README.md"].text
    assert plan.left_out == ["recipe.yaml"]
    (folder / "LICENSE").write_text("changed")
    assert plan_push(folder, "user/model").files["LICENSE"].content == folder / "LICENSE"
    (folder / "LICENSE").unlink()
    (folder / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE.md\n---\n")
    with pytest.raises(PushError, match=r"README\.md refers to the licence 'LICENSE\.md', which is missing"):
        plan_push(folder, "user/model")
    (folder / "LICENSE.md").write_text("own")
    plan = plan_push(folder, "user/model")
    assert {name for name in plan.files if "LICENSE" in name} == {"LICENSE.md", "LICENSE-CODE"}
    assert plan.files["LICENSE-CODE"].content == apache
    assert not [note for note in plan.notes if "names no licence" in note]
    (folder / "README.md").write_text("# Model\n")
    assert "names no licence" in plan_push(folder, "user/model").notes[-1]


def test_adapters(copy, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("it used the network"))
    folder = copy("adapter")
    with pytest.raises(PushError, match="does not name the base model of the adapter"):
        plan_push(folder, "user/adapter")
    plan = plan_push(folder, "user/adapter", base_model="user/base")
    assert plan.kind == "adapter"
    assert plan.files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    old, new = (
        json.loads(text)
        for text in ((folder / "adapter_config.json").read_text(), plan.files["adapter_config.json"].text)
    )
    assert new == old | {"base_model_name_or_path": "user/base"}
    card = plan.files["README.md"].text
    assert "More Information Needed" not in card  # the empty template of PEFT, which is in the folder
    for line in ("base_model: user/base", "base_model_relation: adapter", "library_name: peft"):
        assert f"\n{line}\n" in card
    assert "A LoRA adapter of rank 8 for [user/base](https://huggingface.co/user/base)." in card
    assert 'AutoModelForImageTextToText.from_pretrained("user/base", trust_remote_code=True)' in card
    assert 'PeftModel.from_pretrained(base, "user/adapter")' in card


def test_processors_and_weights_of_adapters(copy):
    folder = copy("adapter")
    make_processor().save_pretrained(folder)
    edit(folder / "tokenizer_config.json", name_or_path="/home/me/base")
    plan = plan_push(folder, "user/adapter", base_model="user/base")
    assert plan.files.keys() >= PROCESSOR | {"processing_sparse_moe_vlm.py", "image_reading.py", "LICENSE-CODE"}
    assert "modeling_sparse_moe_vlm.py" not in plan.files
    assert "name_or_path" not in json.loads(plan.files["tokenizer_config.json"].text)
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"run": TOKEN})
    with pytest.raises(PushError, match=r"adapter_model\.safetensors \(metadata 'run'\)"):
        plan_push(folder, "user/adapter", base_model="user/base")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=r"adapter_model\.safetensors is incomplete"):
        plan_push(folder, "user/adapter", base_model="user/base")


def test_vocabularies_with_parts_of_addresses_and_paths(copy):
    folder = copy("native")
    edit(folder / "tokenizer.json", parts=["http://", "@", "/home/", "/tmp/x"])
    tokens = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokens, separators=(",", ":")) + '\n["http://":1,"@":2]\n')
    assert plan_push(folder, "user/model").files["tokenizer.json"].content == folder / "tokenizer.json"


@pytest.mark.parametrize("base", ["/home/me/base", "outputs/demo/model"])
def test_adapters_of_local_models(base, copy):
    folder = copy("adapter")
    edit(folder / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(PushError, match=rf"a path of this machine \({base}\)"):
        plan_push(folder, "user/adapter")
    with pytest.raises(PushError, match=f"must be the name of a model on the Hub, but got '{base}'"):
        plan_push(folder, "user/adapter", base_model=base)
    with pytest.raises(PushError, match="only for adapters"):
        plan_push(copy("native"), "user/model", base_model="user/base")


def test_cards_of_adapters_are_kept(copy):
    folder = copy("adapter")
    edit(folder / "adapter_config.json", base_model_name_or_path="user/base", revision="v1")
    (folder / "README.md").write_text("---\nbase_model: ''\ntags:\n- 'base_model:adapter:'\n- mine\n---\nMy text\n")
    card = plan_push(folder, "user/adapter").files["README.md"].text
    assert "base_model: user/base" in card
    assert "- base_model:adapter:user/base" in card
    assert "- mine" in card
    assert card.endswith("My text\n")
    (folder / "README.md").unlink()
    card = plan_push(folder, "user/adapter").files["README.md"].text
    assert 'from_pretrained("user/base", revision="v1", trust_remote_code=True)' in card


def test_adapters_of_language_models(copy):
    model = LlamaForCausalLM(LlamaConfig(**TINY_DECODER | {"vocab_size": VOCAB_SIZE}))
    folder = copy("adapter")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    assert "AutoModelForCausalLM" in plan_push(folder, "user/adapter", base_model="user/base").files["README.md"].text


@pytest.mark.parametrize(
    ("task", "auto_class"), [("SEQ_CLS", "SequenceClassification"), ("CAUSAL_LM", "ImageTextToText")]
)
def test_adapters_with_a_task(task, auto_class, copy):
    """`CAUSAL_LM` is also the task of adapters for models with images."""
    folder = copy("adapter")
    mapping = {"base_model_class": "UpcycledLlavaForConditionalGeneration", "parent_library": "x"}
    edit(folder / "adapter_config.json", task_type=task, auto_mapping=mapping)
    card = plan_push(folder, "user/adapter", base_model="user/base").files["README.md"].text
    assert f'base = AutoModelFor{auto_class}.from_pretrained("user/base", trust_remote_code=True)' in card


def test_new_cards_of_adapters_contain_their_recipe(copy):
    folder = copy("adapter")
    (folder / "recipe.yaml").write_text("model: base\ndata: {train: some/questions}\n")
    card = plan_push(folder, "user/adapter", base_model="user/base").files["README.md"].text
    for text in (
        "\ndatasets:\n- some/questions\n",
        "| parameters | ",
        "\ndata:\n  train: some/questions\n",
        "@software{",
    ):
        assert text in card


def test_images_of_the_card(copy, tmp_path):
    folder = copy("native")
    for name in ("expert_load.png", "other.png", "assets/a.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x89PNG")
    (tmp_path / "private.png").write_bytes(b"private")
    plan = plan_push(folder, "user/model")  # with a new card, which shows what is known
    assert "![Load of the experts by layer and modality](expert_load.png)" in plan.files["README.md"].text
    assert plan.files["expert_load.png"].content == folder / "expert_load.png"
    assert plan.left_out == ["assets/", "other.png"]
    shown = '![A](./assets/a.jpg)\n<img width="9" src="absent.svg">\n![B](../private.png)\n![C](https://a.b/c.png)\n'
    (folder / "README.md").write_text(CARD + shown)
    plan = plan_push(folder, "user/model")
    assert {name for name in plan.files if not name.endswith((".json", ".safetensors"))} == {
        "README.md",
        "assets/a.jpg",
    }
    assert plan.left_out == ["expert_load.png", "other.png"]
    notes = [note for note in plan.notes if "shows" in note]
    assert notes == [
        f"README.md: shows {name}, which is not in the folder" for name in ("absent.svg", "../private.png")
    ]


def test_shards(copy):
    folder = copy("native")
    model = LlamaForCausalLM(LlamaConfig(**TINY_DECODER | {"vocab_size": VOCAB_SIZE}))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"left by an earlier save")
    plan = plan_push(folder, "user/model")
    assert {name for name in plan.files if name.startswith("model")} == shards | {"model.safetensors.index.json"}
    assert plan.left_out == ["model-00009-of-00009.safetensors"]
