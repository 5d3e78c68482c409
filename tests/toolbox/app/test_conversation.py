"""Conversations in the forms for the model and for the page."""

import numpy as np
import pytest
from PIL import Image

from modeling_sparse_moe_vlm.toolbox.app.answers import Answer
from modeling_sparse_moe_vlm.toolbox.app.conversation import Turn, image_paths, to_bubbles, to_messages, turn_of_bubble


@pytest.fixture
def turns(tmp_path) -> list[Turn]:
    paths = [str(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    for shade, path in enumerate(paths):
        Image.new("L", (4, 3), 10 * shade).save(path)
    return [
        Turn("Which?", paths[:2], Answer("the left one")),
        Turn("Why?", [], Answer("")),
        Turn("", paths[2:]),
    ]


def test_messages(turns):
    messages = to_messages(turns)
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert [[part["type"] for part in message["content"]] for message in messages] == [
        ["image", "image", "text"],
        ["text"],
        ["text"],
        ["text"],
        ["image"],
    ]
    assert messages[0]["content"][2]["text"] == "Which?"
    assert messages[1]["content"][0]["text"] == "the left one"
    shades = [np.unique(np.array(part["image"])).tolist() for part in messages[0]["content"][:2]]
    assert shades == [[0], [10]]
    assert messages[4]["content"][0]["image"].mode == "RGB"


def test_bubbles(turns):
    a, b, c = image_paths(turns)
    assert to_bubbles(turns, "it") == [
        {"role": "user", "content": {"path": a}},
        {"role": "user", "content": {"path": b}},
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "the left one"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "(no words)"},
        {"role": "user", "content": {"path": c}},
        {"role": "assistant", "content": "it"},
    ]
    assert to_bubbles(turns)[-1]["content"] == "…"


def test_turns_of_bubbles(turns):
    bubbles = to_bubbles(turns)
    assert [turn_of_bubble(turns, index) for index in range(len(bubbles))] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert turn_of_bubble(turns, 99) == 2
    assert [turn_of_bubble(turns[::-1], index) for index in range(len(bubbles))] == [0, 0, 1, 1, 2, 2, 2, 2]


def test_a_bad_image_is_named(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"^broken\.png cannot be read as an image") as error:
        to_messages([Turn("Which?", [str(path)])])
    assert str(tmp_path) not in str(error.value)
