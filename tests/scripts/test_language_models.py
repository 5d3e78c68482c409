"""The verbs of the command with language models: upcycled ones, and ours."""

import json

import pytest
import torch
from PIL import Image

from modeling_sparse_moe_vlm import SparseMoeVlmForCausalLM
from modeling_sparse_moe_vlm.toolbox.commands.main import main
from modeling_sparse_moe_vlm.toolbox.model_size import model_size
from tests.scripts.conftest import train_arguments
from tests.support.processors import make_speaking_config, make_tokenizer
from tests.support.upcycled import make_speaking

CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
ROW = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Where is "}, {"type": "text", "text": "the cat?"}]},
        {"role": "assistant", "content": "on the mat"},
    ]
}
SHORT_ROW = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "yes"}]}


def save(folder, model, template=None):
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


def continued(model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=5, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) + "\n"


@pytest.mark.parametrize(
    ("template", "text"), [(None, "Where is the cat?"), (CHAT, "<|im_start|>user\nWhere is the cat?")]
)
def test_generate(template, text, folder, run_verb):
    model, tokenizer = save(folder, make_speaking("llama"), template)
    arguments = ("generate", "--model", folder, "--question", "Where is the cat?", "--max-new-tokens", 5)
    assert run_verb(*arguments) == continued(model, tokenizer, text)


def test_generate_with_a_token_that_begins_texts(folder, run_verb):
    model, tokenizer = save(folder, make_speaking("llama"))
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(folder)
    arguments = ("generate", "--model", folder, "--question", "the cat", "--max-new-tokens", 5)
    assert run_verb(*arguments) == continued(model, tokenizer, "<|im_start|>the cat")


def test_generate_with_our_language_model(folder, run_verb):
    torch.manual_seed(0)
    model, tokenizer = save(folder, SparseMoeVlmForCausalLM(make_speaking_config().text_config).eval())
    arguments = ("generate", "--model", folder, "--question", "the cat", "--max-new-tokens", 5)
    assert run_verb(*arguments) == continued(model, tokenizer, "the cat")


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_routing_report(template, folder, tmp_path, run_verb):
    """Rows of unequal length are padded, and padding is not counted."""
    _, tokenizer = save(folder, make_speaking("llama", "joint", modalities=["text"]), template)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n{json.dumps(SHORT_ROW)}")
    printed = run_verb("routing-report", "--model", folder, "--rows", tmp_path / "rows.jsonl", "--json")
    rows = json.loads(printed)["rows"]
    assert [(row["place"], row["group"], row["modality"]) for row in rows] == [
        ("layer_0", "joint", "text"),
        ("layer_1", "joint", "text"),
    ]
    texts = [
        "<|im_start|>user\nWhere is the cat?<|im_start|>assistant\non the mat",
        "<|im_start|>user\nWhy?<|im_start|>assistant\nyes",
    ]
    assert rows[0]["num_tokens"] == sum(len(tokenizer(text).input_ids) for text in texts)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (None, "be kind\nWhere is the cat?"),
        (CHAT, "<|im_start|>system\nbe kind<|im_start|>user\nWhere is the cat?"),
    ],
)
def test_evaluate(template, text, folder, run_verb, tmp_path, capsys):
    model, tokenizer = save(folder, make_speaking("llama"), template)
    answer = continued(model, tokenizer, text).removesuffix("\n")
    row = {"messages": [{"role": "system", "content": "be kind"}, ROW["messages"][0]]}
    row["messages"].append({"role": "assistant", "content": answer})
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    options = ["--max-new-tokens", 5, "--output-dir", tmp_path / "out", "--metrics", "anls"]
    report = json.loads(run_verb("evaluate", folder, tmp_path / "rows.jsonl", *options, "--json"))
    assert report["models"]["model"] == {"scores": {"anls": 100}, "intervals": {"anls": [100, 100]}}

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "q", "answer": "a", "image": "a.png"}))
    with pytest.raises(SystemExit):
        run_verb("evaluate", folder, tmp_path / "rows.jsonl", *options)
    assert "rows.jsonl, row 0 has a part of type 'image', but the model only reads text" in capsys.readouterr().err


def test_info(folder, run_verb):
    model, _ = save(folder, make_speaking("llama", "isolated"))
    (found,) = json.loads(run_verb("info", folder, "--json"))
    assert found["total"] == model.num_parameters()
    assert found["active"] == model_size(model).active


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--question", "Why?", "--image", "a.png"), "is a language model, which reads no images: leave"),
        (("routing-report",), "is a language model (of type 'upcycled_llama'), which reads no images"),
        (("evaluate",), "is a language model (of type 'upcycled_llama'), which reads no images"),
        (("explain",), "is a model of type 'upcycled_llama'; this needs 'sparse_moe_vlm'"),
        (("routing-report", "--rows", "rows.jsonl"), "row 0 has a part of type 'image', but the model only reads text"),
    ],
)
def test_images_are_refused(arguments, message, folder, tmp_path, monkeypatch, capsys):
    save(folder, make_speaking("llama"), MARKED)
    monkeypatch.chdir(tmp_path)
    part = {"type": "image", "path": "a.png"}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": [part]}]}))
    verb, *options = arguments
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--model", str(folder), *options])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert printed.out == ""


@pytest.mark.parametrize("verb", ["train", "lora"])
def test_training_on_scenes_is_refused(verb, folder, tmp_path, capsys):
    save(folder, make_speaking("llama"), MARKED)
    arguments = train_arguments(tmp_path / "output") if verb == "train" else ["--output-dir", str(tmp_path / "output")]
    model = f"--set=model={folder}" if verb == "train" else f"--model={folder}"
    sizes = [] if verb == "train" else ["--set=data.num_train=44", "--set=data.num_heldout=11"]
    with pytest.raises(SystemExit) as stopped:
        main([verb, *arguments, model, *sizes])
    assert stopped.value.code == 2
    assert "is a language model (of type 'upcycled_llama'), which reads no images" in capsys.readouterr().err
