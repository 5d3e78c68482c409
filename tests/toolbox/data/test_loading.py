"""Sources of data: files, folders, datasets and the Hub, read in order, in memory and streamed."""

import json
import re
import zipfile

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from PIL import Image
from torch.utils.data import DataLoader

from modeling_sparse_moe_vlm.toolbox.data import BadRowError, VisionLanguageCollator, check_data, load_rows, sources
from modeling_sparse_moe_vlm.toolbox.data.bad_rows import RowFault
from modeling_sparse_moe_vlm.toolbox.data.formats import FORMATS
from modeling_sparse_moe_vlm.toolbox.data.validation import validated_row
from tests.support.processors import make_processor
from tests.toolbox.data.data_files import GREEN, RED, colors, plain, turn, write_image, write_lines

IMAGE = datasets.Image()


def vqa(number: int, **columns) -> dict:
    return {"question": f"q{number}", "answer": f"a{number}", **columns}


def questions(rows) -> list[str]:
    return [row["messages"][0]["content"][-1]["text"] for row in rows]


@pytest.fixture(params=[False, True], ids=["in memory", "streaming"])
def load(request):
    """Loads rows in memory and streamed, and checks the type."""

    def load(*arguments, **kwargs) -> list[dict]:
        rows = load_rows(*arguments, streaming=request.param, **kwargs)
        assert isinstance(rows, IterableDataset if request.param else Dataset)
        return list(rows)

    return load


def write_source(folder, suffix: str):
    """Two rows of questions in a file: one with a green image whose path is not ASCII, one without an image."""
    write_image(folder / "bilder/größe 图.png", color=GREEN)
    rows = [vqa(0, image="bilder/größe 图.png"), vqa(1, image=None)]
    path = folder / f"dätä [1]*{suffix}"
    if suffix == ".jsonl":
        write_lines(path, rows)
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    elif suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    else:
        features = Features({"question": Value("string"), "answer": Value("string"), "image": IMAGE})
        rows[0]["image"] = str(folder / rows[0]["image"])
        Dataset.from_list(rows, features=features).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_files(suffix, load, tmp_path):
    path = write_source(tmp_path / "ordner ü", suffix)
    first, second = load(path)
    assert plain(first["messages"]) == [turn("user", None, "q0"), turn("assistant", "a0")]
    assert colors(first) == [GREEN]
    assert plain(second["messages"]) == [turn("user", "q1"), turn("assistant", "a1")]
    assert second["images"] == []
    assert check_data(path).as_dict()["images_per_row"] == {"0": 1, "1": 1}
    assert check_data(path).format == "vqa"


def test_json_of_other_shapes(load, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [vqa(0), vqa(1)]}))
    assert questions(load(path)) == ["q0", "q1"]
    path.write_text(json.dumps(vqa(0)))
    assert questions(load(path)) == ["q0"]
    path.write_text(f"{json.dumps(vqa(0))}\n\n{json.dumps(vqa(1))}\n")
    assert questions(load(path)) == ["q0", "q1"]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([vqa(3)]).encode())
    assert questions(load(path)) == ["q3"]


def test_lines_that_are_not_json_are_bad_rows(load, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(vqa(0))}\n{{oops}}\n{json.dumps(vqa(2))}\n")
    with pytest.raises(BadRowError, match=re.escape(f"{path}, row 1: the line is not valid JSON: Expecting property")):
        load(path)
    assert questions(load(path, on_bad_row="skip")) == ["q0", "q2"]
    path.write_text(f"{{oops}}\n{json.dumps(vqa(1))}\n")  # the format is that of the first row that can be read
    assert questions(load(path, on_bad_row="skip")) == ["q1"]


def test_lines_that_are_not_text_are_bad_rows(load, tmp_path):
    """A line in another encoding, of too many brackets or digits, or without a dict does not end the reading."""
    bad = ['{"question": "größe"}'.encode("latin-1"), b"[" * 100_000, b'{"question": ' + b"9" * 5000 + b"}", b"null"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\r\n".join([b"null", json.dumps(vqa(0)).encode(), b"", *bad]))
    report = check_data(path)
    assert report.bad_rows == {"not UTF-8": 1, "not JSON": 2, "wrong type": 2}
    assert report.examples[0] == f"{path}, row 0: the row must be a dict, but got None."
    assert report.examples[1].startswith(f"{path}, row 2: the line is not UTF-8 ('utf-8' codec can't decode byte 0xf6")
    assert questions(load(path, on_bad_row="skip")) == ["q0"]
    path.write_bytes(json.dumps(vqa(0)).encode("utf-16"))
    with pytest.raises(ValueError, match=r"none of its rows is a dict\. The first row: the line is not UTF-8"):
        load(path)


def test_cells_of_csv_files(load, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffquestion,answer,x\r\nq0,"a,\r\n""b""",1\r\n\r\nq1,7.0\r\nq2,none,,\r\n'.encode())
    loaded = load(path)
    assert questions(loaded) == ["q0", "q1", "q2"]
    assert [row["references"] for row in loaded] == [['a,\r\n"b"'], ["7.0"], ["none"]]
    assert [row["row"] for row in loaded] == [0, 1, 2]
    path.write_bytes("question,answer\nq0,a\nq1,größe\nq2,b\n".encode("latin-1"))
    with pytest.raises(BadRowError, match=r"a\.csv, row 1: the row is not UTF-8: convert the file to UTF-8\."):
        load(path)
    assert questions(load(path, on_bad_row="skip")) == ["q0", "q2"]
    path.write_text("question,answer\nq0,a,b\n")  # not an index, a question and an answer
    with pytest.raises(ValueError, match=r"cannot be read: row 0 has 3 cells, but the first line names 2 columns\. "):
        load(path)
    path.write_text("question,answer,answer\nq0,a,b\n")
    with pytest.raises(ValueError, match="it has several columns with the name 'answer': rename or remove all but one"):
        load(path)
    path.write_text(f"question,answer\nq0,{'a' * 200_000}\n")
    assert len(next(iter(load(path)))["references"][0]) == 200_000


def test_nan_is_a_missing_value(load, tmp_path):
    """`json.dumps` of rows of pandas writes NaN."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q0", "answer": "a", "image": NaN}\n{"question": "q1", "answer": NaN}\n')
    with pytest.raises(BadRowError, match="row 1: the row lacks `answer`: it is null"):
        load(path)
    (row,) = load(path, on_bad_row="skip")
    assert (row["references"], row["images"]) == (["a"], [])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("img", "a.png"),
        ("Picture", "a.JPG"),
        ("image_path", ["a.webp"]),
        ("scan", {"bytes": b"x", "path": None}),
        ("clip_file", "a.mp4"),
        ("photo", {"bytes": None, "path": "a.png"}),
        ("scan", Image.new("RGB", (2, 2))),
    ],
)
def test_images_in_other_fields_are_not_lost(field, value):
    with pytest.raises(RowFault, match=f"the row has an image or a video in '{field}', which would be lost: rename"):
        validated_row(vqa(0) | {field: value}, FORMATS["vqa"])
    # Rows of a table that have no image, and texts that are not paths.
    for row in (vqa(0) | {field: value, "image": None}, vqa(0) | {"id": "a.png", "image_id": "a", "path": 5}):
        assert validated_row(row, FORMATS["vqa"])[0]["images"] == []


def test_fields_may_differ_between_rows(load, tmp_path):
    """A field can first occur after many rows, and have different types."""
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", color=GREEN)
    rows = [vqa(i) for i in range(300)]
    rows += [vqa(300, image="a.png"), vqa(301, image=["b.png", "a.png"]), {"question": "q302", "answers": ["x"]}]
    loaded = load(write_lines(tmp_path / "a.jsonl", rows))
    assert questions(loaded) == [f"q{i}" for i in range(303)]
    assert [colors(row) for row in loaded[299:]] == [[], [RED], [GREEN, RED], []]


def test_texts_of_csv_stay_as_they_are(load, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answer,image\nq0,none,\nq1,007,\n"q,\n2",NA,\n')
    rows = load(path)
    assert [row["messages"][1]["content"][0]["text"] for row in rows] == ["none", "007", "NA"]
    assert questions(rows) == ["q0", "q1", "q,\n2"]


def test_folder_of_files_is_read_in_order(load, tmp_path):
    """Row numbers are those of the file. Other files, such as images, do not matter."""
    write_image(tmp_path / "a.png")
    for name, numbers in (("b", [2, 3]), ("a", [0, 1]), ("c", [])):
        write_lines(tmp_path / f"sub/{name}.jsonl", [vqa(i) for i in numbers])
    assert questions(load(tmp_path)) == ["q0", "q1", "q2", "q3"]
    write_lines(tmp_path / "sub/b.jsonl", [vqa(2), vqa(3, image="gone.png")])
    message = f"{tmp_path}/sub/b.jsonl, row 1: images[0]: there is no file '{tmp_path}/sub/gone.png'."
    with pytest.raises(BadRowError, match=re.escape(message)):
        load(tmp_path)


def test_splits_of_a_folder(load, tmp_path):
    write_lines(tmp_path / "data/train.jsonl", [vqa(0)])
    write_lines(tmp_path / "data/test.jsonl", [vqa(1)])
    assert questions(load(tmp_path)) == ["q0"]
    assert questions(load(tmp_path, split="test")) == ["q1"]
    with pytest.raises(ValueError, match=r"has no split 'dev': its splits are train, test\."):
        load(tmp_path, split="dev")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_image_folder(suffix, load, tmp_path):
    """`metadata` files describe the images beside them. Other data files are not read."""
    write_image(tmp_path / "x/é.png", color=GREEN)
    write_image(tmp_path / "y/b.png")
    for folder, name, caption in (("x", "é.png", "green"), ("y", "b.png", "red")):
        rows = [{"file_name": name, "text": caption}]
        path = tmp_path / folder / f"metadata{suffix}"
        if suffix == ".jsonl":
            write_lines(path, rows)
        else:
            getattr(Dataset.from_list(rows), f"to_{suffix[1:]}")(path)
    write_lines(tmp_path / "other.jsonl", [vqa(0)])
    rows = load(tmp_path)
    assert [plain(row["messages"])[1] for row in rows] == [turn("assistant", "green"), turn("assistant", "red")]
    assert [colors(row) for row in rows] == [[GREEN], [RED]]
    assert check_data(tmp_path).format == "captions"


def test_image_root(load, tmp_path):
    write_image(tmp_path / "images/a.png", color=GREEN)
    row = {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "q\n<image>"}, {"from": "gpt", "value": "a"}],
    }
    path = tmp_path / "llava.json"
    path.write_text(json.dumps([row]))
    (loaded,) = load(path, image_root=tmp_path / "images")
    assert plain(loaded["messages"]) == [turn("user", "q", None), turn("assistant", "a")]
    assert colors(loaded) == [GREEN]
    with pytest.raises(BadRowError, match=re.escape(f"there is no file '{tmp_path}/a.png'")):
        load(path)
    with pytest.raises(FileNotFoundError, match=r"`image_root` '.*gone' is not a folder"):
        load(path, image_root=tmp_path / "gone")


def test_images_as_bytes_and_absolute_paths(load, tmp_path):
    green = write_image(tmp_path / "elsewhere/a.png", color=GREEN)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(green, "b.png")
    features = Features(
        {
            "images": List({"bytes": Value("binary"), "path": Value("string")}),
            "question": Value("string"),
            "answer": Value("string"),
        }
    )
    images = [
        {"bytes": green.read_bytes(), "path": "not a file.png"},
        {"bytes": None, "path": str(green)},
        {"bytes": None, "path": f"zip://b.png::{tmp_path}/images.zip"},
    ]
    path = tmp_path / "a.parquet"
    Dataset.from_list([vqa(0, images=images)], features=features).to_parquet(path)
    (row,) = load(path)
    assert colors(row) == [GREEN] * 3
    assert len(row["messages"][0]["content"]) == 4


def test_datasets(load, tmp_path):
    """Datasets in memory and streamed, with and without an `Image` column, and with a transform."""
    path = str(write_image(tmp_path / "a.png", color=GREEN))
    data = Dataset.from_list([vqa(i, image=path if i else None) for i in range(3)]).cast_column("image", IMAGE)
    names = {f"q{i}" for i in range(3)}
    for given in (
        data,
        data.with_format("torch"),
        data.to_iterable_dataset(),
        DatasetDict({"train": data}),
        data.with_transform(lambda batch: batch),
        IterableDataset.from_generator(lambda: iter(data)),
    ):
        rows = load(given)
        assert questions(rows) == sorted(names)
        assert [colors(row) for row in rows] == [[], [GREEN], [GREEN]]
    with pytest.raises(ValueError, match="the data has no split 'dev': its splits are train"):
        load(DatasetDict({"train": data}), split="dev")
    with pytest.raises(BadRowError, match=r"^the dataset, row 1: the row lacks `answer`"):
        load(Dataset.from_list([vqa(0), vqa(1) | {"answer": None}]))


def saved_rows(tmp_path):
    """Rows whose images are inside, as a path in a text, and none."""
    write_image(tmp_path / "saved/green.png", color=GREEN)
    red = {"bytes": write_image(tmp_path / "red.png").read_bytes(), "path": None}
    inside = Dataset.from_list([{"question": f"q{n}", "answer": "a", "image": red} for n in range(5)])
    return inside.cast_column("image", datasets.Image())


def test_folders_of_save_to_disk(load, tmp_path):
    folder = tmp_path / "saved"
    rows = saved_rows(tmp_path)
    rows.save_to_disk(folder / "one", num_shards=3)
    loaded = load(folder / "one")
    assert [plain(row["messages"])[0]["content"][-1]["text"] for row in loaded] == [f"q{n}" for n in range(5)]
    assert [colors(row) for row in loaded] == [[RED]] * 5

    paths = rows.remove_columns("image").add_column("image", ["green.png"] * 5)
    named = DatasetDict({"train": rows, "test": paths.select([4])})
    named.save_to_disk(folder / "dict")
    assert [row["row"] for row in load(folder / "dict")] == [0, 1, 2, 3, 4]
    (row,) = load(folder / "dict", split="test", image_root=folder)
    assert (row["source"], row["row"], colors(row)) == (f"{folder / 'dict'} (test)", 0, [GREEN])
    write_image(folder / "dict/green.png", color=RED)
    (row,) = load(folder / "dict", split="test")  # by default, paths are relative to the folder
    assert colors(row) == [RED]

    with pytest.raises(ValueError, match=r"saved/dict has no split 'dev': its splits are train, test\."):
        load(folder / "dict", split="dev")
    with pytest.raises(ValueError, match=r"saved/one has no split 'test': it contains a single dataset"):
        load(folder / "one", split="test")
    (folder / "one/dataset_info.json").unlink()
    with pytest.raises(ValueError, match=r"the dataset in .*saved/one .of `save_to_disk`. cannot be read: "):
        load(folder / "one")


def test_files_of_save_to_disk_are_the_shards_of_a_stream(tmp_path):
    rows = saved_rows(tmp_path)
    rows.save_to_disk(tmp_path / "data", num_shards=2)
    assert [part.name for part in sources.find_parts(tmp_path / "data")] == [str(tmp_path / "data")]
    parts = sources.find_parts(tmp_path / "data", streaming=True)
    assert [part.name for part in parts] == [f"{tmp_path}/data, shard {i} of 2" for i in range(2)]
    assert [[row["question"] for row in part.rows()] for part in parts] == [["q0", "q1", "q2"], ["q3", "q4"]]
    stream = load_rows(tmp_path / "data", streaming=True)
    assert stream.num_shards == 2
    assert [row["row"] for row in stream] == [0, 1, 2, 0, 1]
    loaded = DataLoader(stream, batch_size=1, num_workers=2, collate_fn=list)
    assert sorted((row["source"][-6], row["row"]) for batch in loaded for row in batch) == [
        *(("0", n) for n in range(3)),
        *(("1", n) for n in range(2)),
    ]


def test_folders_with_a_file_called_state_are_not_those_of_save_to_disk(load, tmp_path):
    write_lines(tmp_path / "state.json", [{"question": "q", "answer": "a"}])
    assert [row["row"] for row in load(tmp_path)] == [0]


def test_shards_of_a_streamed_dataset():
    data = Dataset.from_list([vqa(i) for i in range(5)] + [vqa(5) | {"answer": " "}])
    rows = load_rows(data.to_iterable_dataset(num_shards=3), streaming=True, on_bad_row="skip")
    assert rows.num_shards == 3
    assert questions(rows) == ["q0", "q1", "q2", "q3", "q4"]
    with pytest.raises(BadRowError, match=r"^the dataset, shard 2 of 3, row 1: the answer in messages"):
        list(load_rows(data.to_iterable_dataset(num_shards=3), streaming=True))


def test_dataset_of_the_hub(load, tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, subset, split, streaming):
        asked.append((name, subset, split, streaming))
        data = Dataset.from_list([vqa(0), vqa(1)])
        return data.to_iterable_dataset(num_shards=2) if streaming else data

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    for name in ("owner/name", "name"):
        rows = load(name, split="test", subset="b")
        assert questions(rows) == ["q0", "q1"]
        assert asked.pop()[:3] == (name, "b", "test")
    check_data("owner/name")
    assert asked == [("owner/name", None, "train", False)]


def test_streaming_with_workers(tmp_path):
    """Each worker reads its own files. Skipped rows are listed once, even over several epochs."""
    write_image(tmp_path / "a.png")
    for i in range(4):
        rows = [vqa(10 * i + j, image="a.png") for j in range(3)] + [vqa(10 * i) | {"answer": ""}]
        write_lines(tmp_path / f"data/{i}.jsonl", rows)
    listed = tmp_path / "skipped.jsonl"
    rows = load_rows(tmp_path / "data", image_root=tmp_path, streaming=True, on_bad_row="skip", skipped_file=listed)
    loader = DataLoader(rows, batch_size=None, num_workers=2)
    for _ in range(2):
        assert sorted(questions(loader)) == sorted(f"q{10 * i + j}" for i in range(4) for j in range(3))
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert sorted((entry["source"], entry["row"]) for entry in entries) == [
        (f"{tmp_path}/data/{i}.jsonl", 3) for i in range(4)
    ]


def test_rows_are_what_the_collator_takes(load, tmp_path):
    write_image(tmp_path / "a.png")
    rows = load(write_lines(tmp_path / "a.jsonl", [vqa(0, images=["a.png", "a.png"]), vqa(1)]))
    batch = VisionLanguageCollator(make_processor())(rows)
    assert batch["pixel_values"].shape[0] == 2
    assert batch["mm_token_type_ids"].sum(dim=1).tolist() == [8, 0]
    assert (batch["labels"] != -100).any(dim=1).all()


def test_references(load, tmp_path):
    """All right answers: of the annotators, or the text of the last assistant turn."""
    rows = [vqa(0), {"question": "q", "answers": [f"a{i % 3}" for i in range(10)]}]
    first, second = load(write_lines(tmp_path / "a.jsonl", rows))
    assert first["references"] == ["a0"]
    assert second["references"] == ["a0", "a1", "a2", "a0", "a1", "a2", "a0", "a1", "a2", "a0"]
    messages = [turn("user", "q"), turn("assistant", "no"), turn("user", "r"), turn("assistant", "a", "b")]
    (row,) = load(write_lines(tmp_path / "b.jsonl", [{"messages": [*messages, turn("user", "s")]}]))
    assert row["references"] == ["ab"]
    (tmp_path / "c.jsonl").write_text(r'{"question": "q", "answers": ["a", "\ud800"]}')
    with pytest.raises(ValueError, match=r"row 0: references\[1\]"):
        load(tmp_path / "c.jsonl")


def test_changed_files_are_read_again(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [vqa(0)])
    assert questions(load_rows(path)) == ["q0"]
    write_lines(path, [vqa(1)])
    assert questions(load_rows(path)) == ["q1"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_empty_files(name, load, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} has no rows.")):
        load(tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} has no rows.")):
        load(tmp_path / name, "vqa")


def test_empty_folders_and_wrong_paths(load, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no data: it needs files that end with \.jsonl, \.json, \.parquet"):
        load(tmp_path / "empty")
    write_image(tmp_path / "images/a.png")
    with pytest.raises(ValueError, match="images has no data: it needs files"):
        load(tmp_path / "images")
    for name in ("gone.jsonl", tmp_path / "gone", "./gone"):
        with pytest.raises(FileNotFoundError, match=r"there is no file or folder '.*gone"):
            load(name)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as data: its name must end with one of \.jsonl"):
        load(tmp_path / "images/a.png")
    with pytest.raises(ValueError, match=r"the data must be a path, .* but got <class 'int'>"):
        load(5)
    with pytest.raises(ValueError, match=r"the data must be a path, .* but got ''\."):
        load("")
    (tmp_path / "images/b.jsonl.GZ").touch()
    write_lines(tmp_path / "images/a.jsonl", [vqa(0)])
    for name in ("images", "images/b.jsonl.GZ"):
        with pytest.raises(ValueError, match=r"b\.jsonl\.GZ cannot be read as data, because it is compressed"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[{]", "a.json cannot be read: it is not valid JSON: Expecting property name"),
        ("a.json", "5", "a.json cannot be read: it must contain a list of rows, but got <class 'int'>."),
        ("a.parquet", "PAR", "a.parquet cannot be read: "),
        ("a.csv", "question,answer\nq,a\nq,a,b,c\n", "a.csv cannot be read: "),
        ("a.jsonl", "5\n6\n", "the format of {folder}/a.jsonl is not recognised: none of its rows is a dict."),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message.format(folder=tmp_path))):
        check_data(tmp_path / name)


def test_only_the_first_good_rows(tmp_path):
    """Rows after them are not read, so that they may be bad."""
    rows = [{"prompt": "Why?", "completion": text} for text in ("a", "", "b", "c", "")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = load_rows(tmp_path / "rows.jsonl", on_bad_row="skip", max_rows=3)
    assert read["row"] == [0, 2, 3]
    assert load_rows(tmp_path / "rows.jsonl", max_rows=1)["row"] == [0]
    with pytest.raises(BadRowError, match="row 1"):
        load_rows(tmp_path / "rows.jsonl", max_rows=2)
    for number in (0, -1, 1.5):
        with pytest.raises(ValueError, match=r"`max_rows` must be a whole number of at least 1, but got"):
            load_rows(tmp_path / "rows.jsonl", max_rows=number)
    with pytest.raises(ValueError, match=r"`max_rows` cannot be combined with `streaming=True`"):
        load_rows(tmp_path / "rows.jsonl", max_rows=1, streaming=True)
