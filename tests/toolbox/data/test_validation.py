"""Validation of rows: each fault has a kind and a reason, with file and row number, and bad rows can be skipped."""

import json
import pickle
import re

import pytest
from PIL import Image

from modeling_sparse_moe_vlm.toolbox.data import BadRowError, check_data, load_rows
from modeling_sparse_moe_vlm.toolbox.data.bad_rows import SkippedRows
from tests.toolbox.data.data_files import plain, turn, write_image, write_lines

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


def messages(user: object = "hi", answer: object = "yo", role: object = "user", **columns) -> dict:
    return {"messages": [{"role": role, "content": user}, {"role": "assistant", "content": answer}], **columns}


PLACE = {"type": "image"}
# By name: the row (without its folder), the kind of its fault, and its reason. `{folder}` is the folder of the file.
BAD_ROWS = {
    "missing file": (
        messages(images=["a.png", "sub/gone.png"]),
        "missing file",
        "images[1]: there is no file '{folder}/sub/gone.png'.",
    ),
    "empty file": (
        messages(images=["empty.png"]),
        "broken image",
        "images[0] ({folder}/empty.png) cannot be read as an image: cannot identify image file '{folder}/empty.png'",
    ),
    "truncated image": (
        messages(images=["a.png", "cut.png"]),
        "broken image",
        "images[1] ({folder}/cut.png) cannot be read as an image: …",
    ),
    "large image": (
        messages(images=["large.png"]),
        "absurdly large image",
        "images[0] ({folder}/large.png) is absurdly large: Image size (5000 pixels) exceeds limit of 2000 pixels, …",
    ),
    "too few images": (
        messages([PLACE, PLACE], images=["a.png"]),
        "wrong number of images",
        "the row has 1 images, but 2 placeholders for images: give one image for each placeholder.",
    ),
    "too many images": (
        messages([{"type": "text", "text": "hi"}], images=["a.png"]),
        "wrong number of images",
        "the row has 1 images, but 0 placeholders for images: give one image for each placeholder.",
    ),
    "too few images beside those inside": (
        messages([PLACE, PLACE | {"image": "a.png"}], images=[]),
        "wrong number of images",
        "the row has 1 images, but 2 placeholders for images: give one image for each placeholder.",
    ),
    "empty answer": (
        messages(answer=" \n"),
        "empty answer",
        "the answer in messages[1] is empty: give a text, or drop the row.",
    ),
    "answer without parts": (
        messages(answer=[]),
        "empty answer",
        "the answer in messages[1] is empty: give a text, or drop the row.",
    ),
    "user without parts": (messages([]), "wrong type", "messages[0] has no content: give a text or an image."),
    "unknown role": (
        messages(role="tool"),
        "unknown role",
        "messages[0] has the unknown role 'tool': use one of 'system', 'user', 'assistant'.",
    ),
    "role of another type": (
        messages(role=["user"]),
        "unknown role",
        "messages[0] has the unknown role ['user']: use one of 'system', 'user', 'assistant'.",
    ),
    "typed image token": (
        messages("what is <image>?"),
        "typed image token",
        "a text of messages[0] contains the image token '<image>': remove it, or use a content part "
        "{{'type': 'image'}} for an image.",
    ),
    "typed image token in the answer": (
        messages(answer="<|image_pad|>"),
        "typed image token",
        "a text of messages[1] contains the image token '<|image_pad|>': remove it, or use a content part "
        "{{'type': 'image'}} for an image.",
    ),
    "no assistant turn": (
        {"messages": GOOD["messages"][:1]},
        "no assistant turn",
        "the row has no assistant turn, so there is nothing to learn from it.",
    ),
    "no messages": (
        {"messages": []},
        "no assistant turn",
        "the row has no assistant turn, so there is nothing to learn from it.",
    ),
    "lone surrogate": (
        messages("\ud800"),
        "wrong type",
        "messages[0] contains a lone surrogate (at character 0), which is not text: decode its source as UTF-8, "
        "or remove it.",
    ),
    "not a dict": (5, "wrong type", "the row must be a dict, but got 5."),
    "image of another type": (
        messages(images=[5]),
        "wrong type",
        "images[0] must be a path, bytes, or a dict with one of them, but got 5.",
    ),
    "image without a path": (
        messages(images=[""]),
        "wrong type",
        "images[0] must be a path, bytes, or a dict with one of them, but got ''.",
    ),
    "image with bytes of another type": (
        messages(images=[{"bytes": "x"}]),
        "wrong type",
        "images[0]['bytes'] must be bytes, but got 'x'.",
    ),
    "url in capitals": (
        messages(images=["HTTP://a.b/c.png"]),
        "wrong type",
        "images[0] is the URL 'HTTP://a.b/c.png': download the image, and give the path of the file.",
    ),
    "unknown protocol": (
        messages(images=["foo://a/c.png"]),
        "missing file",
        "images[0]: 'foo://a/c.png' cannot be read (Protocol not known: foo): download the image, and give the path of "
        "the file.",
    ),
    "URL": (
        messages(images=["https://a.b/c.png"]),
        "wrong type",
        "images[0] is the URL 'https://a.b/c.png': download the image, and give the path of the file.",
    ),
    "file of an archive": (
        messages(images=["zip://gone.png::{folder}/gone.zip"]),
        "missing file",
        "images[0]: there is no file 'zip://gone.png::{folder}/gone.zip'.",
    ),
    "other format": ({"question": "a"}, "missing field", "the row lacks `messages`: its fields are ['question']."),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with images: a whole one, an empty file, a truncated one, and one that is over Pillow's limit."""
    write_image(tmp_path / "a.png")
    (tmp_path / "empty.png").touch()
    noise = Image.effect_noise((30, 30), 50)
    noise.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:400])
    write_image(tmp_path / "large.png", (100, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    return tmp_path


def write(folder, *rows):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row).replace("{folder}", str(folder)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_names_file_row_and_reason(case, streaming, folder):
    row, kind, reason = BAD_ROWS[case]
    path = write(folder, GOOD, row, GOOD)
    reason = reason.format(folder=folder) if "{" in reason else reason
    with pytest.raises(BadRowError) as raised:
        list(load_rows(path, "messages", streaming=streaming))
    pattern = ".*".join(map(re.escape, reason.split("…")))
    assert re.fullmatch(re.escape(f"{path}, row 1: ") + pattern, str(raised.value))
    assert (raised.value.source, raised.value.row, raised.value.kind) == (str(path), 1, kind)
    assert re.fullmatch(pattern, raised.value.reason)


def test_missing_images_of_llava_data_name_the_image_root(folder):
    turns = [{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "yo"}]
    path = write(folder, {"image": "coco/gone.png", "conversations": turns})
    with pytest.raises(BadRowError) as raised:
        load_rows(path)
    assert raised.value.kind == "missing file"
    assert str(raised.value) == (
        f"{path}, row 0: images[0]: there is no file '{folder}/coco/gone.png'. `image_root` (`--image-root`) names the "
        "folder to which the paths of the images are relative."
    )
    path = write(folder, {"image": "empty.png", "conversations": turns})
    with pytest.raises(BadRowError, match=r"cannot identify image file '.*/empty.png'") as raised:
        load_rows(path)
    assert "--image-root" not in str(raised.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_skipped_rows_are_counted_and_listed(streaming, folder, monkeypatch):
    warnings = []
    monkeypatch.setattr("modeling_sparse_moe_vlm.toolbox.data.bad_rows.logger.warning", warnings.append)
    path = write(folder, messages("<image>"), GOOD, messages(role="tool"), messages("last"), messages("[IMG]"))
    listed = folder / "skipped.jsonl"
    listed.write_text("from an earlier run")
    rows = load_rows(path, on_bad_row="skip", skipped_file=listed, streaming=streaming)
    for _ in range(2):  # a second epoch lists nothing again
        assert [plain(row["messages"])[0] for row in rows] == [turn("user", "hi"), turn("user", "last")]
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(entry["source"], entry["row"], entry["kind"]) for entry in entries] == [
        (str(path), 0, "typed image token"),
        (str(path), 2, "unknown role"),
        (str(path), 4, "typed image token"),
    ]
    assert entries[1]["reason"].startswith("messages[0] has the unknown role 'tool'")
    expected = f"Skipped bad rows: 3 (2 × typed image token, 1 × unknown role). They are listed in {listed}."
    assert warnings == [expected] * (2 if streaming else 1)


def test_without_bad_rows_there_is_no_warning_and_no_file(folder):
    skipped = SkippedRows(folder / "skipped.jsonl")
    assert skipped.summary() is None
    load_rows(write(folder, GOOD), on_bad_row="skip", skipped_file=folder / "skipped.jsonl")
    assert not (folder / "skipped.jsonl").exists()
    skipped = SkippedRows()
    skipped.add(BadRowError("a", 3, "wrong type", "b"))
    assert skipped.summary() == "Skipped bad rows: 1 (1 × wrong type)."


def bad_row(number: int, kind: str = "wrong type", reason: str = "b") -> BadRowError:
    return BadRowError("a", number, kind, reason)


@pytest.mark.parametrize("in_place", [True, False])
def test_the_file_can_be_replaced_by_a_longer_one(folder, in_place):
    """Also in place: a new file often gets the inode of the removed one."""
    path = folder / "skipped.jsonl"
    listed = SkippedRows(path)
    for number in (1, 2):
        listed.add(bad_row(number))
    other = folder / "other.jsonl"
    replaced = SkippedRows(other)
    for number in (7, 8, 9):
        replaced.add(bad_row(number, "not JSON", "a longer reason"))
    if in_place:
        path.write_bytes(other.read_bytes())
    else:
        other.replace(path)
    assert listed.counts == {"not JSON": 3}
    assert [entry["row"] for entry in listed.entries()] == [7, 8, 9]


def test_rows_are_added_to_a_file_that_was_replaced(folder):
    path = folder / "skipped.jsonl"
    listed = SkippedRows(path)
    listed.add(bad_row(1, reason="first"))
    listed.add(bad_row(2, reason="first"))
    path.unlink()
    SkippedRows(path).add(bad_row(3, reason="a longer reason than the first one, by far"))
    listed.add(bad_row(4))
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [3, 4]
    assert [entry["row"] for entry in listed.entries()] == [3, 4]


def test_a_file_that_begins_with_the_same_line_is_read_again(folder):
    """The last line is the same and at the same place, but not those before it."""
    path = folder / "skipped.jsonl"
    listed = SkippedRows(path)
    for number in (1, 5):
        listed.add(bad_row(number))
    path.write_text(path.read_text().replace('"row": 1', '"row": 2'))
    assert [entry["row"] for entry in listed.entries()] == [2, 5]


def test_a_partly_written_line_does_not_break_the_list(folder):
    path = folder / "skipped.jsonl"
    SkippedRows(path).add(bad_row(1))
    with path.open("a") as file:
        file.write('{"source": "a", "ro')  # the process was killed while it wrote
    listed = SkippedRows(path)
    assert [entry["row"] for entry in listed.entries()] == [1]
    for number in (2, 3, 2):
        listed.add(bad_row(number))
    assert [entry["row"] for entry in listed.entries()] == [1, 2, 3]
    lines = path.read_text().splitlines()
    assert lines[1] == '{"source": "a", "ro'
    assert [json.loads(line)["row"] for line in [lines[0], *lines[2:]]] == [1, 2, 3]


def test_names_of_files_that_are_not_unicode_can_be_listed(folder):
    for _ in range(2):
        SkippedRows(folder / "skipped.jsonl").add(BadRowError("ä\udc80", 3, "wrong type", "b"))
    (line,) = (folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert "ä" in line
    assert json.loads(line)["source"] == "ä\udc80"


def test_policy(folder):
    with pytest.raises(ValueError, match="`on_bad_row` must be one of error, skip, but got 'drop'"):
        load_rows(write(folder, GOOD), on_bad_row="drop")


def test_bad_rows_go_between_processes():
    error = pickle.loads(pickle.dumps(BadRowError("a.jsonl", 3, "wrong type", "b")))
    assert str(error) == "a.jsonl, row 3: b"
    assert error.kind == "wrong type"


def test_report(folder):
    """The report counts everything, and shows the first ten bad rows."""
    write_image(folder / "b.png", (5, 5))
    write_image(folder / "c.png", (7, 3))
    rows = [
        GOOD,
        messages(images=["a.png", "b.png"]),
        messages(images=["c.png"]),
        {"messages": GOOD["messages"] * 2, "images": ["a.png"]},
        *[messages(role="tool")] * 11,
        messages(images=["gone.png"]),
    ]
    path = write(folder, *rows)
    listed = folder / "bad.jsonl"
    report = check_data(path, bad_rows_file=listed)
    examples = [
        f"{path}, row {row}: messages[0] has the unknown role 'tool': use one of 'system', 'user', 'assistant'."
        for row in range(4, 14)
    ]
    assert report.as_dict() == {
        "format": "messages",
        "sources": 1,
        "rows": 16,
        "images_per_row": {"0": 1, "1": 2, "2": 1},
        "turns_per_row": {"2": 3, "4": 1},
        "smallest_image": [7, 3],
        "largest_image": [5, 5],
        "bad_rows": {"missing file": 1, "unknown role": 11},
        "examples": examples,
    }
    assert str(report).splitlines() == [
        "format: messages",
        "rows: 16 (4 good, 12 bad)",
        "images per row: 0: 1 row, 1: 2 rows, 2: 1 row",
        "turns per row: 2: 3 rows, 4: 1 row",
        "image sizes: 7×3 to 5×5 pixels",
        "bad rows: 1 × missing file",
        "bad rows: 11 × unknown role",
        *[f"  {example}" for example in examples],
        "  … and 2 more",
    ]
    assert [json.loads(line)["row"] for line in listed.read_text().splitlines()] == list(range(4, 16))


def test_report_without_good_rows(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [messages(role="tool")])
    lines = str(check_data(path)).splitlines()
    assert lines[1:4] == ["rows: 1 (0 good, 1 bad)", "images per row: –", "turns per row: –"]
    assert lines[4] == "bad rows: 1 × unknown role"
    assert len(lines) == 6


def test_the_folder_of_the_list_of_bad_rows_is_created(tmp_path):
    rows = write_lines(tmp_path / "rows.jsonl", [GOOD, messages(answer="")])
    check_data(rows, bad_rows_file=tmp_path / "a/b/bad.jsonl")
    (line,) = (tmp_path / "a/b/bad.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 1
