"""Training batches: labels, images at their placeholders, and errors for malformed rows."""

import copy
import re

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_sparse_moe_vlm.toolbox.data.collator import IGNORE_INDEX, VisionLanguageCollator, with_images
from tests.support.processors import assistant, make_image, make_processor, user

PLACEHOLDER = {"type": "image"}
ANSWER = assistant("yes")
PAD, START, END, IMAGE = range(4)


def row(*parts: dict, **columns) -> dict:
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "a cat?"}]}, ANSWER], **columns}


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def turn(processor, role: str, text: str, num_images: int = 0) -> tuple[list[int], list[int]]:
    """Returns the token ids and the labels of a turn."""

    def plain(text):
        return processor.tokenizer(text)["input_ids"]

    head = [START, *plain(f"{role}\n"), *[IMAGE] * 4 * num_images]
    body = [*plain(text), END]
    targets = [IGNORE_INDEX] * len(body) if role != "assistant" else body
    tail = plain("\n")
    return [*head, *body, *tail], [*[IGNORE_INDEX] * len(head), *targets, *[IGNORE_INDEX] * len(tail)]


def test_a_batch_is_padded_on_the_right_and_only_answers_are_targets(processor):
    """With several turns, the labels are all answers, each with its end token, and nothing else."""
    conversations = [
        [("system", "the mat", 0), ("user", "a cat?", 1), ("assistant", "yes", 0)],
        [("user", "the", 1), ("assistant", "a cat sat", 0), ("user", "and?", 1), ("assistant", "no <|im_end|>", 0)],
    ]
    rows, expected = [], []
    for number, conversation in enumerate(conversations):
        messages = [
            {"role": role, "content": [*[PLACEHOLDER] * num_images, {"type": "text", "text": text}]}
            for role, text, num_images in conversation
        ]
        rows.append({"messages": messages, "images": [make_image(10 * number + i) for i in range(number + 1)]})
        turns = [turn(processor, *arguments) for arguments in conversation[:-1]]
        role, text, _ = conversation[-1]
        if text.endswith(" <|im_end|>"):  # typed by the user, so it is plain text
            split = processor.tokenizer(text, split_special_tokens=True)["input_ids"]
            ids, targets = turn(processor, role, "", 0)
            place = len(ids) - 2
            turns.append(([*ids[:place], *split, *ids[place:]], [*targets[:place], *split, *targets[place:]]))
        else:
            turns.append(turn(processor, role, text))
        expected.append(([i for ids, _ in turns for i in ids], [i for _, targets in turns for i in targets]))
    batch = VisionLanguageCollator(processor)(rows)
    longest = max(len(ids) for ids, _ in expected)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "mm_token_type_ids", "pixel_values"]
    for number, (ids, targets) in enumerate(expected):
        padding = longest - len(ids)
        assert batch["input_ids"][number].tolist() == ids + [PAD] * padding
        assert batch["labels"][number].tolist() == targets + [IGNORE_INDEX] * padding
        assert batch["attention_mask"][number].tolist() == [1] * len(ids) + [0] * padding
        assert batch["mm_token_type_ids"][number].tolist() == [int(i == IMAGE) for i in ids] + [0] * padding
    assert batch["labels"].dtype == torch.int64
    images = [image for one in rows for image in one["images"]]
    assert torch.equal(batch["pixel_values"], processor(images=images, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("columns", [{}, {"images": None}, {"images": []}, {"images": [None]}])
def test_rows_without_images(processor, columns):
    batch = VisionLanguageCollator(processor)([row(**columns)])
    assert "pixel_values" not in batch
    assert not (batch["input_ids"] == processor.image_token_id).any()
    plain = {"messages": [{"role": "user", "content": "a cat?"}, ANSWER], **columns}
    assert VisionLanguageCollator(processor)([plain])["input_ids"].tolist() == batch["input_ids"].tolist()


def test_images_in_order_and_in_any_form(processor, tmp_path):
    """PIL images, arrays and paths (`Path` and string), given in the row or in the message."""
    images = [make_image(seed) for seed in range(4)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    collator = VisionLanguageCollator(processor)
    expected = collator([row(*[PLACEHOLDER] * 4, images=images)])
    struct = {"bytes": (tmp_path / "2.png").read_bytes(), "path": None}
    forms = [
        row(*[PLACEHOLDER] * 4, images=[tmp_path / f"{number}.png" for number in range(4)]),
        row(
            PLACEHOLDER,
            # As in rows of a table, where every part has all keys.
            {"type": "image", "image": None, "path": tmp_path / "1.png", "text": None},
            {"type": "image", "image": None, "path": None, "text": None},
            {"type": "image", "image": np.asarray(images[3])},
            images=[str(tmp_path / "0.png"), images[2]],
        ),
        row(*[PLACEHOLDER] * 4, images=(images[0], None, images[1], struct, images[3])),
        row(*[PLACEHOLDER] * 4, images=np.stack(images)),
    ]
    for form in forms:
        batch = collator([form])
        assert batch["pixel_values"].tolist() == expected["pixel_values"].tolist()
        assert batch["input_ids"].tolist() == expected["input_ids"].tolist()


@pytest.mark.parametrize(
    ("wrong", "counts"),
    [
        (row(PLACEHOLDER, images=[make_image()] * 2), "2 images in `images`, but 1 placeholders"),
        (row(images=[make_image()]), "1 images in `images`, but 0 placeholders"),
        (row(PLACEHOLDER), "0 images in `images`, but 1 placeholders"),
        (row(PLACEHOLDER, images=[None]), "0 images in `images`, but 1 placeholders"),
        (row(PLACEHOLDER, PLACEHOLDER, images=[make_image()]), "1 images in `images`, but 2 placeholders"),
        (
            row({"type": "image", "image": make_image()}, images=[make_image()]),
            "1 images in `images`, but 0 placeholders",
        ),
    ],
)
def test_a_wrong_number_of_images_is_named_with_its_row(processor, wrong, counts):
    with pytest.raises(ValueError, match=f"^row 1 has {counts}"):
        VisionLanguageCollator(processor)([row(PLACEHOLDER, images=[make_image()]), wrong])


def test_rows_are_not_changed(processor):
    given = row(PLACEHOLDER, images=[make_image()])
    before = copy.deepcopy(given["messages"])
    assert with_images(given, 0)[0]["content"][0] == {"type": "image", "image": given["images"][0]}
    VisionLanguageCollator(processor)([given])
    assert given["messages"] == before


def ask(content) -> dict:
    return {"messages": [{"role": "user", "content": content}, ANSWER]}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("hello", ": must be a dict with `messages` and `images`, got <class 'str'>"),
        ({"text": "a", "images": []}, ": lacks `messages`: its fields are ['text', 'images']"),
        ({"messages": None}, ": lacks `messages`"),
        ({"messages": "hello"}, ": `messages` must be a list of messages, got <class 'str'>"),
        ({"messages": {"role": "user"}}, ": `messages` must be a list of messages, got <class 'dict'>"),
        ({"messages": []}, ": `messages` is empty"),
        ({"messages": ["hello"]}, ": messages[0] must be a dict with `role` and `content`, got <class 'str'>"),
        ({"messages": [user("a"), {"content": "yes"}]}, ": messages[1] lacks `role`"),
        ({"messages": [user("a"), {"role": None, "content": "yes"}]}, ": messages[1] lacks `role`"),
        ({"messages": [user("a"), {"role": "assistant", "text": "yes"}]}, ": messages[1] lacks `content`: its fields"),
        (ask(5), ": messages[0].content must be a string or a list of parts, got <class 'int'>"),
        (ask({"type": "text"}), ": messages[0].content must be a string or a list of parts, got <class 'dict'>"),
        (ask(["a"]), ": messages[0].content[0] must be a dict, such as {'type': 'text', 'text': …}, got 'a'"),
        (ask([{"text": "a"}]), ": messages[0].content[0] lacks `type`: add 'text' or 'image'"),
        (ask([{"type": "text", "text": "a"}, {"type": None}]), ": messages[0].content[1] lacks `type`"),
        (ask([{"type": "text"}]), ": messages[0].content[0].text must be a string, got None"),
        (ask([{"type": "text", "text": 5}]), ": messages[0].content[0].text must be a string, got 5"),
        (ask("a\ud800"), ": messages[0].content contains a lone surrogate (at character 1)"),
        (ask([{"type": "text", "text": "\udfff"}]), ": messages[0].content[0].text contains a lone surrogate"),
        (row(PLACEHOLDER, images=make_image()), ": `images` must be a list of images, got <class 'PIL."),
        (
            row(PLACEHOLDER, images="a.png"),
            ": `images` must be a list of images, got <class 'str'>: put a",
        ),
        (row(PLACEHOLDER, images={"bytes": b""}), ": `images` must be a list of images, got <class 'dict'>"),
        (
            row(PLACEHOLDER, images=np.zeros((4, 4, 3))),
            ": `images` must be a list of images, got <class 'numpy.",
        ),
        # Errors that only the processor finds.
        (row(PLACEHOLDER, images=["none.png"]), " cannot be processed: images[0][0] cannot be read as an image"),
        (row(PLACEHOLDER, images=[5]), " cannot be processed: images[0][0] is not an image"),
        (
            ask([{"type": "video"}]),
            " cannot be processed: content parts must be of type 'text' or 'image', got",
        ),
        (
            {"messages": [{"role": "user\ud800", "content": "a"}, ANSWER]},
            " cannot be processed: conversation[0][0]['role'] contains a lone surrogate",
        ),
    ],
)
def test_wrong_rows_are_named(processor, wrong, message):
    good = row(PLACEHOLDER, images=[make_image()])
    message = message.removeprefix(":") if message.startswith((": lacks", ": must")) else message
    with pytest.raises(ValueError, match=f"^row 2{re.escape(message)}"):
        VisionLanguageCollator(processor)([good, row(), wrong, good])


def test_messages_that_only_call_tools_need_no_content(processor):
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    batch = VisionLanguageCollator(processor)([{"messages": [user("a"), calls, ANSWER]}])
    assert batch["labels"][batch["labels"] != IGNORE_INDEX].tolist() == [
        END,
        *processor.tokenizer("yes")["input_ids"],
        END,
    ]


def test_an_error_of_the_whole_batch_is_passed_on(processor):
    class Fussy(type(processor)):
        def apply_chat_template(self, conversation, *args, **kwargs):
            if len(conversation) > 1:
                raise RuntimeError("one at a time")
            return super().apply_chat_template(conversation, *args, **kwargs)

    fussy = Fussy(processor.image_processor, processor.tokenizer, image_seq_length=4)
    with pytest.raises(RuntimeError, match="one at a time"):
        VisionLanguageCollator(fussy)([row(), row()])
    assert VisionLanguageCollator(fussy)([row()])["labels"].shape[0] == 1


def test_an_empty_batch(processor):
    with pytest.raises(ValueError, match="the batch has no rows"):
        VisionLanguageCollator(processor)([])


def test_errors_name_rows_without_targets(processor):
    silent = {"messages": [{"role": "user", "content": "a cat?"}]}
    with pytest.raises(ValueError, match=r"^rows \[1, 2\] of the batch have no assistant turn"):
        VisionLanguageCollator(processor)([row(), silent, silent])


def test_max_length_is_the_longest_row_that_passes(processor):
    short, long = row(), {"messages": [{"role": "user", "content": "cat " * 50}, ANSWER]}
    lengths = [VisionLanguageCollator(processor)([one])["input_ids"].shape[1] for one in (short, long)]
    batch = VisionLanguageCollator(processor, max_length=lengths[1])([short, long, short])
    assert batch["input_ids"].shape == (3, lengths[1])
    with pytest.raises(
        ValueError, match=rf"^row 1 of the batch has {lengths[1]} tokens, more than `max_length` \({lengths[1] - 1}\)"
    ):
        VisionLanguageCollator(processor, max_length=lengths[1] - 1)([short, long, short])
    assert lengths[0] < lengths[1]
    # Image tokens count towards the length, but padding does not.
    with_image = row(PLACEHOLDER, images=[Image.new("RGB", (4, 4))])
    assert VisionLanguageCollator(processor, max_length=lengths[0] + 4)([with_image, short])["labels"].shape[0] == 2
    with pytest.raises(ValueError, match=rf"^row 0 of the batch has {lengths[0] + 4} tokens"):
        VisionLanguageCollator(processor, max_length=lengths[0] + 3)([with_image, short])
