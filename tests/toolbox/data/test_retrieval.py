"""Rows, batches and inputs for retrieval."""

import json

import pytest
import torch
from datasets import Dataset

from modeling_sparse_moe_vlm.toolbox.data import (
    BadRowError,
    RetrievalCollator,
    load_pairs,
    load_rows,
    retrieval_inputs,
)
from tests.support.processors import assistant, make_image, make_processor, make_tokenizer, user


def decoded(processor, inputs) -> list[str]:
    rows = zip(inputs["input_ids"], inputs["attention_mask"])
    return [processor.tokenizer.decode(row[mask == 1]) for row, mask in rows]


def turn(content: str) -> str:
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


IMAGE = "<image>" * 4


def test_every_kind_of_item_is_one_user_turn(tmp_path):
    processor, image = make_processor(), make_image()
    image.save(tmp_path / "image.png")
    path = str(tmp_path / "image.png")
    items = [
        "a cat",
        image,
        {"image": path, "text": "a mat"},
        {"text": "a mat", "image": image},
        {"path": path, "bytes": None},
        [user("a cat"), assistant("on a mat")],
    ]
    inputs = retrieval_inputs(processor, items)
    reply = "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\non a mat<|im_end|>\n<|im_start|>assistant\n"
    texts = [turn("a cat"), turn(IMAGE), turn(f"{IMAGE}a mat"), turn(f"a mat{IMAGE}"), turn(IMAGE), reply]
    assert decoded(processor, inputs) == texts
    assert inputs["attention_mask"][0].tolist() == sorted(inputs["attention_mask"][0].tolist(), reverse=True)
    assert len(inputs["pixel_values"]) == 4
    assert all(torch.equal(pixels, inputs["pixel_values"][0]) for pixels in inputs["pixel_values"])
    tokenizer = make_tokenizer()
    tokenizer.chat_template = processor.chat_template
    assert torch.equal(
        retrieval_inputs(tokenizer, items[:1])["input_ids"], retrieval_inputs(processor, items[:1])["input_ids"]
    )


def test_items_that_cannot_be_read_are_named(tmp_path):
    processor = make_processor()
    for items, message in (
        ([], "`items` is empty"),
        ("a cat", r"`items` must be a list.*pass \[item\]"),
        ({"text": "a cat"}, "`items` must be a list"),
        (["a cat", " "], r"items\[1\] must have a text that is not empty"),
        (["a cat", None], r"items\[1\] has no image"),
        (["a cat", {"image": str(tmp_path / "none.png")}], r"items\[1\]: the image"),
        ([{"video": "a.mp4"}], r"items\[0\] must have the keys `text` and `image`.*video"),
        (["a cat", ["a", "b"]], r"items\[1\] must be a text, an image, a dict or a list of messages"),
        (["a cat", [user({"not": "an image"})]], r"items\[1\] cannot be processed"),
    ):
        with pytest.raises(ValueError, match=message):
            retrieval_inputs(processor, items)


def test_a_batch_of_pairs_with_hard_negatives():
    processor = make_processor()
    rows = [
        {"image": make_image(0), "captions": ["one", "two"], "negatives": ["wrong", make_image(5)]},
        {"images": [make_image(1)], "caption": "three", "image_id": 7},
        {
            "image": make_image(2),
            "text": "four",
            "image_id": "7",
            "negatives": [{"image": make_image(6), "text": None}],
        },
        {"image": make_image(3), "captions": [{"image": make_image(4), "text": "but blue"}]},
    ]
    batch = RetrievalCollator(processor)(rows)
    captions = ["one", "two", "three", "four", f"{IMAGE}but blue"]
    texts = [turn(content) for content in [*captions, *[IMAGE] * 4, "wrong", IMAGE, IMAGE]]
    assert decoded(processor, batch) == texts
    same = batch["labels"][2].item()
    assert same > 2**40
    assert batch["labels"].tolist() == [-2, -2, same, same, -5, -2, same, same, -5, -1, -1, -1]
    assert batch["labels"].dtype == torch.long
    assert batch["is_document"].tolist() == [False] * 5 + [True] * 4 + [False, True, True]
    # The pixel values are in the order of the placeholders.
    expected = processor.image_processor([make_image(i) for i in (4, 0, 1, 2, 3, 5, 6)], return_tensors="pt")
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"])
    other = RetrievalCollator(processor)([{"image": make_image(), "caption": "x", "image_id": 8}])["labels"]
    assert other[0] == other[1] != same


def test_rows_of_conversations_are_captioned_by_their_answer():
    processor = make_processor()
    rows = Dataset.from_list([{"image": make_image(0), "caption": "a cat"}, {"image": make_image(1), "caption": "mat"}])
    batch = RetrievalCollator(processor)([load_rows(rows)[i] for i in range(2)])
    assert decoded(processor, batch) == [turn("a cat"), turn("mat"), turn(IMAGE), turn(IMAGE)]
    row = {"messages": [user("?"), assistant("wrong")], "images": [make_image()], "references": ["one", "two"]}
    assert decoded(processor, RetrievalCollator(processor)([row])) == [turn("one"), turn("two"), turn(IMAGE)]
    several = {"images": [make_image(0), make_image(1)], "caption": "both"}
    assert decoded(processor, RetrievalCollator(processor)([several]))[1] == turn(IMAGE * 2)


def test_malformed_rows_are_named():
    image = make_image()
    good = {"image": image, "caption": "a cat"}
    for row, message in (
        ({"caption": "a cat"}, "row 1 has no image: its fields are .'caption'."),
        ({"image": image}, "row 1 has no caption"),
        ({"image": image, "caption": ""}, "row 1 has no caption"),
        ({"image": image, "captions": ["a cat", ""]}, "row 1 must have a text that is not empty"),
        ({"image": image, "caption": "a", "negatives": "b"}, "row 1: `negatives` must be a list"),
        ({"caption": "a", "source": "train.jsonl", "row": 12}, "train.jsonl, row 12 has no image"),
        ("a cat", "row 1 must be a dict"),
    ):
        with pytest.raises(ValueError, match=message):
            RetrievalCollator(make_processor())([good, row])
    with pytest.raises(ValueError, match="the batch has no rows"):
        RetrievalCollator(make_processor())([])


def test_long_items_are_an_error_and_never_truncated():
    processor = make_processor()
    rows = [{"image": make_image(), "caption": "a"}, {"image": make_image(), "caption": "a long caption " * 9}]
    longest = RetrievalCollator(processor)(rows)["input_ids"].shape[1]
    assert RetrievalCollator(processor, max_length=longest)(rows)["input_ids"].shape[1] == longest
    with pytest.raises(
        ValueError, match=f"an item of row 1 has {longest} tokens, more than `max_length` .{longest - 1}."
    ):
        RetrievalCollator(processor, max_length=longest - 1)(rows)


# ---------------------------------------------------------------------------------------------------- loading


def write(folder, *rows) -> str:
    for seed, name in enumerate(("a.png", "b.png")):
        make_image(seed).save(folder / name)
    (folder / "broken.png").write_bytes(b"nothing")
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_pairs_are_loaded_with_negatives_and_identities(tmp_path):
    file = write(
        tmp_path,
        {"image": "a.png", "captions": ["one", "two"], "image_id": 3, "negatives": ["wrong", {"image": "b.png"}]},
        {"file_name": "b.png", "text": "three"},
    )
    rows = load_pairs(file)
    assert rows["captions"][:] == [["one", "two"], ["three"]]
    assert rows["image_id"][:] == ["3", None]
    assert rows["row"][:] == [0, 1]
    assert rows["source"][:] == [file, file]
    assert rows[0]["images"][0].tobytes() == make_image(0).tobytes()
    text, image = rows[0]["negatives"]
    assert text == {"text": "wrong", "image": None}
    assert image["image"].tobytes() == make_image(1).tobytes()
    batch = RetrievalCollator(make_processor())([rows[0], rows[1]])
    assert batch["is_document"].tolist() == [False] * 3 + [True] * 2 + [False, True]
    assert batch["labels"].tolist()[2::2] == [-3, -3, -1]


def test_bad_pairs_are_named_or_skipped(tmp_path):
    bad = {
        "the row lacks a caption": ({"image": "a.png"}, "the row has no caption"),
        "no image": ({"caption": "one"}, "the row has no image"),
        "no file": ({"image": "c.png", "caption": "one"}, r"images\[0\]: there is no file"),
        "broken": ({"image": "broken.png", "caption": "one"}, r"images\[0\]"),
        "empty": ({"image": "a.png", "captions": ["one", " "]}, r"the caption in `captions\[1\]` is empty"),
        "type": ({"image": "a.png", "captions": [7]}, r"`captions\[0\]` must be a string, but got 7"),
        "token": ({"image": "a.png", "caption": "an <image>"}, r"`caption\[0\]` contains the image token '<image>'"),
        "negative": (
            {"image": "a.png", "caption": "x", "negatives": [{"image": "c.png"}]},
            r"negatives\[0\]: there is",
        ),
        "negatives": ({"image": "a.png", "caption": "x", "negatives": "y"}, "`negatives` must be a list"),
    }
    good = {"image": "a.png", "caption": "one"}
    for row, message in bad.values():
        with pytest.raises(BadRowError, match=f"pairs.jsonl, row 1: .*{message}"):
            load_pairs(write(tmp_path, good, row))
    file = write(tmp_path, good, *(row for row, _ in bad.values()), good)
    rows = load_pairs(file, on_bad_row="skip", skipped_file=tmp_path / "skipped.jsonl")
    assert rows["row"][:] == [0, len(bad) + 1]
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in skipped] == list(range(1, len(bad) + 1))
    assert skipped[2]["kind"] == "missing file"
    with pytest.raises(ValueError, match="`on_bad_row` must be one of error, skip"):
        load_pairs(file, on_bad_row="drop")


def test_data_without_good_rows(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty.jsonl has no rows\.$"):
        load_pairs(tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"image": "gone.png", "caption": "a"}\n' * 2)
    with pytest.raises(ValueError, match=r"all rows of .*bad.jsonl are bad\. Skipped bad rows: 2 \(2 × missing file\)"):
        load_pairs(tmp_path / "bad.jsonl", on_bad_row="skip")
