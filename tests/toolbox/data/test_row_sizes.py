"""Names and sizes of rows: where a row comes from, and limits of rows and batches."""

import copy
import json
import pickle
import re

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from modeling_sparse_moe_vlm.toolbox.data import BadRowError, VisionLanguageCollator, load_rows
from modeling_sparse_moe_vlm.toolbox.data.row_sizes import RowSize, SizedBatch
from modeling_sparse_moe_vlm.toolbox.evaluation import generate_answers
from tests.support.processors import assistant, make_image, make_processor, make_speaking_model, make_tokenizer
from tests.toolbox.data.data_files import write_image, write_lines


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def vqa(number: int, *images: str, answer: str = "yes") -> dict:
    return {"question": f"q{number}", "answer": answer, "images": list(images)}


@pytest.fixture
def data(tmp_path):
    """Rows with 0, 1 and 2 images, and a long row."""
    write_image(tmp_path / "a.png")
    rows = [vqa(0), vqa(1, "a.png"), vqa(2, "a.png", "a.png"), vqa(3, answer="cat " * 40)]
    return write_lines(tmp_path / "a.jsonl", rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_know_their_source_and_number(streaming, tmp_path):
    for name in "ab":
        rows = [vqa(0), vqa(1, answer=" "), vqa(2)]
        write_lines(tmp_path / f"{name}.jsonl", rows)
    rows = load_rows(tmp_path, streaming=streaming, on_bad_row="skip")
    assert isinstance(rows, IterableDataset if streaming else Dataset)
    expected = [(f"{tmp_path}/{name}.jsonl", number) for name in "ab" for number in (0, 2)]
    assert [(row["source"], row["row"]) for row in rows] == expected


def test_errors_of_the_collator_name_source_and_number(data, processor):
    rows = list(load_rows(data))
    collator = VisionLanguageCollator(processor)
    with pytest.raises(ValueError, match=f"^{re.escape(str(data))}, row 2 has 1 images in `images`, but 2 place"):
        collator([rows[3], rows[2] | {"images": rows[2]["images"][:1]}])
    with pytest.raises(ValueError, match=f"^{re.escape(str(data))}, row 1 cannot be processed: images"):
        collator([rows[3], rows[1] | {"images": [5]}])
    silent = [row | {"messages": row["messages"][:1]} for row in rows]
    with pytest.raises(ValueError, match=f"^{re.escape(f'{data}, row 1; {data}, row 2')} have no assistant turn"):
        collator([rows[0], silent[1], silent[2]])
    own = {"messages": silent[0]["messages"]}
    with pytest.raises(ValueError, match=f"^row 0 of the batch; {re.escape(str(data))}, row 1 have no assistant turn"):
        collator([own, silent[1], rows[0]])
    with pytest.raises(ValueError, match=r"^rows \[1\] of the batch have no assistant turn"):
        collator([rows[0], own])
    with pytest.raises(ValueError, match=f"^{re.escape(str(data))}, row 1: messages.0. lacks `role`"):
        generate_answers(torch.nn.Identity(), processor, [rows[1] | {"messages": [{"content": "a"}]}])


@pytest.mark.parametrize(
    "origin", [{"source": "web"}, {"row": 7}, {"source": 3, "row": 7}, {"source": "a", "row": "7"}]
)
def test_other_rows_are_named_by_their_position(origin, processor):
    """`source` and `row` of a user's own data can mean something else."""
    with pytest.raises(ValueError, match=r"^row 1 lacks `messages`"):
        VisionLanguageCollator(processor)([{"messages": [{"role": "user", "content": "a"}]} | origin, origin])


def test_batches_have_the_sizes_of_their_rows(data, processor):
    rows = load_rows(data)
    collator = VisionLanguageCollator(processor)
    batch = collator(list(rows))
    tokens = [collator([row])["input_ids"].shape[1] for row in rows]
    assert batch.row_sizes == [
        RowSize(f"{data}, row 0", tokens[0], 0, 0),
        RowSize(f"{data}, row 1", tokens[1], 1, 4),
        RowSize(f"{data}, row 2", tokens[2], 2, 8),
        RowSize(f"{data}, row 3", tokens[3], 0, 0),
    ]
    assert tokens[2] == tokens[1] + 4 == tokens[0] + 8 < tokens[3] + 8
    assert "row_sizes" not in dict(batch)
    sizes = batch.row_sizes
    for same in (copy.copy(batch), pickle.loads(pickle.dumps(batch)), batch.to("cpu")):
        assert type(same) is SizedBatch
        assert same.row_sizes == sizes
        assert torch.equal(same["input_ids"], batch["input_ids"])
    (loaded,) = DataLoader(rows, batch_size=4, collate_fn=collator, num_workers=1)
    assert loaded.row_sizes == sizes
    assert str(sizes[2]) == f"{data}, row 2 (tokens: {tokens[2]}, images: 2, image tokens: 8)"


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_over_a_limit_are_bad_rows(streaming, data, processor, tmp_path):
    longest = [size.tokens for size in VisionLanguageCollator(processor)(list(load_rows(data))).row_sizes]
    listed = tmp_path / "skipped.jsonl"

    def load(**limits):
        options = {"on_bad_row": "skip", "skipped_file": listed}
        return [row["row"] for row in load_rows(data, streaming=streaming, processor=processor, **options, **limits)]

    assert load() == [0, 1, 2, 3]
    assert load(max_length=longest[3], max_image_tokens=8) == [0, 1, 2, 3]
    assert load(max_length=longest[3] - 1) == [0, 1, 2]
    assert [json.loads(line)["kind"] for line in listed.read_text().splitlines()] == ["too long"]
    assert load(max_image_tokens=7, max_length=longest[3] - 1) == [0, 1]
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(entry["source"], entry["row"], entry["kind"]) for entry in entries] == [
        (str(data), 2, "too many image tokens"),
        (str(data), 3, "too long"),
    ]
    message = f"{data}, row 2: the row has 8 image tokens in 2 images, more than `max_image_tokens` (7): increase"
    with pytest.raises(BadRowError, match=re.escape(message)):
        list(load_rows(data, streaming=streaming, processor=processor, max_image_tokens=7))
    message = f"{data}, row 3: the row has {longest[3]} tokens, more than `max_length` ({longest[3] - 1}): increase"
    with pytest.raises(BadRowError, match=re.escape(message)):
        list(load_rows(data, streaming=streaming, processor=processor, max_length=longest[3] - 1))


def test_rows_that_the_processor_cannot_process_are_bad_rows(data):
    """A language model reads no images."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    message = f"{data}, row 1: the row has a part of type 'image', but the model only reads text."
    with pytest.raises(BadRowError, match=re.escape(message)):
        load_rows(data, processor=tokenizer)
    rows = load_rows(data, processor=tokenizer, on_bad_row="skip", max_image_tokens=1)
    assert [row["row"] for row in rows] == [0, 3]


@pytest.mark.parametrize("packing", [False, True])
def test_tiles_are_counted(packing):
    """The first image has 2 × 3 tiles and a thumbnail, and the second one tile."""
    processor, model = make_processor(max_tiles=6), make_speaking_model()
    wide, square = make_image(0, width=70, height=45), make_image(1, width=20, height=20)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    rows = [
        {"messages": [{"role": "user", "content": content}, assistant("Both")], "images": [wide, square]},
        {"messages": [{"role": "user", "content": content[1:]}, assistant("One")], "images": [wide]},
    ]
    options = {"packing": packing, "model": model if packing else None}
    batch = VisionLanguageCollator(processor, max_image_tokens=32, max_image_tokens_per_batch=60, **options)(rows)
    assert [(size.images, size.image_tokens) for size in batch.row_sizes] == [(2, 32), (1, 28)]
    assert batch["pixel_values"].shape == (8 + 7, 3, 16, 16)
    with pytest.raises(ValueError, match=r"row 0 of the batch has 32 image tokens in 2 images, more than .* \(31\)"):
        VisionLanguageCollator(processor, max_image_tokens=31, **options)(rows)
    with pytest.raises(ValueError, match=r"the batch has 60 image tokens, more than `max_image_tokens_per_batch` \(59"):
        VisionLanguageCollator(processor, max_image_tokens_per_batch=59, **options)(rows)
    if packing:
        padded = VisionLanguageCollator(processor)(rows)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).loss, model(**padded).loss)


def test_limits_of_the_collator(data, processor):
    rows = list(load_rows(data))
    assert VisionLanguageCollator(processor, max_image_tokens=8, max_image_tokens_per_batch=12)(rows)
    message = f"^{re.escape(str(data))}, row 2 has 8 image tokens in 2 images, more than `max_image_tokens` .7."
    with pytest.raises(ValueError, match=message):
        VisionLanguageCollator(processor, max_image_tokens=7)(rows)
    with pytest.raises(
        ValueError, match=r"^the batch has 12 image tokens, more than `max_image_tokens_per_batch` \(11\)\. De"
    ) as error:
        VisionLanguageCollator(processor, max_image_tokens_per_batch=11)(rows)
    sizes = VisionLanguageCollator(processor)(rows).row_sizes
    assert str(error.value).endswith(f"Its rows: {'; '.join(map(str, sizes))}.")


@pytest.mark.parametrize("limit", ["max_length", "max_image_tokens", "max_image_tokens_per_batch"])
@pytest.mark.parametrize("value", [0, -1, True, 2.0])
def test_wrong_limits(limit, value, data, processor):
    message = rf"`{limit}` must be a whole number of at least 1, but got {value}\."
    with pytest.raises(ValueError, match=message):
        VisionLanguageCollator(processor, **{limit: value})
    assert VisionLanguageCollator(processor, **{limit: 1})
    if limit != "max_image_tokens_per_batch":
        with pytest.raises(ValueError, match=message):
            load_rows(data, processor=processor, **{limit: value})
        with pytest.raises(ValueError, match="need the `processor` of the model, which counts tokens"):
            load_rows(data, **{limit: 1})
