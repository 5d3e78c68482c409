"""Models and adapters of the web page."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_sparse_moe_vlm.toolbox.app.loading import load_adapters, load_model, max_length, parse_adapters
from tests.support.in_tree_models import TEXT, make_model
from tests.support.processors import make_processor, make_speaking_model, make_tokenizer
from tests.support.upcycled import make_speaking


def test_our_models(tmp_path):
    make_speaking_model().to(torch.bfloat16).save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    model, processor = load_model(str(tmp_path))
    assert model.config.text_config._attn_implementation == "eager"
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert processor.image_seq_length == 4


@pytest.mark.parametrize("kind", ["llava", "llama"])
def test_upcycled_models(kind, tmp_path):
    make_speaking(kind).save_pretrained(tmp_path)
    (make_processor() if kind == "llava" else make_tokenizer()).save_pretrained(tmp_path)
    model, processor = load_model(str(tmp_path))
    assert model.config.get_text_config()._attn_implementation == "eager"
    assert hasattr(processor, "image_processor") == (kind == "llava")
    assert type(model).__name__.startswith("Upcycled")


def test_language_models(tmp_path):
    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
    assert isinstance(model, LlamaForCausalLM)
    assert tokenizer("the").input_ids


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {}),
        (["a=b"], {"a": "b"}),
        (["es-1=adapters/es=1", "b_2=me/b"], {"es-1": "adapters/es=1", "b_2": "me/b"}),
    ],
)
def test_adapters_of_the_command(options, expected):
    assert parse_adapters(options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a"], "--adapter: 'a' must be NAME=PATH"),
        (["=b"], "--adapter: '=b' must be NAME=PATH"),
        (["a="], "--adapter: 'a=' must be NAME=PATH"),
        (["a.b=c"], "--adapter: 'a.b' cannot be a name"),
        (["../a=c"], r"--adapter: '\.\./a' cannot be a name"),
        (["none=c"], "--adapter: 'none' cannot be a name"),
        (["a=b", "a=c"], "--adapter: there are two adapters named 'a'"),
    ],
)
def test_wrong_adapters_of_the_command(options, message):
    with pytest.raises(ValueError, match=message):
        parse_adapters(options)


def test_adapters_that_cannot_be_loaded(tmp_path):
    with pytest.raises(OSError, match=r"adapter_config\.json is missing"):
        load_adapters(make_speaking_model(), {"a": str(tmp_path)})
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(OSError, match=r"adapter_config\.json is damaged"):
        load_adapters(make_speaking_model(), {"a": str(tmp_path)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match="must set `peft_type` to 'LORA', but it is 'IA3'"):
        load_adapters(make_speaking_model(), {"a": str(tmp_path)})


def test_max_length():
    model = make_model("llava")
    assert max_length(model) == 256
    assert max_length(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: object()))) is None
