"""`sparse-moe-vlm upcycle`: its output, its files, and its errors about mistakes."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.toolbox.commands.main import main
from modeling_sparse_moe_vlm.toolbox.upcycling import checkpoints, native_checkpoint
from modeling_sparse_moe_vlm.toolbox.upcycling.checkpoints import plan_checkpoint
from tests.support.in_tree_models import make_llava
from tests.support.models import TINY_DECODER, TINY_TOWER
from tests.support.processors import VOCAB_SIZE, assistant, make_image, make_image_processor, make_tokenizer, user
from tests.toolbox.upcycling.test_processors import make_llava_processor

LLAMA = TINY_DECODER | {"vocab_size": VOCAB_SIZE, "head_dim": 8}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    make_llava(LlamaConfig(**LLAMA)).save_pretrained(folder)
    make_llava_processor().save_pretrained(folder)
    return folder


def experts_of(folder):
    return json.loads((folder / "config.json").read_text())["experts_config"]


def test_writes_a_model_and_prints_its_description(dense, tmp_path, run_verb):
    printed = run_verb("upcycle", dense, "--output", tmp_path / "sparse", "--json", "--expert-groups", "joint")
    made = json.loads(printed)
    assert made["output"] == str(tmp_path / "sparse")
    assert made["start"] == experts_of(tmp_path / "sparse")["start"]
    assert made["start"]["parity"]["relative_difference"] < 1e-5
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "sparse", trust_remote_code=True)
    assert made["sparse"]["total"] == model.num_parameters()
    assert type(model).__name__ == made["model_class"] == "UpcycledLlavaForConditionalGeneration"


def test_a_dry_run_writes_nothing(dense, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    printed = run_here("upcycle.py", dense, "--dry-run", "--num-experts", "4", "--output", "sparse")
    assert printed == f"{plan_checkpoint(dense, num_experts=4)}\n"
    assert list(tmp_path.iterdir()) == []


def test_every_option_of_the_experts(dense, tmp_path, run_verb):
    groups = [{"name": "joint", "num_experts": 4}, {"name": "image", "num_experts": 2, "modalities": ["image"]}]
    run_verb(
        *("upcycle", dense, "--output", tmp_path / "sparse", "--json", "--expert-groups", json.dumps(groups)),
        *("--num-experts-per-tok", 2, "--start", "split", "--granularity", 2, "--layers", "1", "--seed", 5),
        *("--set", "router_aux_loss_coef=1e-2", "--set", 'router_local_entropy_coef={"image": 0.5}'),
        *("--no-comparison", "--dtype", "bfloat16", "--max-shard-size", "60KB"),
    )
    experts = experts_of(tmp_path / "sparse")
    assert [(group["name"], group["num_experts"]) for group in experts["expert_groups"]] == [("joint", 4), ("image", 2)]
    assert (experts["num_experts_per_tok"], experts["mlp_only_layers"]) == (2, [0])
    assert (experts["router_aux_loss_coef"], experts["router_local_entropy_coef"]) == (0.01, {"image": 0.5})
    start = experts["start"]
    assert (start["name"], start["granularity"], start["seed"]) == ("split", 2, 5)
    assert "parity" not in start
    assert json.loads((tmp_path / "sparse/config.json").read_text())["dtype"] == "bfloat16"
    assert len(list((tmp_path / "sparse").glob("*.safetensors"))) > 1


def test_drop(dense, tmp_path, run_verb):
    run_verb(
        *("upcycle", dense, "--output", tmp_path / "sparse", "--expert-groups", "joint", "--num-experts", 2),
        *("--start", "drop", "--drop-ratio", 0.25, "--set", "router=sigmoid"),
    )
    experts = experts_of(tmp_path / "sparse")
    assert (experts["start"]["name"], experts["start"]["drop_ratio"]) == ("drop", 0.25)
    assert (experts["num_experts"], experts["router"]) == (2, "sigmoid")
    assert experts["start"]["parity"]["bound"] is None
    assert experts["start"]["parity"]["relative_difference"] > 1e-3


def test_router_rows_from_data(dense, tmp_path, run_verb):
    make_image().save(tmp_path / "a.png")
    messages = [user("What is it?"), assistant("the cat")]
    messages[0]["content"].insert(0, {"type": "image"})
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages, "images": [str(tmp_path / "a.png")]}))
    options = ["--router-init", "data", "--data", tmp_path / "rows.jsonl", "--num-experts", 2]
    start = json.loads(run_verb("upcycle", dense, "--output", tmp_path / "sparse", "--json", *options))["start"]
    assert start["router_init"] == "data"
    assert start["parity"]["batch"] == "given"


def test_of_parts(tmp_path, run_verb):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "text")
    make_tokenizer().save_pretrained(tmp_path / "text")
    SiglipVisionModel(SiglipVisionConfig(**TINY_TOWER, vision_use_head=False)).save_pretrained(tmp_path / "vision")
    make_image_processor().save_pretrained(tmp_path / "vision")
    for part in ("text", "vision"):
        (tmp_path / part / "README.md").write_text("---\nlicense: mit\n---\n")
    parts = ["--text", tmp_path / "text", "--vision", tmp_path / "vision"]
    made = json.loads(run_verb("upcycle", *parts, "--output", tmp_path / "sparse", "--json", "--num-experts", 4))
    assert (made["model_class"], made["processor"]) == (
        SparseMoeVlmForConditionalGeneration.__name__,
        "SparseMoeVlmProcessor",
    )
    assert made["source"] == f"{tmp_path / 'text'} + {tmp_path / 'vision'}"
    model = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path / "sparse")
    assert model.config.text_config.num_experts == 4
    assert made["start"] == model.config.text_config.start
    assert {"name": "residual", "seed": 0, "base_model": str(tmp_path / "text")}.items() <= made["start"].items()
    assert made["sparse"]["total"] == model.num_parameters()
    assert (tmp_path / "sparse/processor_config.json").exists()
    card = ModelCard.load(tmp_path / "sparse/README.md")
    assert card.data.license == "mit"
    assert card.data.tags == ["moe", "vision-language", "upcycled", "custom_code"]
    assert "The decoder was made from the language model `text` by upcycling" in card.text, "without paths"
    assert "The vision tower is that of `vision`." in card.text
    assert "Start of the experts: residual (router rows random, seed 0)." in card.text
    assert "Before any training: parity on" in card.text
    assert card.text.count('.from_pretrained("sparse", trust_remote_code=True)') == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a source, or --text (and --vision) instead of it."),
        (["dense", "--text", "text"], "give either a source, or --text"),
        (["--vision", "vision"], "--vision needs --text, a language model."),
        (["dense"], "--output is needed: a folder for the sparse model (or --dry-run)."),
        (["--text", "text", "--output", "new", "--native"], "--native cannot be combined with --text."),
        (["--text", "text", "--dry-run"], "--dry-run cannot be combined with --text."),
        (["--text", "text", "--output", "new", "--gguf-file", "a"], "--gguf-file cannot be combined with --text."),
        (["dense", "--output", "new", "--router-init", "data"], "--router-init data needs --data"),
        (["dense", "--output", "new", "--set", "router"], "--set: 'router' is not of the form FIELD=VALUE."),
        (
            ["dense", "--output", "new", "--set", "layers=[1]"],
            "--set layers=…: it is not a field of the experts' configuration, but an option: see --help.",
        ),
        (["dense", "--output", "new", "--set", "compare=false"], "--set compare=…: it is not a field of the experts'"),
        (["dense", "--output", "new", "--set", "hidden_size=64"], "`hidden_size` is taken from the dense model"),
        (["dense", "--output", "new", "--set", "routers=1"], "`routers` is not a field of the experts' configuration"),
        (["dense", "--output", "new", "--layers", "0-a"], "--layers: '0-a' is not a layer or a range of layers"),
        (["dense", "--output", "new", "--layers", "3-1"], "--layers: '3-1' contains no layer: write 1-3."),
        (["dense", "--output", "new", "--layers", "2,3"], "`layers` must be decoder layers, 0 to 1, got [2, 3]."),
        (["dense", "--output", "new", "--expert-groups", "[1"], "--expert-groups is not JSON: "),
        (["dense", "--output", "new", "--expert-groups", "{}"], "--expert-groups must be the name of an arrangement"),
        (["dense", "--output", "new", "--expert-groups", "mixed"], "must be one of hybrid, joint, isolated"),
        (["dense", "--output", "new", "--start", "clone"], "`start` must be one of"),
        (["dense", "--output", "dense", "--overwrite"], "dense is the folder of the dense model"),
        (["dense", "--output", "other"], "other already contains a model (config.json)"),
        (["dense", "--output", "other/config.json"], "other/config.json is a file"),
        (["other", "--output", "new"], "is not gated"),
        (["dense", "--output", "new", "--dtype", "float99"], "such as \"bfloat16\", got 'float99'"),
    ],
)
def test_mistakes(arguments, message, dense, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dense").symlink_to(dense)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1}')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(["upcycle", *arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_native_models_of_dense_and_of_upcycled_ones(dense, tmp_path, run_verb):
    run_verb("upcycle", dense, "--output", tmp_path / "sparse", "--json", "--expert-groups", "joint")
    made = [
        json.loads(run_verb("upcycle", source, "--native", "--output", tmp_path / name, "--json", *options))
        for source, name, options in (
            (dense, "of_dense", ("--expert-groups", "joint")),
            (tmp_path / "sparse", "of_upcycled", ()),
        )
    ]
    assert [one["model_class"] for one in made] == ["LlavaForConditionalGeneration"] * 2
    assert made[0]["sparse"] == made[1]["sparse"]
    assert made[0]["dense"] == made[1]["dense"]
    states = [
        AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict()
        for name in ("of_dense", "of_upcycled")
    ]
    assert all(states[0][name].equal(tensor) for name, tensor in states[1].items())
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in states[0]
    assert AutoProcessor.from_pretrained(tmp_path / "of_upcycled").chat_template
    for name in ("of_dense", "of_upcycled"):
        card = ModelCard.load(tmp_path / name / "README.md")
        assert f"made from the dense model `{dense.name}` by upcycling" in card.text
        assert "saved as a `LlavaForConditionalGeneration`" in card.text
        assert "Before any training: parity on" in card.text
        assert f'AutoProcessor.from_pretrained("{name}")' in card.text


@pytest.fixture
def no_weights_are_read(monkeypatch):
    for owner, name in ((checkpoints, "upcycle"), (native_checkpoint, "to_native"), (checkpoints, "DenseCheckpoint")):
        monkeypatch.setattr(owner, name, None)
    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", None)


@pytest.mark.usefixtures("no_weights_are_read")
@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--native",), "`expert_groups['text']` serves text only"),
        (("--native", "--expert-groups", "joint", "--set", "router=top_p"), '`router` is "top_p"'),
        (("--data", "absent.jsonl"), "absent.jsonl"),
        (("--data", "rows.jsonl"), "rows.jsonl, line 1 must be an object with `messages`"),
        (("--data", "images.jsonl"), "row 0 has 0 images in `images`, but 1 placeholders in `messages`"),
        (("--router-init", "data"), "--router-init data needs --data"),
        (("--dtype", "int8"), "`dtype` must be"),
        (("--max-shard-size", "5 apples"), '`max_shard_size` must be a number of bytes, or a text such as "5GB"'),
        (("--output", "other"), "other already contains a model"),
        (("--parity-bound", "-1"), "`parity_bound` must be a number of at least 0, got -1.0"),
        (("--seed", "0", "--set", "seed=1"), "--set seed=…: it is not a field"),
    ],
)
def test_requests_are_refused_before_weights_are_read(options, message, dry_run, dense, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").touch()
    (tmp_path / "rows.jsonl").write_text("[]\n")
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    (tmp_path / "images.jsonl").write_text(json.dumps({"messages": messages}))
    before = sorted(tmp_path.rglob("*"))
    arguments = ["upcycle", str(dense), "--output", "new", *options, *(["--dry-run"] if dry_run else [])]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_of_native_models(dense, tmp_path, capsys):
    joint = ("--expert-groups", "joint", "--set", "router_bias_update_rate=1e-3", "--json")
    planned, made = [], []
    for source, options in ((dense, joint), (tmp_path / "sparse", ("--json",))):
        if source != dense:
            main(["upcycle", str(dense), "--output", str(source), *joint])
            capsys.readouterr()
        for outcomes, more in ((planned, ["--dry-run"]), (made, ["--output", str(tmp_path / f"{source.name}-twin")])):
            main(["upcycle", str(source), "--native", *options, *more])
            printed = capsys.readouterr()
            outcomes.append(json.loads(printed.out))
            assert ("dry run: nothing was written" in printed.err) == (more == ["--dry-run"])
    for of_dry_run, of_run in zip(planned, made, strict=True):
        assert of_dry_run["model_class"] == "LlavaForConditionalGeneration"
        assert (of_dry_run["output"], of_dry_run["processor"]) == (None, None)
        assert {"name": "copy", "seed": 0, "router_init": "random"}.items() <= of_dry_run["start"].items()
        assert {name: of_dry_run[name] for name in ("source", "model_class", "dense", "sparse")} == {
            name: of_run[name] for name in ("source", "model_class", "dense", "sparse")
        }


@pytest.mark.parametrize(
    "option", [("--num-experts", "4"), ("--seed", "1"), ("--no-comparison",), ("--set", "router=x")]
)
def test_native_models_of_upcycled_ones_accept_no_options_of_upcycling(option, dense, tmp_path, capsys, run_verb):
    run_verb("upcycle", dense, "--output", tmp_path / "sparse", "--json", "--expert-groups", "joint")
    with pytest.raises(SystemExit):
        main(["upcycle", str(tmp_path / "sparse"), "--native", "--output", str(tmp_path / "twin"), *option])
    assert (
        f"sparse is upcycled already, and --native only exports it to a class of Transformers: leave out {option[0]}."
        in (capsys.readouterr().err)
    )
    assert not (tmp_path / "twin").exists()
