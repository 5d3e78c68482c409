import hashlib
import importlib
import os
import pickle
import re
import subprocess
import sys
from collections import Counter, defaultdict
from typing import Any

import datasets
import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage

from modeling_sparse_moe_vlm.toolbox.demo.emoji import SPLITS, draw_on_white, load_emoji, raw_drawings
from modeling_sparse_moe_vlm.toolbox.demo.scenes import (
    DEFAULT_VOCABULARY,
    arrangement_split,
    load_new_style,
    load_scenes,
    scenes,
    to_messages,
)
from modeling_sparse_moe_vlm.toolbox.evaluation import blind_baseline

module = importlib.import_module(
    "modeling_sparse_moe_vlm.toolbox.demo.scenes"
)  # the package has a function of this name
CLOSED_CHANCE = {"position": 25, "exists": 50, "exists_category": 50, "count": 100 / 3, "count_category": 100 / 3}
NEIGHBOUR_KINDS = ("left_of", "right_of", "above", "below")
ALL_KINDS = {*NEIGHBOUR_KINDS, *CLOSED_CHANCE, "row", "caption"}
# Small cells, because most tests do not look at the images.
SMALL: Any = {"cell_size": 8}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def train() -> Dataset:
    return scenes("train", 11_000, **SMALL)


@pytest.fixture(scope="module")
def test() -> Dataset:
    return scenes("test", 4_400, **SMALL)


def texts(dataset: Dataset) -> list[dict]:
    return dataset.remove_columns("image").to_list()


def digest(dataset: Dataset) -> str:
    rows = dataset.cast_column("image", Image(decode=False)).to_list()
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def arrangements(dataset: Dataset) -> set[tuple[str, ...]]:
    return {tuple(scene) for scene in dataset["scene"]}


def in_words(names: list[str]) -> str:
    words = [name if name else "nothing" for name in names]
    if len(words) == 1:
        return words[0]
    return ", ".join(words[:-1]) + " and " + words[-1]


def literal_answer(question: str, scene: list[str], grid: tuple[int, int], subgroups: dict[str, str]) -> str:
    """Answers a question by looking at each cell of the scene. Fails if there is not exactly one answer."""
    rows = [scene[start : start + grid[1]] for start in range(0, len(scene), grid[1])]
    assert len(rows) == grid[0]

    def place(name: str) -> tuple[int, int]:
        (found,) = [(r, c) for r in range(grid[0]) for c in range(grid[1]) if rows[r][c] == name]
        return found

    def belongs(name: str, phrase: str) -> bool:
        start = {"an animal": "animal-", "a plant": "plant-", "food": "food-"}.get(phrase, "transport-")
        assert start != "transport-" or phrase == "a means of transport"
        return name != "" and subgroups[name].startswith(start) and subgroups[name] != "transport-sign"

    if match := re.fullmatch(r"What is directly (left of|right of|above|below) the (.*)\?", question):
        row, column = place(match[2])
        row += {"above": -1, "below": 1}.get(match[1], 0)
        column += {"left of": -1, "right of": 1}.get(match[1], 0)
        assert min(row, column) >= 0
        assert rows[row][column] != ""
        return rows[row][column]
    if match := re.fullmatch(r"Where is the (.*)\?", question):
        row, column = place(match[1])
        return f"row {row + 1}, column {column + 1}"
    if match := re.fullmatch(r"What is in row (\d)\?", question):
        return in_words(rows[int(match[1]) - 1])
    if match := re.fullmatch(r"How often can you see the (.*)\?", question):
        return str(sum(name == match[1] for name in scene))
    if match := re.fullmatch(r"How often can you see (.*)\?", question):
        return str(sum(belongs(name, match[1]) for name in scene))
    if match := re.fullmatch(r"Can you see the (.*)\?", question):
        return "yes" if match[1] in scene else "no"
    if match := re.fullmatch(r"Can you see (.*)\?", question):
        return "yes" if any(belongs(name, match[1]) for name in scene) else "no"
    assert question == "Describe the picture."
    return " above ".join(in_words(row) for row in rows)


@pytest.mark.parametrize("grid", [(2, 2), (1, 3), (3, 1), (3, 2), (4, 5)])
def test_every_answer_follows_from_the_scene(grid):
    subgroups = dict(zip(load_emoji("noto")["name"], load_emoji("noto")["subgroup"], strict=True))
    for split in SPLITS:
        rows = texts(scenes(split, 330, grid=grid, **SMALL))
        for row in rows:
            assert row["answer"] == literal_answer(row["question"], row["scene"], grid, subgroups), row
        impossible = set()
        if grid[0] == 1:
            impossible |= {"above", "below", "row"}
        if grid[1] == 1:
            impossible |= {"left_of", "right_of"}
        assert {row["kind"] for row in rows} == ALL_KINDS - impossible


def test_captions_distinguish_scenes(train):
    captions = {row["answer"]: tuple(row["scene"]) for row in texts(train) if row["kind"] == "caption"}
    assert len(captions) == len(set(captions.values())) == 1000


def test_images_show_the_scene():
    for split, style in {"train": "twemoji", "test_style": "noto"}.items():
        drawings = raw_drawings(style)
        for row in scenes(split, 11, grid=(2, 3)):
            assert row["image"].size == (96, 64)
            for cell, name in enumerate(row["scene"]):
                left, top = cell % 3 * 32, cell // 3 * 32
                shown = row["image"].crop((left, top, left + 32, top + 32))
                expected = draw_on_white(drawings[name], 32) if name else PILImage.new("RGB", (32, 32), "white")
                assert shown.tobytes() == expected.tobytes()


def test_only_the_kinds_asked_for(train):
    rows = texts(scenes("train", 30, kinds=["row", "count", "left_of"], **SMALL))
    assert [row["kind"] for row in rows] == ["left_of", "count", "row"] * 10  # in the order of all kinds
    assert all(re.match("What is directly left|How often can you see the|What is in row", r["question"]) for r in rows)
    assert texts(scenes("train", 22, kinds=tuple(dict.fromkeys(train["kind"])), **SMALL)) == texts(train)[:22]


def test_jitter_moves_emoji_within_their_cells_and_changes_no_scene():
    still, moved = scenes("train", 44), scenes("train", 44, jitter=4)
    assert texts(still) == texts(moved)
    names = {name for scene in moved["scene"] for name in scene}
    drawings = {name: draw_on_white(png, 24) for name, png in raw_drawings("twemoji").items() if name in names}
    drawn: dict[str, set[bytes]] = defaultdict(set)
    for row in moved:
        for cell, name in enumerate(row["scene"]):
            left, top = cell % 2 * 32, cell // 2 * 32
            shown = row["image"].crop((left, top, left + 32, top + 32))
            drawn[name].add(shown.tobytes())
            if name:
                places = ((x, y, x + 24, y + 24) for x in range(9) for y in range(9))
                assert any(shown.crop(place).tobytes() == drawings[name].tobytes() for place in places)
    assert len(drawn[""]) == 1
    assert max(len(shown) for name, shown in drawn.items() if name) > 1


def test_kinds_have_equal_shares(train):
    assert Counter(train["kind"]) == dict.fromkeys(ALL_KINDS, 1000)


def test_no_question_is_asked_twice_about_a_scene(train):
    assert len({(row["question"], *row["scene"]) for row in texts(train)}) == len(train)


def test_no_arrangement_is_in_two_splits(train, test):
    pools = {
        "train": arrangements(train) | arrangements(scenes("train", 500, seed=7, jitter=2, cell_size=16)),
        "validation": arrangements(scenes("validation", 1_000, seed=1, **SMALL)),
        "test": arrangements(test) | arrangements(scenes("test", 500, held_out_style=None, **SMALL)),
        "test_style": arrangements(scenes("test_style", 1_000, held_out_style="twemoji", **SMALL)),
    }
    for split, pool in pools.items():
        assert {arrangement_split(scene, (2, 2)) for scene in pool} == {split}
    assert sum(len(pool) for pool in pools.values()) == len(set().union(*pools.values()))


def test_an_arrangement_is_that_of_its_grid():
    scenes_of_four = [("cat", "dog", "sun", f"object {number}") for number in range(100)]
    assert any(arrangement_split(scene, (2, 2)) != arrangement_split(scene, (1, 4)) for scene in scenes_of_four)


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("exists", {"yes", "no"}),
        ("exists_category", {"yes", "no"}),
        ("count", {"0", "1", "2"}),
        ("count_category", {"0", "1", "2"}),
        ("position", {f"row {row}, column {column}" for row in (1, 2) for column in (1, 2)}),
    ],
)
def test_closed_answers_are_balanced(train, kind, answers):
    rows = [row for row in texts(train) if row["kind"] == kind]
    overall = Counter(row["answer"] for row in rows)
    assert set(overall) == answers
    assert max(overall.values()) - min(overall.values()) <= 1
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        by_question[row["question"]][row["answer"]] += 1
    assert len(by_question) == (4 if "category" in kind else 24)
    for counts in by_question.values():
        assert set(counts) == answers
        assert max(counts.values()) / counts.total() < 1 / len(answers) + 0.3


def test_counts_go_up_to_three_where_there_is_room():
    rows = texts(scenes("train", 440, grid=(2, 3), **SMALL))
    assert {row["answer"] for row in rows if row["kind"] == "count"} == {"0", "1", "2", "3"}


def test_questions_do_not_reveal_their_answers(train, test):
    figures = blind_baseline(train, test)
    assert set(figures) == {"overall", *ALL_KINDS}
    for kind, chance in CLOSED_CHANCE.items():
        assert abs(figures[kind]["blind"] - chance) < 9, (kind, figures[kind])
    for kind in NEIGHBOUR_KINDS:
        assert figures[kind]["blind"] < 9, (kind, figures[kind])
    assert figures["row"]["blind"] < 9
    assert figures["caption"]["blind"] < 1
    assert figures["overall"]["most_frequent_answer"] < figures["overall"]["blind"] < 25


def test_style_is_held_out():
    for held_out, other in [("noto", "twemoji"), ("twemoji", "noto")]:
        for split in SPLITS:
            shown = set(scenes(split, 44, held_out_style=held_out, **SMALL)["style"])
            assert shown == {held_out if split == "test_style" else other}
    assert set(scenes("train", 44, held_out_style=None, **SMALL)["style"]) == {"twemoji", "noto"}


def test_only_the_seed_determines_the_scenes():
    assert digest(scenes("test", 50)) != digest(scenes("test", 50, seed=1))
    expected = digest(scenes("test", 50, jitter=3, held_out_style=None))
    program = (
        "import hashlib; from datasets import Image; from modeling_sparse_moe_vlm.toolbox.demo.scenes import scenes;"
        "rows = scenes('test', 50, jitter=3, held_out_style=None).cast_column('image', Image(decode=False)).to_list();"
        "print(hashlib.sha256(repr(rows).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == expected, result.stderr


def test_smaller_split_is_the_beginning_of_a_larger_one():
    assert digest(scenes("test", 20)) == digest(scenes("test", 50).select(range(20)))


def test_vocabulary_is_that_of_the_table():
    vocabulary = ["1F1EF-1F1F5", "1F415", "2693", "1F600"]
    rows = texts(scenes("train", 200, vocabulary=vocabulary, **SMALL))
    assert {name for row in rows for name in row["scene"]} == {"", "flag: Japan", "dog", "anchor", "grinning face"}
    faces = ["1F600", "1F601", "1F602", "1F603"]
    assert not any("category" in kind for kind in scenes("train", 50, vocabulary=faces, **SMALL)["kind"])


def test_default_vocabulary_is_short_named_and_varied():
    names = dict(zip(load_emoji("noto")["codepoint"], load_emoji("noto")["name"], strict=True))
    assert len(set(DEFAULT_VOCABULARY)) == 24
    assert all(len(names[codepoint].split()) == 1 for codepoint in DEFAULT_VOCABULARY)


def test_load_scenes_has_all_splits():
    loaded = load_scenes(num_train=22, num_heldout=11, seed=3, **SMALL)
    assert {split: len(dataset) for split, dataset in loaded.items()} == {
        "train": 22,
        "validation": 11,
        "test": 11,
        "test_style": 11,
    }
    assert digest(loaded["test"]) == digest(scenes("test", 11, seed=3, **SMALL))
    assert set(load_scenes(11, 11, held_out_style=None, **SMALL)) == {"train", "validation", "test"}


def test_dataset_is_an_ordinary_one(tmp_path):
    dataset = scenes("train", 11)
    assert isinstance(dataset.features["image"], Image)
    assert dataset[0]["image"].size == (64, 64)
    assert digest(pickle.loads(pickle.dumps(dataset))) == digest(dataset)
    dataset.save_to_disk(tmp_path)
    assert digest(datasets.load_from_disk(tmp_path)) == digest(dataset)


def test_messages():
    row = scenes("train", 1)[0]
    chat = to_messages(row)
    assert chat == {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]},
            {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
        ],
        "images": [row["image"]],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "`split` must be one of train, validation, test, test_style, got 'dev'"),
        ({"held_out_style": "apple"}, "`held_out_style` must be one of twemoji, noto, got 'apple'"),
        (
            {"split": "test_style", "held_out_style": None},
            "no split 'test_style' with `held_out_style=None`.* Pass one of 'twemoji', 'noto'",
        ),
        ({"num_examples": 0}, "`num_examples` must be at least 1, not 0"),
        ({"num_examples": 1_000_001}, "`num_examples` must be at most 1000000, not 1000001"),
        ({"grid": (1, 1)}, r"`grid` must be \(rows, columns\), each from 1 to 8 and not both 1.* not \(1, 1\)"),
        ({"grid": (0, 4)}, r"`grid` must be .* not \(0, 4\)"),
        ({"grid": (2, 9)}, r"`grid` must be .* not \(2, 9\)"),
        ({"grid": (2, 2, 2)}, r"`grid` must be .* not \(2, 2, 2\)"),
        ({"cell_size": 4}, "`cell_size` must be at least 8 pixels, not 4"),
        ({"jitter": -1}, "`jitter` must be from 0 to a quarter of `cell_size`, here 8 pixels, not -1"),
        ({"jitter": 9}, "`jitter` must be .* here 8 pixels, not 9"),
        ({"kinds": []}, r"`kinds` must be a list of different kinds .*\(left_of, .*, row, caption\), not \[\]"),
        ({"kinds": ["colour"]}, r"`kinds` must be .* not \['colour'\]"),
        ({"kinds": ["row", "row"]}, r"`kinds` must be .* not \['row', 'row'\]"),
        ({"kinds": "row"}, "`kinds` must be .* not 'row'"),
        ({"kinds": ["above"], "grid": (1, 4)}, r"`kinds` must be .* with this grid .* not \['above'\]"),
        (
            {"vocabulary": ["1F408", "cat", "🐈"]},
            "`vocabulary` contains 'cat', '🐈', which `load_emoji.*such as '1F408'",
        ),
        ({"vocabulary": ["1F408", "1F415", "1F408"]}, "`vocabulary` contains '1F408' more than once"),
        ({"vocabulary": DEFAULT_VOCABULARY[:3]}, "`vocabulary` needs at least 4 emoji, not 3"),
        (
            {"vocabulary": [*DEFAULT_VOCABULARY, "1F1F3-1F1F4", "1F1F8-1F1EF"]},
            "'flag: Norway' and 'flag: Svalbard & Jan Mayen', which look the same in style 'twemoji'",
        ),
        (
            {"num_examples": 5_000, "grid": (1, 2), "vocabulary": DEFAULT_VOCABULARY[:4], "cell_size": 8},
            r"`num_examples` asks for 5000 examples, but after .* 'train' .*no new one.* Ask for fewer, or take",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        scenes(**{"split": "train", "num_examples": 11, **arguments})


@pytest.mark.parametrize("load", [load_scenes, load_new_style])
@pytest.mark.parametrize("name", ["num_train", "num_heldout"])
def test_absurd_numbers_of_rows_are_refused_before_anything_is_drawn(load, name, monkeypatch):
    monkeypatch.setitem(load.__globals__, "scenes", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=f"`{name}` must be at most 1000000, not 1000001"):
        load(**{name: 1_000_001})
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, not 0"):
        load(**{name: 0})


@pytest.mark.parametrize(("style", "known"), [("noto", "twemoji"), ("twemoji", "noto")])
def test_a_style_to_learn(style, known):
    data = load_new_style(22, 11, held_out_style=style, seed=3, **SMALL)
    assert {split: set(rows["style"]) for split, rows in data.items()} == {
        "train": {style},
        "test_style": {style},
        "test": {known},
    }
    assert digest(data["train"]) == digest(scenes("train", 22, held_out_style=known, seed=3, **SMALL))
    assert digest(data["test_style"]) == digest(scenes("test_style", 11, held_out_style=style, seed=3, **SMALL))
    assert digest(data["test"]) == digest(scenes("test", 11, held_out_style=style, seed=3, **SMALL))


def test_numbers_of_rows_by_default(monkeypatch):
    monkeypatch.setattr(module, "scenes", lambda split, number, **kwargs: (split, number, kwargs))
    assert dict(load_new_style()) == {
        "train": ("train", 10_000, {"held_out_style": "twemoji"}),
        "test_style": ("test_style", 500, {"held_out_style": "noto"}),
        "test": ("test", 500, {"held_out_style": "noto"}),
    }
    assert {split: rows[1] for split, rows in load_scenes().items()} == {
        "train": 20_000,
        "validation": 2_000,
        "test": 2_000,
        "test_style": 2_000,
    }
