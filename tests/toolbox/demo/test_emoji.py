import hashlib
import io
import os
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage

from modeling_sparse_moe_vlm.toolbox.demo.emoji import (
    SPLITS,
    draw_on_white,
    emoji_questions,
    encode_png,
    load_emoji,
    raw_drawings,
)


@pytest.fixture(scope="module")
def table() -> dict[str, dict]:
    return {entry["name"]: entry for entry in load_emoji("noto").remove_columns("image")}


@pytest.fixture(scope="module")
def splits() -> dict[str, Dataset]:
    return {split: emoji_questions(split) for split in SPLITS}


def digest(dataset: Dataset) -> str:
    rows = dataset.cast_column("image", Image(decode=False)).to_list()
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def asked(dataset: Dataset) -> set[tuple[bytes, str]]:
    rows = dataset.cast_column("image", Image(decode=False))
    return {(image["bytes"], question) for image, question in zip(rows["image"], rows["question"], strict=True)}


def test_table_has_every_emoji_in_both_styles():
    emoji = load_emoji()
    assert len(emoji) == 3812
    assert Counter(emoji["style"]) == {"twemoji": 1906, "noto": 1906}
    assert set(load_emoji("twemoji")["name"]) == set(load_emoji("noto")["name"])
    assert len(load_emoji("noto")) == len(set(load_emoji("noto")["name"])) == 1906
    assert isinstance(emoji.features["image"], Image)
    assert emoji[0]["image"].size == (64, 64)


def test_unknown_style_is_named():
    with pytest.raises(ValueError, match="`style` must be one of twemoji, noto, got 'apple'"):
        load_emoji("apple")


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="`split` must be one of train, validation, test, test_style, got 'dev'"):
        emoji_questions("dev")


def test_transparent_pixels_become_white():
    image = draw_on_white(raw_drawings("twemoji")["star"], 64)
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_answers_are_those_of_the_table(splits, table):
    for dataset in splits.values():
        for row in dataset.remove_columns("image"):
            entry = table[row["scene"][0]]
            if row["kind"] == "name":
                assert row["answer"] == entry["name"]
            elif row["kind"] == "group":
                assert row["answer"] == entry["group"]
            elif row["kind"] == "caption":
                assert row["answer"] == f"{entry['name']}: {', '.join(entry['keywords'])}"
            else:
                assert row["kind"] == "keyword"
                word = row["question"].split('"')[1]
                assert row["answer"] == ("yes" if word in entry["keywords"] else "no")


def test_images_show_the_emoji_in_the_style(splits):
    for split, style in {"train": "twemoji", "test_style": "noto"}.items():
        drawings = raw_drawings(style)
        for row in splits[split].select(range(50)):
            assert row["image"].tobytes() == draw_on_white(drawings[row["scene"][0]], 64).tobytes()


def test_every_question_has_one_answer(splits):
    for dataset in splits.values():
        answers: dict[tuple[bytes, str], set[str]] = defaultdict(set)
        rows = dataset.cast_column("image", Image(decode=False))
        for image, question, answer in zip(rows["image"], rows["question"], rows["answer"], strict=True):
            answers[image["bytes"], question].add(answer)
        assert all(len(found) == 1 for found in answers.values())


def test_splits_do_not_share_an_image_with_its_question(splits):
    other_seed = asked(emoji_questions("test", seed=1))
    sets = {split: asked(dataset) for split, dataset in splits.items()}
    assert not sets["train"] & other_seed
    for first in SPLITS:
        for second in SPLITS:
            assert first == second or not sets[first] & sets[second]


def test_splits_cover_the_distinct_emoji(splits):
    known = [dataset for split, dataset in splits.items() if split != "test_style"]
    named = {row["scene"][0] for dataset in known for row in dataset.remove_columns("image") if row["kind"] == "name"}
    assert len(named) == 1860
    assert {"cat", "flag: Japan"} <= named
    assert not {"flag: Norway", "flag: Svalbard & Jan Mayen", "family"} & named


def test_style_is_held_out(splits):
    for split, dataset in splits.items():
        assert set(dataset["style"]) == {"noto" if split == "test_style" else "twemoji"}


def test_held_out_style_asks_what_training_asked(splits):
    columns = ["question", "answer", "kind", "scene"]
    assert splits["test_style"].select_columns(columns).to_list() == splits["train"].select_columns(columns).to_list()


def test_every_keyword_is_as_often_right_as_wrong(splits):
    for dataset in splits.values():
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for row in dataset.remove_columns("image"):
            if row["kind"] == "keyword":
                answers[row["question"]][row["answer"]] += 1
        assert all(count["yes"] == count["no"] for count in answers.values())


@pytest.mark.extensive
def test_only_the_seed_determines_the_rows(splits):
    assert digest(emoji_questions("test")) == digest(splits["test"]) != digest(emoji_questions("test", seed=1))
    program = (
        "import hashlib; from datasets import Image; from modeling_sparse_moe_vlm.toolbox.demo.emoji import *;"
        "rows = emoji_questions('test').cast_column('image', Image(decode=False)).to_list();"
        "print(hashlib.sha256(repr(rows).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == digest(splits["test"]), result.stderr


def test_drawing_is_resized():
    assert draw_on_white(raw_drawings("noto")["cat"], 24).size == (24, 24)


def test_half_transparent_pixels_are_blended_with_white():
    drawing = PILImage.new("RGBA", (2, 1), (255, 0, 0, 128))
    drawing.putpixel((1, 0), (0, 0, 255, 0))
    assert draw_on_white(encode_png(drawing), 2).getpixel((0, 0)) == (255, 127, 127)
    drawing = PILImage.new("RGBA", (4, 4), (0, 0, 255, 0))
    assert draw_on_white(encode_png(drawing), 4).getcolors() == [(16, (255, 255, 255))]


def test_png_is_lossless():
    image = draw_on_white(raw_drawings("noto")["cat"], 24)
    again = PILImage.open(io.BytesIO(encode_png(image)))
    assert again.format == "PNG"
    assert again.tobytes() == image.tobytes()
