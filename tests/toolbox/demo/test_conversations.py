"""Conversion of the built-in data to conversations."""

from PIL import Image as PILImage

from modeling_sparse_moe_vlm.toolbox.demo import conversations, scenes, to_messages


def test_a_row_as_messages():
    image = PILImage.new("RGB", (2, 2))
    row = {"image": image, "question": "Why?", "answer": "So.", "kind": "row", "scene": ["cat"], "style": "noto"}
    assert to_messages(row) == {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "So."}]},
        ],
        "images": [image],
    }


def test_rows_become_conversations_when_they_are_read():
    rows = scenes("train", 12, cell_size=8)
    read = conversations(rows)
    assert len(read) == 12
    assert set(read[0]) == {"messages", "images"}
    for number in range(12):
        expected = to_messages(rows[number])
        assert read[number]["messages"] == expected["messages"]
        (image,) = read[number]["images"]
        assert image.tobytes() == expected["images"][0].tobytes()
    assert read[3:5]["messages"] == [to_messages(rows[3])["messages"], to_messages(rows[4])["messages"]]
    assert rows[0]["question"], "the rows themselves are not changed"
