"""The processor of a model from parts: the chats of the tokenizer, with images."""

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessorPil, CLIPVisionConfig

from modeling_sparse_moe_vlm import SparseMoeVlmProcessor
from modeling_sparse_moe_vlm.processing_sparse_moe_vlm import DEFAULT_CHAT_TEMPLATE
from modeling_sparse_moe_vlm.toolbox.upcycling.errors import UpcyclingError
from modeling_sparse_moe_vlm.toolbox.upcycling.from_parts import upcycle_from_parts
from modeling_sparse_moe_vlm.toolbox.upcycling.parts_processor import processor_from_parts
from tests.support.models import TINY_TOWER
from tests.support.processors import make_image, make_image_processor, make_tokenizer
from tests.toolbox.upcycling.test_from_parts import make_dense

# Begins with a line break, adds a system message if there is none, and reads contents as text.
TEMPLATE = """
{% if messages[0]['role'] != 'system' %}[sys]Be brief.
{% endif %}
{% for message in messages %}
<|im_start|>{{ message['role'].upper() + ': ' + message.content | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>ASSISTANT: {% endif %}"""


def make_parts(template: str | None = TEMPLATE):
    tokenizer = make_tokenizer(image_token="<picture>")
    tokenizer.chat_template = template
    tower = AutoModel.from_config(CLIPVisionConfig(**TINY_TOWER))
    model = upcycle_from_parts(make_dense(vocab_size=len(tokenizer)), tower, tokenizer=tokenizer)
    return model, tokenizer


def render(processor, messages, **kwargs) -> str:
    return processor.apply_chat_template(messages, add_generation_prompt=True, **kwargs)


def test_text_chats_equal_those_of_the_tokenizer():
    model, tokenizer = make_parts()
    processor = processor_from_parts(model, tokenizer, make_image_processor())
    assert type(processor) is SparseMoeVlmProcessor
    chats = [
        [{"role": "user", "content": " the cat "}],
        [
            {"role": "system", "content": "sat"},
            {"role": "user", "content": "on"},
            {"role": "assistant", "content": "mat"},
        ],
    ]
    for messages in chats:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render(processor, messages) == expected
        parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
        assert render(processor, parts) == expected


def test_images_are_inserted_in_the_text_of_a_message():
    model, tokenizer = make_parts()
    processor = processor_from_parts(model, tokenizer, make_image_processor())
    content = [
        {"type": "text", "text": "the "},
        {"type": "image", "image": make_image(0)},
        {"type": "text", "text": " and "},
        {"type": "image", "image": make_image(1)},
    ]
    messages = [{"role": "user", "content": content}]
    expected = "\n[sys]Be brief.\n<|im_start|>USER: the <image> and <image><|im_end|>\n<|im_start|>ASSISTANT: "
    assert render(processor, messages) == expected
    inputs = render(processor, messages, tokenize=True, return_dict=True, return_tensors="pt")
    is_image = inputs["input_ids"] == model.config.image_token_id
    assert is_image.sum() == 2 * model.config.image_seq_length == 8
    assert torch.equal(inputs["mm_token_type_ids"], is_image.long())
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert model(**inputs).logits.isfinite().all()
    with pytest.raises(Exception, match="content parts must be of type 'text' or 'image', got 'sound'"):
        render(processor, [{"role": "user", "content": [{"type": "sound"}]}])


def test_templates_by_name_also_accept_images():
    model, tokenizer = make_parts({"default": TEMPLATE, "short": "{{ messages[-1]['content'] }}"})
    processor = processor_from_parts(model, tokenizer, make_image_processor())
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "cat"}]}]
    assert render(processor, messages, chat_template="short") == "<image>cat"
    assert "USER: <image>cat<|im_end|>" in render(processor, messages)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_given_template_or_none(template):
    model, tokenizer = make_parts(template)
    own = "{{ messages | length }}"
    assert processor_from_parts(model, tokenizer, make_image_processor(), chat_template=own).chat_template == own
    if template is None:
        assert processor_from_parts(model, tokenizer, make_image_processor()).chat_template == DEFAULT_CHAT_TEMPLATE


def test_model_and_processor_are_loaded_from_a_folder(tmp_path):
    model, tokenizer = make_parts()
    processor = processor_from_parts(model, tokenizer, make_image_processor())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    messages = [{"role": "user", "content": [{"type": "image", "image": make_image()}, {"type": "text", "text": "a"}]}]
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected, actual = (render(each, messages, **kwargs) for each in (processor, loaded))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    answers = [each.generate(**expected, max_new_tokens=5, do_sample=False) for each in (model, again)]
    assert torch.equal(answers[0], answers[1])
    assert model.config.image_token_id not in answers[0][0, expected["input_ids"].shape[1] :]


def test_parts_that_do_not_fit_the_model_are_refused():
    model, tokenizer = make_parts()
    with pytest.raises(UpcyclingError, match=r"'<image>' has the id None in the tokenizer, but .* is 280"):
        processor_from_parts(model, make_tokenizer(image_token="<picture>"), make_image_processor())
    with pytest.raises(UpcyclingError, match=r"'<picture>' has the id 3 in the tokenizer"):
        processor_from_parts(model, tokenizer, make_image_processor(), image_token="<picture>")
    keeps_shape = CLIPImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False)
    with pytest.raises(UpcyclingError, match="makes images of 16 × 32 pixels"):
        processor_from_parts(model, tokenizer, keeps_shape)
    with pytest.raises(UpcyclingError, match="makes images of 24 × 24 pixels, but the vision encoder takes 16 × 16"):
        processor_from_parts(model, tokenizer, make_image_processor(size=24))
