import copy
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AddedToken,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from modeling_sparse_moe_vlm import SparseMoeVlmProcessor
from modeling_sparse_moe_vlm.chat_template import DEFAULT_CHAT_TEMPLATE
from modeling_sparse_moe_vlm.control_tokens import MARK
from tests.support.processors import (
    IMAGE_SEQ_LENGTH,
    assistant,
    make_image,
    make_image_processor,
    make_processor,
    make_speaking_model,
    make_tokenizer,
    user,
)

IMAGE, END, PAD = 3, 2, 0
# Tokenizers that normalise text in different ways before they split it.
NORMALIZERS = {
    "none": None,
    "lowercase": normalizers.Lowercase(),
    "nfkc": normalizers.NFKC(),
    "sequence": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "metaspace": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "bert": normalizers.BertNormalizer(),
}
# Reloaded processors use torchvision if it is installed. It resizes slightly differently than Pillow.
RESIZED = {"rtol": 0, "atol": 0.02}
CHAT = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.fixture(scope="module")
def processor() -> SparseMoeVlmProcessor:
    return make_processor()


def plain_ids(processor, text: str) -> list[int]:
    """Returns the ids of a text in which no special token is recognised."""
    return processor.tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]


# ------------------------------------------------------------------------------------------------ texts and images


def test_every_image_becomes_its_tokens_with_modality_ids(processor):
    images = [make_image(0), make_image(1)]
    inputs = processor(text="a<image>b<image>", images=images, return_tensors="pt")
    a, b = plain_ids(processor, "a"), plain_ids(processor, "b")
    expected = [*a, *[IMAGE] * IMAGE_SEQ_LENGTH, *b, *[IMAGE] * IMAGE_SEQ_LENGTH]
    assert sorted(inputs) == ["attention_mask", "input_ids", "mm_token_type_ids", "pixel_values"]
    assert inputs["input_ids"].tolist() == [expected]
    assert inputs["mm_token_type_ids"].tolist() == [[int(token == IMAGE) for token in expected]]
    separate = [processor(images=image, return_tensors="pt")["pixel_values"] for image in images]
    torch.testing.assert_close(inputs["pixel_values"], torch.cat(separate))


def test_batch_of_rows_with_and_without_images_is_padded_left(processor):
    texts = ["<image><image> which?", "hello", "a <image>"]
    images = [make_image(i) for i in range(3)]
    flat = processor(text=texts, images=images, padding=True, return_tensors="pt")
    nested = processor(text=texts, images=[images[:2], [], images[2]], padding=True, return_tensors="pt")
    assert flat.keys() == nested.keys()
    for key in flat:
        torch.testing.assert_close(flat[key], nested[key])
    assert flat["input_ids"][1, 0] == PAD
    assert flat["attention_mask"][1, 0] == 0
    assert flat["attention_mask"][:, -1].tolist() == [1, 1, 1]
    assert flat["mm_token_type_ids"].sum(dim=1).tolist() == [2 * IMAGE_SEQ_LENGTH, 0, IMAGE_SEQ_LENGTH]
    for row, (text, own) in enumerate(zip(texts, [images[:2], None, images[2:]], strict=True)):
        alone = processor(text=text, images=own)["input_ids"][0]
        assert flat["input_ids"][row].tolist()[-len(alone) :] == alone


def test_text_only_and_empty_list_of_images(processor):
    expected = processor(text="hello")
    assert sorted(expected) == ["attention_mask", "input_ids", "mm_token_type_ids"]
    for images in ([], (), [[]]):
        assert processor(text="hello", images=images).data == expected.data


@pytest.mark.parametrize(
    "image_processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        BitImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
    ],
    ids=["clip", "dinov2"],
)
def test_any_image_processor(image_processor, tmp_path):
    processor = SparseMoeVlmProcessor(image_processor, make_tokenizer(), image_seq_length=IMAGE_SEQ_LENGTH)
    inputs = processor(text="<image>?", images=make_image(), return_tensors="pt")
    expected = image_processor(make_image(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values"], expected)
    processor.save_pretrained(tmp_path)
    reloaded = SparseMoeVlmProcessor.from_pretrained(tmp_path)
    assert type(reloaded.image_processor).__name__.startswith(type(image_processor).__name__.removesuffix("Pil"))
    actual = reloaded(text="<image>?", images=make_image(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(actual, expected, **RESIZED)


def test_token_type_ids_of_a_tokenizer_are_not_passed_on():
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in tokenizer("a")
    processor = SparseMoeVlmProcessor(make_image_processor(), tokenizer, image_seq_length=IMAGE_SEQ_LENGTH)
    assert "token_type_ids" not in processor(text="a")
    assert "token_type_ids" not in processor.model_input_names


def test_number_of_image_tokens_for_serving_engines(processor):
    data = processor._get_num_multimodal_tokens(image_sizes=[[10, 20], [300, 7]])
    assert data["num_image_tokens"] == [IMAGE_SEQ_LENGTH] * 2
    assert data["num_image_patches"] == [1, 1]


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("text", "num_images", "message"),
    [
        ("<image>", 2, "1 tokens, but 2 images"),
        ("<image><image>", 1, "2 tokens, but 1 images"),
        ("<image>", 0, "1 tokens, but 0 images"),
        ("none", 1, "0 tokens, but 1 images"),
        (["<image>", "a"], 2, "1 tokens, but 2 images"),
    ],
)
def test_numbers_that_disagree(processor, text, num_images, message):
    images = [make_image(i) for i in range(num_images)] or None
    with pytest.raises(ValueError, match=f"the number of <image> tokens in the prompts should be .*{message}"):
        processor(text=text, images=images)


def test_numbers_that_disagree_in_a_row_although_the_sums_agree(processor):
    a, b, c = (make_image(i) for i in range(3))
    with pytest.raises(ValueError, match=r"text\[0\] has 1 tokens, but 2 images"):
        processor(text=["<image>", "<image><image>"], images=[[a, b], [c]])
    with pytest.raises(ValueError, match="`images` is for 2 texts, but `text` has 1"):
        processor(text="<image><image>", images=[[a], [b]])
    with pytest.raises(ValueError, match=r"text\[1\] has 1 tokens, but 0 images"):
        processor.apply_chat_template([[user(a)], [{"role": "user", "content": [{"type": "image"}]}]], **CHAT)


@pytest.mark.parametrize("text", ["", [], ["a", ""], [""], 5, [["a"]], [None]])
def test_empty_and_wrong_texts(processor, text):
    with pytest.raises(ValueError, match=r"`text` is empty|`text` must be non-empty strings"):
        processor(text=text)


def test_texts_with_lone_surrogates(processor):
    with pytest.raises(ValueError, match=r"text\[1\] contains a lone surrogate \(at character 1\)"):
        processor(text=["a", "b\ud800"])


@pytest.mark.parametrize("kind", ["videos", "audio"])
def test_other_modalities_are_refused(processor, kind):
    with pytest.raises(ValueError, match="neither `videos` nor `audio`"):
        processor(text="a", **{kind: [np.zeros((4, 8, 8, 3))]})


def test_no_inputs_at_all(processor):
    with pytest.raises(ValueError, match="at least one input"):
        processor()
    with pytest.raises(ValueError, match="`conversation` is empty"):
        processor.apply_chat_template([])


def test_constructor_errors():
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"vocabulary lacks the image token '<picture>'.*add_special_tokens"):
        SparseMoeVlmProcessor(make_image_processor(), tokenizer, image_token="<picture>")
    with pytest.raises(TypeError, match="image_seq_len"):
        SparseMoeVlmProcessor(make_image_processor(), tokenizer, image_seq_len=4)


def test_default_values():
    processor = SparseMoeVlmProcessor(make_image_processor(), make_tokenizer())
    expected = {
        "image_seq_length": 49,
        "image_token": "<image>",
        "min_tiles": 1,
        "max_tiles": 1,
        "max_image_tokens": None,
        "do_pad": False,
        "row_separator": None,
        "video_token": None,
        "max_frames": 32,
        "video_fps": 1.0,
        "video_temporal_pooling": 1,
        "image_sizing": "fixed",
        "patch_size": None,
        "merge_size": None,
        "min_image_tokens": 1,
    }
    assert {name: getattr(processor, name) for name in expected} == expected


def test_truncation_through_an_image_is_refused(processor):
    with pytest.raises(ValueError, match="image"):
        processor(text="<image> a", images=make_image(), truncation=True, max_length=2)


# ------------------------------------------------------------------------------------------------ conversations


def test_default_template(processor):
    messages = [{"role": "system", "content": "Be brief."}, user(make_image(), "What?"), assistant("A cat.")]
    prompt = processor.apply_chat_template(messages)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>What?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
    )
    asked = processor.apply_chat_template(messages[:2], add_generation_prompt=True)
    assert asked == prompt.removesuffix("A cat.<|im_end|>\n")
    going_on = processor.apply_chat_template(messages, continue_final_message=True)
    assert going_on == prompt.removesuffix("<|im_end|>\n")


def test_default_template_of_a_tokenizer():
    messages = [user(make_image(), "What?"), {"role": "assistant", "content": None}]
    options = {"chat_template": DEFAULT_CHAT_TEMPLATE, "tokenize": False}
    expected = "<|im_start|>user\n<image>What?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    assert make_tokenizer().apply_chat_template(messages, **options) == expected
    of_other_token = make_tokenizer().apply_chat_template(messages, **options, image_token="<pic>")
    assert of_other_token == expected.replace("<image>", "<pic>")


def test_variables_of_templates(monkeypatch):
    """Only templates that use the variables receive them: others would pass them to the tokenizer."""
    received = []
    monkeypatch.setattr(ProcessorMixin, "apply_chat_template", lambda *args, **kwargs: received.append(kwargs))
    processor = make_processor(video_token="<|im_start|>")
    for template in ("{{ image_token }}", "{{ video_token }}", "{{ messages }}"):
        processor.apply_chat_template([user("a")], chat_template=template)
    processor.apply_chat_template([user("a")], chat_template="{{ image_token }}", image_token="x")
    assert received == [{"image_token": "<image>"}, {"video_token": "<|im_start|>"}, {}, {"image_token": "x"}]


def test_numbered_images(processor):
    conversation = [user(make_image(), "a", make_image()), assistant("b"), user("c", make_image())]
    plain = processor.apply_chat_template(conversation)
    numbered = processor.apply_chat_template(conversation, add_vision_id=True)
    assert plain.count("<image>") == 3
    assert "Image" not in plain
    assert "user\nImage 1: <image>aImage 2: <image><|im_end|>" in numbered
    assert "user\ncImage 3: <image><|im_end|>" in numbered
    assert processor.apply_chat_template(conversation, add_vision_id=False) == plain
    two = processor.apply_chat_template([conversation, conversation], add_vision_id=True)
    assert two == [numbered, numbered]
    inputs = processor.apply_chat_template(conversation, add_vision_id=True, **CHAT)
    assert inputs["input_ids"][0].tolist().count(IMAGE) == 3 * IMAGE_SEQ_LENGTH


def test_content_none_and_columns_of_none(processor):
    """Tables store every key for every part, with the value None if a part does not have it."""
    image = make_image()
    text_part = {"type": "text", "text": "What?", "image": None, "url": None}
    image_part = {"type": "image", "text": None, "image": image, "url": None}
    table = [{"role": "user", "content": [image_part, text_part]}, {"role": "assistant", "content": None}]
    plain = [user(image, "What?"), {"role": "assistant", "content": ""}]
    assert processor.apply_chat_template(table) == processor.apply_chat_template(plain)
    for key, value in processor.apply_chat_template(table, **CHAT).items():
        torch.testing.assert_close(value, processor.apply_chat_template(plain, **CHAT)[key])


def test_unknown_parts_are_refused(processor):
    with pytest.raises(Exception, match="must be of type 'text' or 'image', got 'video'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


def test_parts_are_checked_if_they_are_tokenized(processor):
    """Otherwise, they only have to suit the template."""
    conversation, template = [{"role": "user", "content": [{"text": "a"}]}], "{{ messages[0]['content'][0]['text'] }}"
    assert processor.apply_chat_template(conversation, template) == "a"
    with pytest.raises(ValueError, match=r"conversation\[0\]\['content'\]\[0\] lacks `type`"):
        processor.apply_chat_template(conversation, template, tokenize=True)


def test_images_of_a_conversation_keep_their_order(processor):
    a, b, c = (make_image(i) for i in range(3))
    messages = [user("first", a, "second", b), assistant("Yes."), user(c)]
    inputs = processor.apply_chat_template(messages, **CHAT)
    expected = torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for image in (a, b, c)])
    torch.testing.assert_close(inputs["pixel_values"], expected)
    assert (inputs["input_ids"] == IMAGE).sum() == 3 * IMAGE_SEQ_LENGTH


def test_batched_conversations_with_and_without_images(processor):
    batch = [[user(make_image(0), "a")], [user("bb"), assistant("c")], [user("d", make_image(1), make_image(2))]]
    inputs = processor.apply_chat_template(batch, processor_kwargs={"padding": True}, **CHAT)
    assert inputs["pixel_values"].shape[0] == 3
    for row, conversation in enumerate(batch):
        alone = processor.apply_chat_template(conversation, **CHAT)["input_ids"][0]
        torch.testing.assert_close(inputs["input_ids"][row, -len(alone) :], alone)
        assert (inputs["input_ids"][row, : -len(alone)] == PAD).all()


def test_messages_are_not_changed(processor):
    image = make_image()
    messages = [
        {"role": "system", "content": "no <image>"},
        {"role": "user", "content": ({"type": "text", "text": "an <image>"}, {"type": "image", "image": image})},
        assistant("<image>"),
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
    ]
    before = copy.deepcopy(messages)
    before[1]["content"][1]["image"] = image
    processor.apply_chat_template(messages)
    processor.apply_chat_template(messages[:3], **CHAT)
    assert messages == before
    assert messages[1]["content"][1]["image"] is image


def test_other_templates_and_named_templates(processor):
    template = (
        "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}"
    )
    other = make_processor(chat_template=template)
    messages = [user(make_image(), "an <image> typed")]
    inputs = other.apply_chat_template(messages, processor_kwargs={"padding": "max_length", "max_length": 99}, **CHAT)
    assert inputs["input_ids"].shape == (1, 99)
    assert (inputs["input_ids"] == IMAGE).sum() == IMAGE_SEQ_LENGTH
    assert processor.apply_chat_template(messages, chat_template=template).startswith("<image>an ")
    named = make_processor(chat_template={"default": "{{ image_token }}|", "plain": template})
    assert named.apply_chat_template(messages) == "<image>|"
    assert named.apply_chat_template(messages, chat_template="plain").startswith("<image>an ")


# ------------------------------------------------------------------------------------------------ typed image tokens

TYPED = ["<image>", "what is <image> here?", "<image><image>", "<<image>image>", "A <IMAGE> and <image>!", "x<image"]


@pytest.mark.parametrize("kind", NORMALIZERS)
@pytest.mark.parametrize("text", TYPED)
def test_typed_image_token_stays_text(kind, text):
    processor = make_processor(normalizer=NORMALIZERS[kind])
    tokenizer, image = processor.tokenizer, make_image()
    start, end = tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"][0], END
    for message in (user(image, text), {"role": "user", "content": text}, {"role": "assistant", "content": text}):
        has_image = message["content"][0]["type"] == "image" if isinstance(message["content"], list) else False
        head = plain_ids(processor, message["role"] + "\n" + ("" if has_image else text))
        body = [IMAGE] * IMAGE_SEQ_LENGTH + plain_ids(processor, text) if has_image else []
        expected = [start, *head, *body, end, *plain_ids(processor, "\n")]

        whole = processor.apply_chat_template([message], **CHAT)
        prompt = processor.apply_chat_template([message])
        parts = processor(text=prompt, images=image if has_image else None, return_tensors="pt")
        for inputs in (whole, parts):
            assert inputs["input_ids"].tolist() == [expected]
            assert inputs["mm_token_type_ids"].tolist() == [[int(token == IMAGE) for token in expected]]
        assert MARK not in processor.decode(expected)
        assert tokenizer(prompt)["input_ids"].count(IMAGE) == has_image


@pytest.mark.parametrize("image_token", ["<image>", "||img||", "aaa", "image", "<|vision_start|>"])
def test_texts_in_any_form_contain_no_image_token(image_token):
    """Overlapping tokens, tokens split over parts, tool calls and documents, and marks that the user typed."""
    processor = make_processor(image_token=image_token)
    half = len(image_token) // 2
    texts = [
        image_token * 2,
        image_token + image_token[half:],
        image_token[:half] + image_token,
        image_token[0] + MARK + image_token[1:],
        *(image_token[:length] for length in range(1, len(image_token))),
    ]
    for text in texts:
        rest = image_token[len(text) :]
        inputs = processor.apply_chat_template([user(text, rest, make_image(), text, rest)], **CHAT)
        assert (inputs["input_ids"] == IMAGE).sum() == IMAGE_SEQ_LENGTH
        decoded = processor.decode(inputs["input_ids"][0])
        assert decoded.count(text.replace(MARK, "") + rest) >= 2
        assert MARK not in decoded

    template = (
        "{{ messages[0]['tool_calls'][0]['function']['arguments']['q'] }}{{ documents[0]['text'] }}"
        "{{ tools[0]['name'] }}"
    )
    message = {"role": "assistant", "tool_calls": [{"function": {"arguments": {"q": image_token}}}]}
    inputs = processor.apply_chat_template(
        [message], chat_template=template, documents=[{"text": image_token}], tools=[{"name": image_token}], **CHAT
    )
    assert inputs["input_ids"].tolist() == [plain_ids(processor, image_token * 3)]


def test_image_token_added_late_or_as_an_ordinary_token():
    for token in (
        "<pic>",
        AddedToken("<pic>", normalized=True, special=False, lstrip=True),
        AddedToken("<pic>", normalized=True, special=True),
        AddedToken("<pic>", normalized=False, special=False),
    ):
        tokenizer = make_tokenizer(normalizer=normalizers.Lowercase())
        tokenizer.add_tokens([token])
        processor = SparseMoeVlmProcessor(make_image_processor(), tokenizer, image_seq_length=2, image_token="<pic>")
        assert processor.image_token_id == len(tokenizer) - 1
        ids = processor.apply_chat_template([user("a <pic> b <PIC>", make_image())], **CHAT)["input_ids"][0]
        assert (ids == processor.image_token_id).sum() == 2
        assert "a <pic> b <pic>" in processor.decode(ids)
        assert processor.decode(ids, skip_special_tokens=True).count("<pic>") == 2


def test_another_tokenizer_is_prepared_too():
    processor = make_processor()
    conversation = [user("a <image> b", make_image())]
    expected = processor.apply_chat_template(conversation, **CHAT)["input_ids"]
    assert (expected == processor.image_token_id).sum() == processor.image_seq_length
    processor.tokenizer = make_tokenizer()
    assert torch.equal(processor.apply_chat_template(conversation, **CHAT)["input_ids"], expected)


def test_image_token_that_is_an_ordinary_word_is_refused_in_texts_only():
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "picture", "a", "of"])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    processor = SparseMoeVlmProcessor(make_image_processor(), tokenizer, image_seq_length=2, image_token="picture")
    template = "{% for part in messages[0]['content'] %}{{ part['text'] or image_token }}{% endfor %}"
    inputs = processor.apply_chat_template([user("a of ", make_image())], template, **CHAT)
    assert inputs["input_ids"].tolist() == [[3, 4, 2, 2]]
    with pytest.raises(
        ValueError, match=r"conversation\[0\]\['content'\]\[0\]\['text'\] contains the control token 'picture'"
    ):
        processor.apply_chat_template([user("a picture", make_image())], template, **CHAT)


def test_wrapping_a_tokenizer_twice_and_conversations_change_nothing():
    tokenizer = make_tokenizer(normalizer=normalizers.Lowercase())
    SparseMoeVlmProcessor(make_image_processor(), tokenizer)
    once = tokenizer.backend_tokenizer.to_str()
    processor = SparseMoeVlmProcessor(make_image_processor(), tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == once
    processor.apply_chat_template([user("an <image> typed")], **CHAT)
    assert tokenizer.backend_tokenizer.to_str() == once


# ------------------------------------------------------------------------------------------------ assistant masks


@pytest.mark.parametrize("return_tensors", [None, "pt"])
def test_assistant_masks_are_shifted_over_image_tokens(processor, return_tensors):
    answers = [["The <image>, é!", "On it."], ["A <"], ["B"]]
    first = [user(make_image(0), "an <image>"), assistant(answers[0][0])]
    batch = [
        [*first, user(make_image(1)), assistant(answers[0][1])],
        [user("no image"), assistant(answers[1][0])],
        [user("x", make_image(2), make_image(3)), assistant(answers[2][0])],
    ]
    inputs = processor.apply_chat_template(
        batch,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors=return_tensors,
        processor_kwargs={"padding": True},
    )
    for row, expected in enumerate(answers):
        ids, mask = torch.as_tensor(inputs["input_ids"][row]), torch.as_tensor(inputs["assistant_masks"][row])
        assert len(ids) == len(mask)
        expected_ids = [token for text in expected for token in [*plain_ids(processor, text), END]]
        assert ids[mask.bool()].tolist() == expected_ids
    assert not {"offset_mapping", "text_replacement_offsets"} & set(inputs)


# ------------------------------------------------------------------------------------------------ decoding, saving


def test_decoding_an_answer_of_a_model(processor):
    model = make_speaking_model()
    inputs = processor.apply_chat_template([user(make_image(), "What?")], add_generation_prompt=True, **CHAT)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answer = output[:, inputs["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(answer[0], skip_special_tokens=True)
    assert processor.decode(answer[0], skip_special_tokens=True) == text
    assert processor.batch_decode(answer, skip_special_tokens=True) == [text]
    assert processor.post_process_image_text_to_text(answer) == [text]


@pytest.mark.parametrize("kind", ["none", "lowercase"])
def test_save_and_load(tmp_path, kind):
    processor = make_processor(normalizer=NORMALIZERS[kind])
    processor.save_pretrained(tmp_path / "first")
    reloaded = SparseMoeVlmProcessor.from_pretrained(tmp_path / "first")
    reloaded.save_pretrained(tmp_path / "second")
    again = SparseMoeVlmProcessor.from_pretrained(tmp_path / "second")

    saved = json.loads((tmp_path / "first" / "processor_config.json").read_text())
    assert saved["image_seq_length"] == IMAGE_SEQ_LENGTH
    assert saved["auto_map"] == {"AutoProcessor": "processing_sparse_moe_vlm.SparseMoeVlmProcessor"}
    assert (tmp_path / "first" / "chat_template.jinja").read_text() == processor.chat_template
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("first", "second")]
    assert names[0] == names[1]

    messages = [user(make_image(), "an <image> in Text"), assistant("Yes <image>")]
    expected = processor.apply_chat_template(messages, **CHAT)
    for other in (reloaded, again):
        assert other.chat_template == processor.chat_template
        assert other.image_token_id == IMAGE
        assert other.image_seq_length == IMAGE_SEQ_LENGTH
        actual = other.apply_chat_template(messages, **CHAT)
        assert actual.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(actual[key], expected[key], **RESIZED)


def test_options_changed_at_loading(tmp_path):
    make_processor().save_pretrained(tmp_path)
    reloaded = SparseMoeVlmProcessor.from_pretrained(tmp_path, image_seq_length=9)
    assert (torch.tensor(reloaded(text="<image>", images=make_image())["input_ids"]) == IMAGE).sum() == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_seq_length": 0}, "`image_seq_length` must be an integer of at least 1, got 0"),
        ({"image_seq_length": -3}, "`image_seq_length` must be an integer of at least 1, got -3"),
        ({"image_seq_length": "4"}, "`image_seq_length` must be an integer of at least 1, got '4'"),
        ({"image_seq_length": 2**24 + 1}, "`image_seq_length` is 16777217, which is not plausible"),
        ({"image_token": ["<image>"]}, r"`image_token` must be a token, got \['<image>'\]"),
        ({"row_separator": {}}, r"`row_separator` must be a token, got \{\}"),
        ({"video_token": 5}, "`video_token` must be a token, got 5"),
    ],
)
def test_wrong_options_of_processors(options, message):
    with pytest.raises(ValueError, match=message):
        SparseMoeVlmProcessor(make_image_processor(), make_tokenizer(), **options)
