"""The processor of a dense model is saved with the sparse one."""

import pytest
from transformers import AutoProcessor, AutoTokenizer, LlavaProcessor, PreTrainedTokenizerBase

from modeling_sparse_moe_vlm.toolbox.upcycling.processors import load_processor, save_processor
from tests.support.processors import make_image, make_image_processor, make_tokenizer, user

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
)


def make_llava_processor():
    return LlavaProcessor(
        make_image_processor(),
        make_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def test_a_processor(tmp_path):
    make_llava_processor().save_pretrained(tmp_path / "dense")
    save_processor(load_processor(tmp_path / "dense"), tmp_path / "sparse")
    dense, sparse = (AutoProcessor.from_pretrained(tmp_path / name) for name in ("dense", "sparse"))
    assert type(sparse) is LlavaProcessor
    assert sparse.chat_template == TEMPLATE
    messages = [[user(make_image(), "What is it?")]]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected, found = (processor.apply_chat_template(messages, **options) for processor in (dense, sparse))
    assert found.keys() == expected.keys()
    assert found["pixel_values"].equal(expected["pixel_values"])
    assert found["input_ids"].equal(expected["input_ids"])


def test_a_tokenizer(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "dense")
    processor = load_processor(tmp_path / "dense")
    assert isinstance(processor, PreTrainedTokenizerBase)
    save_processor(processor, tmp_path / "sparse")
    assert AutoTokenizer.from_pretrained(tmp_path / "sparse")("the cat").input_ids == processor("the cat").input_ids


def test_neither(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_processor(tmp_path) is None
    save_processor(None, tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()


def test_a_processor_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises((OSError, ValueError)):
        load_processor(tmp_path)
