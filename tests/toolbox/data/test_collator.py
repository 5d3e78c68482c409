"""Batches for training: targets, pictures at their placeholders, and rows that are wrong."""

import numpy as np
import pytest

from modeling_sparse_moe_vlm.toolbox.data.collator import IGNORE_INDEX, VisionLanguageCollator, with_images
from tests.support.processors import assistant, make_picture, make_processor

PLACEHOLDER = {"type": "image"}
ANSWER = assistant("yes")


def row(*parts: dict, **columns) -> dict:
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "a cat?"}]}, ANSWER], **columns}


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def test_targets_are_the_answers(processor):
    batch = VisionLanguageCollator(processor)([row(PLACEHOLDER, images=[make_picture()]), row()])
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    for labels in batch["labels"]:
        assert processor.decode(labels[labels != IGNORE_INDEX]) == "yes<|im_end|>"


@pytest.mark.parametrize("columns", [{}, {"images": None}, {"images": []}])
def test_rows_without_pictures(processor, columns):
    batch = VisionLanguageCollator(processor)([row(**columns)])
    assert "pixel_values" not in batch
    assert not (batch["input_ids"] == processor.image_token_id).any()
    plain = {"messages": [{"role": "user", "content": "a cat?"}, ANSWER], **columns}
    assert VisionLanguageCollator(processor)([plain])["input_ids"].tolist() == batch["input_ids"].tolist()


def test_pictures_in_order_and_in_any_form(processor, tmp_path):
    """A PIL image, an array, a path as `Path` and as string, in the row and in the message itself."""
    pictures = [make_picture(seed) for seed in range(4)]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    collator = VisionLanguageCollator(processor)
    expected = collator([row(*[PLACEHOLDER] * 4, images=pictures)])
    forms = [
        row(*[PLACEHOLDER] * 4, images=[tmp_path / f"{number}.png" for number in range(4)]),
        row(
            PLACEHOLDER,
            # As in rows of a table, which have every key.
            {"type": "image", "image": None, "path": tmp_path / "1.png", "text": None},
            {"type": "image", "image": None, "path": None, "text": None},
            {"type": "image", "image": np.asarray(pictures[3])},
            images=[str(tmp_path / "0.png"), pictures[2]],
        ),
    ]
    for form in forms:
        batch = collator([form])
        assert batch["pixel_values"].tolist() == expected["pixel_values"].tolist()
        assert batch["input_ids"].tolist() == expected["input_ids"].tolist()


@pytest.mark.parametrize(
    ("wrong", "counts"),
    [
        (row(PLACEHOLDER, images=[make_picture()] * 2), "2 pictures in `images`, but 1 placeholders"),
        (row(images=[make_picture()]), "1 pictures in `images`, but 0 placeholders"),
        (row(PLACEHOLDER), "0 pictures in `images`, but 1 placeholders"),
        (row(PLACEHOLDER, PLACEHOLDER, images=[make_picture()]), "1 pictures in `images`, but 2 placeholders"),
        (
            row({"type": "image", "image": make_picture()}, images=[make_picture()]),
            "1 pictures in `images`, but 0 placeholders",
        ),
    ],
)
def test_a_wrong_number_of_pictures_is_named_with_its_row(processor, wrong, counts):
    with pytest.raises(ValueError, match=f"row 1 has {counts}"):
        VisionLanguageCollator(processor)([row(PLACEHOLDER, images=[make_picture()]), wrong])


def test_rows_are_left_as_they_are(processor):
    given = row(PLACEHOLDER, images=[make_picture()])
    with_images(given, 0)
    assert given["messages"][0]["content"][0] == {"type": "image"}


def test_rows_that_teach_nothing_are_named(processor):
    silent = {"messages": [{"role": "user", "content": "a cat?"}]}
    with pytest.raises(ValueError, match=r"rows \[1, 2\] of the batch hold no assistant turn"):
        VisionLanguageCollator(processor)([row(), silent, silent])


def test_rows_that_are_too_long_are_named(processor):
    long = {"messages": [{"role": "user", "content": "cat " * 50}, ANSWER]}
    with pytest.raises(ValueError, match=r"row 1 of the batch has .* tokens, more than `max_length`"):
        VisionLanguageCollator(processor, max_length=40)([row(), long])
