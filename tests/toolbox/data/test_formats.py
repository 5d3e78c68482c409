"""Formats of data: recognition by fields, and conversion to messages and images."""

import re

import pytest

from modeling_sparse_moe_vlm.toolbox.data.bad_rows import RowFault
from modeling_sparse_moe_vlm.toolbox.data.formats import (
    FORMATS,
    find_format,
    most_frequent_answer,
    recognise_format,
)
from tests.toolbox.data.data_files import text, turn

HI = {"role": "user", "content": "hi"}
YO = {"role": "assistant", "content": "yo"}
CASES = {
    "messages, plain": ("messages", {"messages": [HI, YO]}, [turn("user", "hi"), turn("assistant", "yo")], []),
    "messages, plain with images": (
        "messages",
        {"messages": [{"role": "system", "content": "be kind"}, HI, YO, HI, YO], "images": ["a", None, "b"]},
        [
            turn("system", "be kind"),
            turn("user", None, None, "hi"),
            turn("assistant", "yo"),
            turn("user", "hi"),
            turn("assistant", "yo"),
        ],
        ["a", "b"],
    ),
    "messages, parts": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [text("x"), {"type": "image"}, text("y"), {"type": "image", "text": None}]},
                YO,
            ],
            "images": ["a", "b"],
        },
        [turn("user", "x", None, "y", None), turn("assistant", "yo")],
        ["a", "b"],
    ),
    "messages, images inside": (
        "messages",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "a"},
                        {"type": "image", "path": "b"},
                        {"type": "image"},
                        {"type": "image", "url": "c"},
                        {"type": "image_url", "image_url": {"url": "d"}},
                    ],
                },
                YO,
            ],
            "images": ["column"],
        },
        [turn("user", None, None, None, None, None), turn("assistant", "yo")],
        ["a", "b", "column", "c", "d"],
    ),
    "prompt-completion, texts": (
        "prompt-completion",
        {"prompt": "hi", "completion": "yo", "images": ["a"]},
        [turn("user", None, "hi"), turn("assistant", "yo")],
        ["a"],
    ),
    "prompt-completion, messages": (
        "prompt-completion",
        {"prompt": [{"role": "user", "content": [{"type": "image"}, text("hi")]}], "completion": [YO], "image": "a"},
        [turn("user", None, "hi"), turn("assistant", "yo")],
        ["a"],
    ),
    "llava": (
        "llava",
        {
            "id": 1,
            "image": ["a", "b"],
            "conversations": [
                {"from": "system", "value": "be kind"},
                {"from": "human", "value": "<image>\nhi\n<image>"},
                {"from": "gpt", "value": "yo\n"},
                {"from": "user", "value": "one\ntwo"},
                {"from": "assistant", "value": "three"},
            ],
        },
        [
            turn("system", "be kind"),
            turn("user", None, "hi", None),
            turn("assistant", "yo\n"),
            turn("user", "one\ntwo"),
            turn("assistant", "three"),
        ],
        ["a", "b"],
    ),
    "texts": (
        "texts",
        {
            "images": ["a", "b"],
            "texts": [{"user": "1", "assistant": "2", "source": "s"}, {"user": "3", "assistant": "4", "system": "5"}],
        },
        [
            turn("user", None, None, "1"),
            turn("assistant", "2"),
            turn("system", "5"),
            turn("user", "3"),
            turn("assistant", "4"),
        ],
        ["a", "b"],
    ),
    "vqa, one answer": (
        "vqa",
        {"image": "a", "question": "q", "answer": "no", "answers": ["yes"]},
        [turn("user", None, "q"), turn("assistant", "no")],
        ["a"],
    ),
    "vqa, a number": (
        "vqa",
        {"image": None, "question": "q", "answer": 7},
        [turn("user", "q"), turn("assistant", "7")],
        [],
    ),
    "vqa, a boolean": ("vqa", {"question": "q", "answer": True}, [turn("user", "q"), turn("assistant", "true")], []),
    "vqa, ten answers": (
        "vqa",
        {"image": "a", "question": "q", "answers": ["a", "b", "c", "b", "c", "a", "d", "c", "b", "e"]},
        [turn("user", None, "q"), turn("assistant", "b")],
        ["a"],
    ),
    "vqa, answers of annotators": (
        "vqa",
        {"image": "a", "question": "q", "answers": [{"answer": "a"}, {"answer": "b"}, {"answer": "b"}]},
        [turn("user", None, "q"), turn("assistant", "b")],
        ["a"],
    ),
    "vqa, the answer of VQAv2": (
        "vqa",
        {"image": "a", "question": "q", "answers": [{"answer": "a"}], "multiple_choice_answer": "b"},
        [turn("user", None, "q"), turn("assistant", "b")],
        ["a"],
    ),
    "captions": (
        "captions",
        {"image": "a", "caption": "c"},
        [turn("user", None, "Describe the image."), turn("assistant", "c")],
        ["a"],
    ),
    "captions, image folder": (
        "captions",
        {"file_name": "a", "text": "c"},
        [turn("user", None, "Describe the image."), turn("assistant", "c")],
        ["a"],
    ),
    "captions, several captions": (
        "captions",
        {"image": "a", "captions": ["c", "d", "c"]},
        [turn("user", None, "Describe the image."), turn("assistant", "c")],
        ["a"],
    ),
    "captions, several images": (
        "captions",
        {"file_names": ["a", "b"], "text": "c"},
        [turn("user", None, None, "Describe the image."), turn("assistant", "c")],
        ["a", "b"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_format_is_recognised_and_converted(case):
    name, row, messages, images = CASES[case]
    assert recognise_format(list(row), "data").name == name
    assert find_format(name).convert(row) == (messages, images)


def test_dicts_of_lists():
    """`datasets` stores `Sequence({…})` as a dict of lists."""
    answers = {"answer": ["b", "a", "a"], "answer_id": [1, 2, 3]}
    row = {"question": "q", "answers": answers}
    assert find_format("vqa").convert(row)[0] == [turn("user", "q"), turn("assistant", "a")]
    assert find_format("vqa").references(row) == ["b", "a", "a"]
    texts = {"texts": {"user": ["q", "r"], "assistant": ["a", "b"]}}
    turns = [turn("user", "q"), turn("assistant", "a"), turn("user", "r"), turn("assistant", "b")]
    assert find_format("texts").convert(texts)[0] == turns
    messages = {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}
    assert find_format("messages").convert(messages)[0] == turns[:2]


def test_prompts_with_a_field_of_another_format():
    row = {
        "prompt": [HI | {"content": [{"type": "image"}, text("x")]}],
        "completion": "a",
        "image": "a",
        "messages": None,
    }
    assert find_format("prompt-completion").convert(row) == ([turn("user", None, "x"), turn("assistant", "a")], ["a"])


def test_system_of_sharegpt():
    row = {"conversations": [{"from": "human", "value": "q", "weight": 1}, {"from": "gpt", "value": "a"}]}
    turns = [turn("user", "q"), turn("assistant", "a")]
    assert find_format("llava").convert(row | {"system": "s"})[0] == [turn("system", "s"), *turns]
    assert find_format("llava").convert(row | {"system": ""})[0] == turns


@pytest.mark.parametrize(
    ("name", "row", "references"),
    [
        ("vqa", {"question": "q", "answers": ["b", "a", "b"]}, ["b", "a", "b"]),
        ("vqa", {"question": "q", "answers": [{"answer": "b"}, {"answer": "a"}]}, ["b", "a"]),
        ("vqa", {"question": "q", "answer": "c", "answers": ["a", "b"]}, ["a", "b"]),
        ("vqa", {"question": "q", "answer": "c", "answers": []}, ["c"]),
        ("vqa", {"question": "q", "answer": "c", "answers": None}, ["c"]),
        ("vqa", {"question": "q", "multiple_choice_answer": "c", "answers": [{"answer": "a"}]}, ["a"]),
        ("vqa", {"question": "q", "answer": True}, ["true"]),
        ("vqa", {"question": "q", "answer": 7}, ["7"]),
        ("vqa", {"question": "q", "answers": "c"}, ["c"]),
        ("captions", {"image": "a", "caption": "c"}, ["c"]),
        ("captions", {"image": "a", "caption": ["c", "d"]}, ["c", "d"]),
        ("captions", {"image": "a", "captions": ["c", "c"], "text": "e"}, ["c", "c"]),
        ("captions", {"image": "a", "caption": None, "text": "e"}, ["e"]),
    ],
)
def test_references(name, row, references):
    assert find_format(name).references(row) == references


def test_names():
    assert list(FORMATS) == ["messages", "prompt-completion", "llava", "texts", "vqa", "captions"]
    with pytest.raises(ValueError, match=r"`format` must be one of messages, .*captions, but got 'vqaa'\."):
        find_format("vqaa")


@pytest.mark.parametrize(
    "fields", [["question"], ["prompt"], ["completion"], ["answer"], ["image"], ["caption"], ["image", "label"], []]
)
def test_unknown_fields(fields):
    message = f"the format of my.csv is not recognised: its fields are {sorted(fields)}. Known formats: messages ("
    with pytest.raises(ValueError, match=re.escape(message)):
        recognise_format(fields, "my.csv")


def test_ambiguous_fields():
    with pytest.raises(ValueError, match=r"my.csv is ambiguous: .* fit messages and llava\. Name one"):
        recognise_format(["messages", "conversations"], "my.csv")
    assert recognise_format(["question", "answer", "image", "text"], "").name == "vqa"  # the text is its context


@pytest.mark.parametrize(("answers", "expected"), [("ab", "a"), ("abb", "b"), ("bccb", "b"), ("c", "c")])
def test_most_frequent_answer(answers, expected):
    assert most_frequent_answer(list(answers)) == expected


@pytest.mark.parametrize(
    ("name", "row", "kind", "reason"),
    [
        ("messages", {"a": 1}, "missing field", "the row lacks `messages`: its fields are ['a']."),
        ("messages", {"messages": "hi"}, "wrong type", "`messages` must be a list of messages, but got 'hi'."),
        (
            "messages",
            {"messages": [{"role": "user"}]},
            "wrong type",
            "messages[0] must be a dict with `role` and `content`, but got {'role': 'user'}.",
        ),
        (
            "messages",
            {"messages": [HI, YO | {"tool_calls": [1]}]},
            "wrong type",
            "messages[1] has the field 'tool_calls', which would be lost: only `role` and `content` are read.",
        ),
        (
            "messages",
            {"messages": [HI | {"content": 5}]},
            "wrong type",
            "messages[0].content must be a string or a list of parts, but got 5.",
        ),
        (
            "messages",
            {"messages": [HI | {"content": [text("x"), {"type": "audio"}]}]},
            "wrong type",
            "messages[0].content[1] must be a dict of type 'text', 'image' or 'video', such as {'type': 'text', "
            "'text': '…'}, but got {'type': 'audio'}.",
        ),
        (
            "messages",
            {"messages": [HI | {"content": [{"type": "text", "text": 5}]}]},
            "wrong type",
            "`messages[0].content[0].text` must be a string, but got 5.",
        ),
        (
            "messages",
            {"messages": [HI, YO], "image": "a", "images": ["b"]},
            "wrong type",
            "the row has images in 'images' and in 'image': use one of these fields.",
        ),
        (
            "prompt-completion",
            {"prompt": "a"},
            "missing field",
            "the row lacks `completion`: its fields are ['prompt'].",
        ),
        (
            "prompt-completion",
            {"prompt": 5, "completion": "a"},
            "wrong type",
            "`prompt` must be a list of messages, but got 5.",
        ),
        ("llava", {"conversations": "a"}, "wrong type", "`conversations` must be a list, but got 'a'."),
        (
            "llava",
            {"conversations": [{"from": "human"}]},
            "wrong type",
            "conversations[0] must be a dict with `from` and `value`, but got {'from': 'human'}.",
        ),
        (
            "llava",
            {"conversations": [{"from": "bard", "value": "x"}]},
            "unknown role",
            "conversations[0] has the unknown role 'bard': use one of 'human', 'user', 'gpt', 'assistant', 'system'.",
        ),
        (
            "llava",
            {"conversations": [{"from": "human", "value": None}]},
            "wrong type",
            "`conversations[0].value` must be a string, but got None.",
        ),
        (
            "texts",
            {"texts": [{"user": "a"}]},
            "wrong type",
            "texts[0] must be a dict with `user` and `assistant`, but got {'user': 'a'}.",
        ),
        (
            "texts",
            {"texts": [{"user": "a", "assistant": 5}]},
            "wrong type",
            "`texts[0].assistant` must be a string, but got 5.",
        ),
        ("vqa", {"question": 5, "answer": "a"}, "wrong type", "`question` must be a string, but got 5."),
        ("vqa", {"question": "a"}, "missing field", "the row lacks `answer`: its fields are ['question']."),
        ("vqa", {"question": "a", "answer": None}, "missing field", "the row lacks `answer`: it is null."),
        ("vqa", {"question": "a", "answer": {}}, "wrong type", "`answer` must be a string, but got {}."),
        (
            "vqa",
            {"question": "a", "answers": ["a", 5]},
            "wrong type",
            "`answers[1]` must be a string, but got 5.",
        ),
        (
            "messages",
            {"messages": [HI, YO], "tools": [{"name": "f"}]},
            "wrong type",
            "the row has `tools`, which would be lost: calls of tools are not supported.",
        ),
        (
            "prompt-completion",
            {"prompt": [HI, YO], "completion": [HI]},
            "no assistant turn",
            "`completion` has no assistant turn, so there is nothing to learn.",
        ),
        (
            "prompt-completion",
            {"prompt": "a", "completion": "b", "tools": "[1]"},
            "wrong type",
            "the row has `tools`, which would be lost: calls of tools are not supported.",
        ),
        (
            "llava",
            {"conversations": [{"from": "gpt", "value": "x", "weight": 0}]},
            "wrong type",
            "conversations[0] has the weight 0, which would be lost: all answers are learned with the same weight. "
            "Remove it.",
        ),
        (
            "llava",
            {"conversations": [], "tools": "[1]"},
            "wrong type",
            "the row has `tools`, which would be lost: calls of tools are not supported.",
        ),
        ("llava", {"conversations": [], "system": 5}, "wrong type", "`system` must be a string, but got 5."),
        (
            "texts",
            {"texts": {"user": ["a", "b"], "assistant": ["c"]}},
            "wrong type",
            "`texts` must be a list, but got {'user': ['a', 'b'], 'assistant': ['c']}.",
        ),
        (
            "vqa",
            {"question": "a", "answer": float("inf")},
            "wrong type",
            "`answer` must be a text or a finite number, but got inf.",
        ),
        (
            "captions",
            {"image": None, "caption": "a"},
            "missing field",
            "the row has a caption, but no image or video: add one, or drop the row.",
        ),
        (
            "captions",
            {"image": "a", "captions": ["b", " "]},
            "empty answer",
            "the caption in `captions[1]` is empty: give a text, or remove it.",
        ),
        ("captions", {"image": "a"}, "missing field", "the row lacks `caption`: its fields are ['image']."),
        ("captions", {"image": "a", "captions": ["b", 5]}, "wrong type", "`captions[1]` must be a string, but got 5."),
        ("captions", {"image": "a", "text": ["b"]}, "wrong type", "`text` must be a string, but got ['b']."),
    ],
)
def test_rows_that_do_not_have_the_format(name, row, kind, reason):
    with pytest.raises(RowFault) as raised:
        find_format(name).convert(row)
    assert (raised.value.kind, raised.value.reason) == (kind, reason)
