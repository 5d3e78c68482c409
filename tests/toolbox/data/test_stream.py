"""Streams with workers and processes, and the batches that training makes of them."""

import copy
import gc
import itertools
import json
import pickle
import threading

import pytest
from datasets import Dataset, Features, Image, Value
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from modeling_sparse_moe_vlm.toolbox.data import BadRowError, load_rows, reading, validation
from modeling_sparse_moe_vlm.toolbox.data import stream as stream_module
from modeling_sparse_moe_vlm.toolbox.data.repeated_rows import RepeatedRow
from modeling_sparse_moe_vlm.toolbox.data.stream import RowStream, StreamBatches, StreamCollator
from tests.toolbox.data.data_files import GREEN, colors, write_image, write_lines


def vqa(number: int, **columns) -> dict:
    return {"question": f"q{number}", "answer": f"a{number}", **columns}


def numbers(rows) -> list[int]:
    return [int(row["messages"][0]["content"][-1]["text"][1:]) for row in rows]


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


@pytest.fixture
def folder(tmp_path):
    """Two files of 7 and 5 rows with an image. The rows 3 and 9 (of all) are bad."""
    write_image(tmp_path / "a.png", color=GREEN)
    rows = [vqa(i, image="gone.png" if i in (3, 9) else "../a.png") for i in range(12)]
    write_lines(tmp_path / "data/0.jsonl", rows[:7])
    write_lines(tmp_path / "data/1.jsonl", rows[7:])
    return tmp_path


GOOD = [0, 1, 2, 4, 5, 6, 7, 8, 10, 11]


def stream(folder, **kwargs) -> RowStream:
    return load_rows(folder / "data", streaming=True, **{"on_bad_row": "skip", **kwargs})


@pytest.fixture
def decoded(monkeypatch):
    """The rows whose images are decoded, in order."""
    seen = []
    original = reading.validated_row
    monkeypatch.setattr(
        reading, "validated_row", lambda row, *rest: seen.append(int(row["question"][1:])) or original(row, *rest)
    )
    return seen


def as_numbers(rows) -> list[int] | None:
    """A collator, which worker processes can receive."""
    return numbers(rows)


def batches(rows, size: int, number: int, process=0, processes=1, skipped=0, workers=0) -> list[list[int]]:
    source = StreamBatches(rows, size, process, processes, skipped)
    loader = DataLoader(source, batch_size=None, num_workers=workers, collate_fn=StreamCollator(as_numbers))
    return list(itertools.islice(loader, number))


# ------------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 5])
def test_each_row_is_read_once_by_any_number_of_workers(folder, workers):
    listed = folder / "skipped.jsonl"
    rows = stream(folder, skipped_file=listed)
    loader = DataLoader(rows, batch_size=2, num_workers=workers, collate_fn=list)
    for _ in range(2):
        batched = list(loader)
        read = [row for batch in batched for row in batch]
        assert sorted(numbers(read)) == GOOD
        assert [colors(row) for row in read] == [[GREEN]] * 10
    assert {(row["source"], row["row"]) for row in read} == {
        (f"{folder}/data/{number // 7}.jsonl", number % 7) for number in GOOD
    }
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert sorted((entry["source"][-7:], entry["row"], entry["kind"]) for entry in entries) == [
        ("0.jsonl", 3, "missing file"),
        ("1.jsonl", 2, "missing file"),
    ]


@pytest.mark.parametrize("named", [False, True])
def test_rows_that_workers_skip_are_counted_once(folder, named, monkeypatch):
    warnings = []
    monkeypatch.setattr("modeling_sparse_moe_vlm.toolbox.data.bad_rows.logger.warning", warnings.append)
    rows = stream(folder, skipped_file=folder / "skipped.jsonl" if named else None)
    for _ in range(2):
        list(DataLoader(rows, batch_size=None, num_workers=2))
        rows.reader.skipped.warn_of_new()
    where = f" They are listed in {folder}/skipped.jsonl." if named else ""
    assert warnings == [f"Skipped bad rows: 2 (2 × missing file).{where}"]
    monkeypatch.setenv("RANK", "1")  # only the first process warns
    rows.reader.skipped.warn()
    assert len(warnings) == 1
    monkeypatch.setenv("RANK", "0")
    rows.reader.skipped.warn()
    assert len(warnings) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_workers_name_file_row_and_reason(folder, workers):
    rows = stream(folder, on_bad_row="error")
    with pytest.raises(BadRowError) as caught:
        list(DataLoader(rows, batch_size=None, num_workers=workers))
    error = caught.value
    gone = f"images[0]: there is no file '{folder}/data/gone.png'."
    expected = {"0.jsonl": 3, "1.jsonl": 2}  # whichever worker is first
    name = error.source.rpartition("/")[2]
    assert (error.source, error.row) == (f"{folder}/data/{name}", expected[name])
    assert (error.kind, error.reason) == ("missing file", gone)
    assert str(error) == f"{folder}/data/{name}, row {expected[name]}: {gone}"


def test_bad_row_errors_keep_their_attributes():
    error = BadRowError("a, row 5: b.jsonl", 3, "broken image", "it is\nbroken: really")
    for other in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (other.source, other.row, other.kind, other.reason) == error.args
        assert str(other) == "a, row 5: b.jsonl, row 3: it is\nbroken: really"
    assert str(BadRowError("something else")) == "something else"
    assert BadRowError("something else").row is None


# ----------------------------------------------------------------------------------------- methods of IterableDataset


def test_shuffling_decodes_only_the_rows_that_are_read(folder, decoded):
    rows = stream(folder).shuffle(seed=1, buffer_size=8)
    assert isinstance(rows, RowStream)
    first = numbers(itertools.islice(rows, 3))
    assert len(decoded) < 6
    order = numbers(rows)
    assert order[:3] == first
    assert sorted(order) == GOOD
    assert order != GOOD
    rows.set_epoch(1)
    other = numbers(rows)
    assert sorted(other) == GOOD
    assert other != order
    for _ in range(2):
        assert numbers(stream(folder).shuffle(buffer_size=8)) == numbers(stream(folder).shuffle(seed=0, buffer_size=8))
    assert sorted(numbers(DataLoader(rows, batch_size=None, num_workers=2))) == GOOD


def test_other_methods_get_validated_rows(folder):
    rows = stream(folder)
    assert numbers(rows.take(4)) == [0, 1, 2, 4]
    assert numbers(rows.filter(lambda row: row["row"] == 1)) == [1, 8]
    assert [row["length"] for row in rows.map(lambda row: {"length": len(row["messages"])})] == [2] * 10
    assert [len(batch["messages"]) for batch in rows.iter(4)] == [4, 4, 2]
    assert numbers(rows.shard(2, 1)) == [7, 8, 10, 11]
    assert rows.column_names == list(reading.FEATURES)
    for number in (2, 3):  # as many as there are shards, and more
        parts = [numbers(split_dataset_by_node(rows, i, number)) for i in range(number)]
        assert sorted(flat(parts)) == GOOD
        assert min(map(len, parts)) >= 3


def test_a_stream_continues_at_a_position(folder):
    rows = stream(folder)
    assert numbers(itertools.islice(rows, 5)) == [0, 1, 2, 4, 5]
    state = rows.state_dict()
    again = stream(folder)
    again.load_state_dict(state)
    assert numbers(again) == [6, 7, 8, 10, 11]


# ------------------------------------------------------------------------------------------------ batches for training


def test_batches_have_consecutive_rows_without_bad_ones(folder):
    """Epoch follows epoch within a batch. Of a batch of bad rows, the next good row is left."""
    rows = stream(folder)
    assert batches(rows, 5, 3)[:2] == [[0, 1, 2, 4], [5, 6, 7, 8]]
    third = batches(rows, 5, 5)[2]
    assert third[:2] == [10, 11]
    assert len(third) == 5 or 3 not in third
    assert batches(rows, 1, 5) == [[0], [1], [2], [4], [4]]
    first = itertools.islice(StreamBatches(rows, 1, 0, 1), 5)
    assert [isinstance(row, RepeatedRow) for (row,) in first] == [False, False, False, True, False]


@pytest.mark.parametrize("shuffled", [False, True])
def test_batches_do_not_depend_on_workers_and_processes(folder, shuffled):
    rows = stream(folder).shuffle(seed=3, buffer_size=6) if shuffled else stream(folder)
    whole = batches(rows, 4, 10)
    for workers in (1, 2, 3):
        assert batches(rows, 4, 10, workers=workers) == whole
    for workers in (0, 2):
        halves = [batches(rows, 2, 10, process=i, processes=2, workers=workers) for i in range(2)]
        assert [first + second for first, second in zip(*halves)] == whole
    # Every epoch has every row. The epochs of a shuffled stream differ.
    read = flat(batches(rows, 4, 9))  # three epochs of 12 rows
    assert sorted(read) == sorted(GOOD * 3)
    assert not shuffled or len({tuple(read[10 * i : 10 * i + 10]) for i in range(3)}) == 3


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("workers", [0, 3])
def test_resumed_batches_equal_uninterrupted_ones(folder, shuffled, workers, decoded):
    """Batches before the resume are not read. Resuming can start in a later epoch."""
    rows = stream(folder).shuffle(seed=3, buffer_size=6) if shuffled else stream(folder)
    whole = batches(rows, 3, 14, workers=workers)
    for skipped in (1, 4, 11):
        decoded.clear()
        resumed = batches(stream(folder) if not shuffled else rows, 3, 14, skipped=skipped, workers=workers)
        assert resumed[:skipped] == [{}] * skipped
        assert resumed[skipped:] == whole[skipped:]
        if workers == 0:
            assert len(decoded) == 3 * (14 - skipped)


def test_resuming_in_a_late_epoch_reads_two_epochs_at_most(folder, monkeypatch):
    rows = stream(folder).shuffle(seed=3, buffer_size=6)
    whole = batches(rows, 5, 50)
    read = []
    original = stream_module.raw_rows_of
    monkeypatch.setattr(stream_module, "raw_rows_of", lambda raw: (read.append(row) or row for row in original(raw)))
    for skipped, number in ((49, 13 + 10), (48, 13 + 5), (24, 13 + 5), (2, 15)):  # one row too far to find the end
        read.clear()
        assert batches(rows, 5, 50, skipped=skipped)[skipped : skipped + 2] == whole[skipped : skipped + 2]
        read.clear()
        batches(rows, 5, skipped + 1, skipped=skipped)
        assert len(read) == number


def test_threads_of_a_stream_end_with_it(folder):
    """Otherwise the garbage collector ends them, perhaps in another thread, which can then wait for itself."""
    rows = stream(folder).shuffle(seed=3, buffer_size=4)
    before = set(threading.enumerate())
    gc.disable()
    try:
        for source in (StreamBatches(rows, 1, 0, 1), rows):
            iterator = iter(source)
            next(iterator)
            assert set(threading.enumerate()) > before
            del iterator
            assert set(threading.enumerate()) == before
    finally:
        gc.enable()


def parquet_stream(folder, num_shards: int) -> RowStream:
    path = str(write_image(folder / "a.png", color=GREEN))
    features = Features({"question": Value("string"), "answer": Value("string"), "image": Image()})
    for shard in range(num_shards):
        rows = [vqa(10 * shard + i, image=path) for i in range(4)]
        Dataset.from_list(rows, features=features).to_parquet(folder / f"data/{shard}.parquet")
    return stream(folder)


def test_readers_of_files_with_images_read_different_files(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    rows = parquet_stream(tmp_path, 4)
    assert [rows.splits_shards(number) for number in (1, 4, 5)] == [True, True, False]
    first, second = (batches(rows, 2, 8, process=i, processes=2) for i in range(2))
    assert first[:4] == [[0, 1], [2, 3], [20, 21], [22, 23]]
    assert second[:4] == [[10, 11], [12, 13], [30, 31], [32, 33]]
    assert sorted(flat(first)) == sorted(2 * [0, 1, 2, 3, 20, 21, 22, 23])
    assert batches(rows, 2, 8, process=1, processes=2, skipped=5)[5:] == second[5:]
    with_workers = batches(rows, 2, 4, process=1, processes=2, workers=2)
    assert with_workers == [[10, 11], [30, 31], [12, 13], [32, 33]]
    assert sorted(numbers(DataLoader(rows, batch_size=None, num_workers=3))) == sorted(numbers(rows))


@pytest.mark.parametrize("mapped", [False, True])
def test_workers_read_whole_files_of_every_type(tmp_path, mapped):
    """`datasets` would divide the rows of a file that a worker reads among all workers."""
    data = Dataset.from_list([vqa(i) for i in range(5)])
    for suffix in ("csv", "json", "parquet"):
        (tmp_path / suffix).mkdir()
        for i in range(2):
            getattr(data, f"to_{suffix}")(tmp_path / suffix / f"{i}.{suffix}")
        rows = load_rows(tmp_path / suffix, streaming=True)
        rows = rows.map(lambda row: row) if mapped else rows
        for workers in (2, 3):
            assert sorted(numbers(DataLoader(rows, batch_size=None, num_workers=workers))) == sorted(2 * list(range(5)))
    rows = load_rows(data.to_iterable_dataset(num_shards=2), streaming=True)
    assert sorted(numbers(DataLoader(rows, batch_size=None, num_workers=2))) == list(range(5))


def test_text_files_are_not_split_by_file(folder):
    assert not stream(folder).splits_shards(1)


def test_data_without_a_good_row_is_an_error(tmp_path):
    write_lines(tmp_path / "data/0.jsonl", [vqa(0, image="gone.png"), vqa(1, image="gone.png")])
    with pytest.raises(ValueError, match=r"no row of the data can be used: Skipped bad rows: 2 \(2 × missing file\)"):
        batches(stream(tmp_path), 1, 1)
    write_lines(tmp_path / "data/0.jsonl", [vqa(0)])
    rows = stream(tmp_path)
    write_lines(tmp_path / "data/0.jsonl", [])
    with pytest.raises(ValueError, match="the data has no rows: there is nothing to train on"):
        batches(rows, 1, 1)


# -------------------------------------------------------------------------------------- images that break after loading


@pytest.fixture(params=["direct", "shuffled", "selected"])
def broken_later(request, tmp_path):
    """Six rows in memory, whose images 1 and 2 broke after they were validated."""
    for i in range(6):
        write_image(tmp_path / f"{i}.png", color=(i, i, i))
    path = write_lines(tmp_path / "a.jsonl", [vqa(i, image=f"{i}.png") for i in range(6)])

    def load(policy: str):
        for i in (1, 2):
            write_image(tmp_path / f"{i}.png")
        rows = load_rows(path, on_bad_row=policy, skipped_file=tmp_path / "skipped.jsonl")
        (tmp_path / "1.png").write_bytes(b"not an image")
        (tmp_path / "2.png").unlink()
        if request.param == "shuffled":
            return rows.shuffle(seed=0).sort("row")
        return rows.select([0, 1, 2, 3, 4, 5]) if request.param == "selected" else rows

    load.folder = tmp_path
    return load


def test_broken_images_do_not_end_a_run_that_skips_bad_rows(broken_later, monkeypatch):
    rows, folder = broken_later("skip"), broken_later.folder
    for workers in (0, 2):
        loader = DataLoader(rows, batch_size=2, collate_fn=as_numbers, num_workers=workers)
        assert list(loader) == [[0], [3], [4, 5]]
    assert numbers(rows) == [0, 3, 4, 5]
    assert numbers(rows.__getitems__([1])) == [3]  # a batch is never empty
    for keys, is_repeated in (([1], True), ([0, 1], False)):
        assert [isinstance(row, RepeatedRow) for row in rows.__getitems__(keys)] == [is_repeated]
    assert numbers(rows.__getitems__([2, 1])) == [3]
    assert numbers(rows.select([3, 2]).__getitems__([1])) == [3]
    entries = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [(entry["source"], entry["row"], entry["kind"]) for entry in entries] == [
        (f"{folder}/a.jsonl", 1, "broken image"),
        (f"{folder}/a.jsonl", 2, "missing file"),
    ]
    with pytest.raises(BadRowError, match=r"a\.jsonl, row 1: images\[0\] .*1\.png"):
        rows[1]
    with pytest.raises(IndexError):
        rows[6]
    with pytest.raises(ValueError, match="no row of the data can be read"):
        rows.select([1, 2]).__getitems__([0])


def test_broken_images_are_errors_by_default(broken_later):
    rows, folder = broken_later("error"), broken_later.folder
    for read in (lambda: rows[2], lambda: rows[-4], lambda: rows.__getitems__([0, 2])):
        with pytest.raises(BadRowError) as caught:
            read()
        assert caught.value.args[:3] == (f"{folder}/a.jsonl", 2, "missing file")
    with pytest.raises(BadRowError, match="row 1"):
        list(rows)
    assert not (folder / "skipped.jsonl").exists()


def test_an_image_that_breaks_between_validation_and_decoding_is_skipped_in_a_stream(folder, monkeypatch):
    original = validation.check_image

    def check(source, number):
        size = original(source, number)
        if not seen:
            (folder / "a.png").write_bytes(b"not an image")
        seen.append(source)
        return size

    seen = []
    monkeypatch.setattr(validation, "check_image", check)
    rows = stream(folder)
    assert list(rows) == []
    entries = rows.reader.skipped.entries()
    assert len(entries) == 12
    assert entries[0] == {
        "source": f"{folder}/data/0.jsonl",
        "row": 0,
        "kind": "broken image",
        "reason": entries[0]["reason"],
    }
    assert "an image cannot be decoded" in entries[0]["reason"]
