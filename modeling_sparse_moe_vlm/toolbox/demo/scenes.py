"""Scenes of emoji on a grid, with questions that can only be answered by looking at the image."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, concatenate_datasets
from datasets.utils import tqdm
from PIL import Image as PILImage

from ...checks import check_choice
from .emoji import (
    EXAMPLE_FEATURES,
    HELD_OUT_STYLE,
    SPLITS,
    STYLES,
    draw_on_white,
    emoji_entries,
    encode_png,
    raw_drawings,
    stable_bucket,
)

DEFAULT_VOCABULARY = (
    "1F408",  # cat
    "1F415",  # dog
    "1F416",  # pig
    "1F438",  # frog
    "1F418",  # elephant
    "1F98B",  # butterfly
    "1F34C",  # banana
    "1F355",  # pizza
    "1F353",  # strawberry
    "1F955",  # carrot
    "1F354",  # hamburger
    "1F68C",  # bus
    "1F680",  # rocket
    "1F6B2",  # bicycle
    "26F5",  # sailboat
    "1F335",  # cactus
    "1F33B",  # sunflower
    "2600-FE0F",  # sun
    "2601-FE0F",  # cloud
    "1F308",  # rainbow
    "1F511",  # key
    "1F3B8",  # guitar
    "1F4F7",  # camera
    "2602-FE0F",  # umbrella
)
# Name of each category in questions, and the prefixes of the Unicode subgroups that belong to it.
CATEGORIES = {
    "an animal": ("animal-",),
    "a plant": ("plant-",),
    "food": ("food-",),
    "a means of transport": ("transport-air", "transport-ground", "transport-water"),
}
# By kind of question: its wording, and the step in rows and columns from the object in the question to its neighbour.
DIRECTIONS = {
    "left_of": ("left of", 0, -1),
    "right_of": ("right of", 0, 1),
    "above": ("above", -1, 0),
    "below": ("below", 1, 0),
}
MIN_VOCABULARY = 4  # with fewer emoji, guessing the neighbour of an object would be right too often
MAX_SIDE = 8
MIN_CELL_SIZE = 8  # pixels; smaller drawings cannot be told apart
MAX_COUNT = 3
# Probability of an empty cell in scenes that have to be described. If it were higher, "nothing" would be a good guess.
DESCRIBED_EMPTY = 0.2
MAX_TRIES = 1000
MAX_EXAMPLES = 1_000_000  # about 5 GB of images in memory
ROWS_PER_PART = 1000


def scenes(
    split: str,
    num_examples: int,
    seed: int = 0,
    grid: tuple[int, int] = (2, 2),
    cell_size: int = 32,
    vocabulary: Sequence[str] | None = None,
    held_out_style: str | None = HELD_OUT_STYLE,
    jitter: int = 0,
    kinds: Sequence[str] | None = None,
) -> Dataset:
    """
    Makes a dataset of scenes of emoji on a grid, with one question about each scene.

    The kinds of question are equally frequent:

    - `left_of`, `right_of`, `above`, `below`: which object is next to another one
    - `position`: where an object is
    - `exists`, `exists_category`: whether the scene contains an object, or an object of a category
    - `count`, `count_category`: how often (at most 3 times, and in at most half of the cells)
    - `row`: which objects a row contains
    - `caption`: a description of the whole scene

    Kinds of question that are impossible with a grid or vocabulary, such as `above` in a single row, are left out. The
    categories are made of subgroups of Unicode, see `CATEGORIES`. Every question has one right answer, which cannot be
    guessed from the question: see [`~toolbox.evaluation.blind_baseline`].

    Each arrangement of objects always belongs to the same split, with any seed and any sizes of the splits: 70 %
    belong to `train` and 10 % to each other split. Within a split, a question is asked at most once about the same
    arrangement. The same arguments give the same dataset. With a smaller `num_examples`, the dataset contains the
    first rows of the larger one.

    The images are drawn by this function and kept in memory as PNG (about 5 kB for 64×64 pixels). To keep them on disk
    instead, use `save_to_disk` and `load_from_disk` of the dataset.

    Args:
        split (`str`):
            `"train"`, `"validation"`, `"test"` or `"test_style"`.
        num_examples (`int`):
            Number of rows, from 1 to 1,000,000.
        seed (`int`, *optional*, defaults to 0):
            Seed of the scenes and questions.
        grid (`tuple[int, int]`, *optional*, defaults to `(2, 2)`):
            Number of rows and number of columns, each from 1 to 8 and not both 1.
        cell_size (`int`, *optional*, defaults to 32):
            Width and height of a cell in pixels, at least 8.
        vocabulary (`Sequence[str]`, *optional*):
            Codepoints of the emoji to draw, at least 4, as in the column `codepoint` of [`load_emoji`]. Defaults to
            the 24 emoji of `DEFAULT_VOCABULARY`.
        held_out_style (`str`, *optional*, defaults to `"noto"`):
            Drawing style that only `test_style` contains. If `None`, all splits mix all styles, and there is no
            `test_style`.
        jitter (`int`, *optional*, defaults to 0):
            Largest distance in pixels between an emoji and the middle of its cell, horizontally and vertically, at most
            a quarter of `cell_size`. The emoji are drawn smaller to leave room for it.
        kinds (`Sequence[str]`, *optional*):
            Kinds of question to ask. Defaults to all that are possible with the grid and the vocabulary.

    Returns:
        `datasets.Dataset`: A dataset with the columns `image`, `question`, `answer`, `kind`, `scene` (the names of the
        emoji in reading order, `""` for an empty cell) and `style`.

    Raises:
        ValueError: If an argument is out of its range, if `vocabulary` has unknown or repeated emoji or emoji that look
            the same, if a kind of `kinds` is impossible or repeated, or if the split does not have `num_examples`
            different examples.
    """
    _check_arguments(split, num_examples, grid, cell_size, held_out_style, jitter)
    if split == "test_style":
        styles = [style for style in STYLES if style == held_out_style]
    else:
        styles = [style for style in STYLES if style != held_out_style]
    entries = _look_up(DEFAULT_VOCABULARY if vocabulary is None else vocabulary)
    writer = _SceneWriter(grid, entries, kinds)
    tiles = {style: _tiles(style, writer.names, cell_size - 2 * jitter) for style in styles}

    examples = _examples(split, num_examples, seed, cell_size, writer, tiles, jitter)
    parts = []  # built in parts, because `Dataset.from_list` copies its rows several times
    while rows := list(islice(examples, ROWS_PER_PART)):
        parts.append(Dataset.from_list(rows, features=EXAMPLE_FEATURES))
    return concatenate_datasets(parts)


def load_scenes(
    num_train: int = 20_000, num_heldout: int = 2_000, held_out_style: str | None = HELD_OUT_STYLE, **kwargs: Any
) -> DatasetDict:
    """
    Makes all splits of the scenes.

    Args:
        num_train (`int`, *optional*, defaults to 20000):
            Number of rows of `train`.
        num_heldout (`int`, *optional*, defaults to 2000):
            Number of rows of each other split.
        held_out_style (`str`, *optional*, defaults to `"noto"`):
            Drawing style that only `test_style` contains. If `None`, there is no `test_style`.
        kwargs:
            Additional arguments of [`scenes`].

    Returns:
        `datasets.DatasetDict`: The splits `train`, `validation`, `test` and `test_style`, as [`scenes`] returns them.

    Raises:
        ValueError: As [`scenes`] does.
    """
    _check_num_rows("num_train", num_train)
    _check_num_rows("num_heldout", num_heldout)
    splits = [split for split in SPLITS if split != "test_style" or held_out_style is not None]
    return DatasetDict(
        {
            split: scenes(
                split, num_train if split == "train" else num_heldout, held_out_style=held_out_style, **kwargs
            )
            for split in splits
        }
    )


def load_new_style(
    num_train: int = 10_000, num_heldout: int = 500, held_out_style: str = HELD_OUT_STYLE, **kwargs: Any
) -> DatasetDict:
    """
    Makes scenes to teach the held-out drawing style to a model that was trained on the other styles.

    Args:
        num_train (`int`, *optional*, defaults to 10000):
            Number of rows of `train`.
        num_heldout (`int`, *optional*, defaults to 500):
            Number of rows of each other split.
        held_out_style (`str`, *optional*, defaults to `"noto"`):
            Drawing style to learn.
        kwargs:
            Additional arguments of [`scenes`].

    Returns:
        `datasets.DatasetDict`: The splits `train` and `test_style` in the style to learn, and `test` in the other
        styles.

    Raises:
        ValueError: As [`scenes`] does.
    """
    _check_num_rows("num_train", num_train)
    _check_num_rows("num_heldout", num_heldout)
    # `scenes` draws the split `train` in all styles except for the held-out one, so another style is held out here.
    known = next(style for style in STYLES if style != held_out_style)
    return DatasetDict(
        {
            "train": scenes("train", num_train, held_out_style=known, **kwargs),
            "test_style": scenes("test_style", num_heldout, held_out_style=held_out_style, **kwargs),
            "test": scenes("test", num_heldout, held_out_style=held_out_style, **kwargs),
        }
    )


def arrangement_split(scene: Sequence[str], grid: tuple[int, int]) -> str:
    """
    Returns the split that an arrangement of objects belongs to. It does not depend on the question.

    Args:
        scene (`Sequence[str]`):
            Names of the emoji in reading order, `""` for an empty cell.
        grid (`tuple[int, int]`):
            Number of rows and number of columns.

    Returns:
        `str`: The name of the split.
    """
    bucket = stable_bucket("\n".join([f"{grid[0]}x{grid[1]}", *scene]))
    return SPLITS[max(0, bucket // 10 - 6)]  # 70 : 10 : 10 : 10


def to_messages(example: dict[str, Any]) -> dict[str, Any]:
    """
    Turns an example into a conversation, in the form that the chat templates of Transformers and the trainers of TRL
    take.

    Args:
        example (`dict[str, Any]`):
            Row of [`scenes`] or [`emoji_questions`].

    Returns:
        `dict[str, Any]`: The `messages` (a question of the user with a placeholder for the image, and the answer of the
        assistant) and the `images` (a list with the image).
    """
    return {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example["question"]}]},
            {"role": "assistant", "content": [{"type": "text", "text": example["answer"]}]},
        ],
        "images": [example["image"]],
    }


def describe_scene(scene: Sequence[str], columns: int) -> str:
    """
    Returns a description of a scene, such as `"cat and nothing above dog and pizza"`.

    Args:
        scene (`Sequence[str]`):
            Names of the emoji in reading order, `""` for an empty cell.
        columns (`int`):
            Number of columns of the grid.

    Returns:
        `str`: The description, from top to bottom.
    """
    return " above ".join(_describe_row(scene, row, columns) for row in range(len(scene) // columns))


def _describe_row(scene: Sequence[str], row: int, columns: int) -> str:
    names = [name or "nothing" for name in scene[row * columns : (row + 1) * columns]]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


class _Draft(NamedTuple):
    scene: tuple[str, ...]
    question: str
    answer: str


class _SceneWriter:
    """
    Writes scenes with a question and its answer. There is one method for each kind of question.

    The methods take `turn`, the number of the example within its kind. It decides the answer of questions with few
    possible answers, so that these are equally frequent even if scenes are rejected.
    """

    def __init__(
        self, grid: tuple[int, int], entries: list[dict[str, Any]], asked: Sequence[str] | None = None
    ) -> None:
        self.rows, self.columns = grid
        self.cells = self.rows * self.columns
        # If one object filled the whole grid, there would be too few different scenes.
        self.max_count = min(MAX_COUNT, self.cells // 2)
        self.names = [entry["name"] for entry in entries]
        self.categories = []
        for phrase, subgroups in CATEGORIES.items():
            members = [entry["name"] for entry in entries if entry["subgroup"].startswith(subgroups)]
            others = [name for name in self.names if name not in members]
            if members and others:
                self.categories.append((phrase, members, others))

        kinds: dict[str, Callable[[random.Random, int], _Draft]] = {}
        for kind, (words, row_step, column_step) in DIRECTIONS.items():
            if self.rows > abs(row_step) and self.columns > abs(column_step):
                kinds[kind] = partial(self._neighbour, words, row_step, column_step)
        kinds |= {"position": self._position, "exists": self._exists, "count": self._count}
        if self.categories:
            kinds |= {"exists_category": self._exists_category, "count_category": self._count_category}
        if self.rows > 1:
            kinds["row"] = self._row
        kinds["caption"] = self._caption
        if asked is not None:
            _check_kinds(asked, list(kinds))
        self.kinds = [(kind, write) for kind, write in kinds.items() if asked is None or kind in asked]

    def _neighbour(self, words: str, row_step: int, column_step: int, rng: random.Random, turn: int) -> _Draft:
        row = rng.randrange(max(0, -row_step), self.rows - max(0, row_step))
        column = rng.randrange(max(0, -column_step), self.columns - max(0, column_step))
        cell = row * self.columns + column
        name, neighbour = rng.sample(self.names, 2)
        placed = {cell: name, cell + row_step * self.columns + column_step: neighbour}
        return _Draft(self._fill(rng, placed, self._others(name)), f"What is directly {words} the {name}?", neighbour)

    def _position(self, rng: random.Random, turn: int) -> _Draft:
        row, column = divmod(turn % self.cells, self.columns)
        name = rng.choice(self.names)
        return _Draft(
            self._fill(rng, {row * self.columns + column: name}, self._others(name)),
            f"Where is the {name}?",
            f"row {row + 1}, column {column + 1}",
        )

    def _exists(self, rng: random.Random, turn: int) -> _Draft:
        name = rng.choice(self.names)
        scene = self._containing(rng, self._some_or_none(rng, turn), [name], self._others(name))
        return _Draft(scene, f"Can you see the {name}?", _yes_or_no(turn))

    def _count(self, rng: random.Random, turn: int) -> _Draft:
        name = rng.choice(self.names)
        count = turn % (self.max_count + 1)
        scene = self._containing(rng, count, [name], self._others(name))
        return _Draft(scene, f"How often can you see the {name}?", str(count))

    def _exists_category(self, rng: random.Random, turn: int) -> _Draft:
        phrase, members, others = rng.choice(self.categories)
        scene = self._containing(rng, self._some_or_none(rng, turn), members, others)
        return _Draft(scene, f"Can you see {phrase}?", _yes_or_no(turn))

    def _count_category(self, rng: random.Random, turn: int) -> _Draft:
        phrase, members, others = rng.choice(self.categories)
        count = turn % (self.max_count + 1)
        scene = self._containing(rng, count, members, others)
        return _Draft(scene, f"How often can you see {phrase}?", str(count))

    def _row(self, rng: random.Random, turn: int) -> _Draft:
        row = turn % self.rows
        scene = self._fill(rng, {}, self.names, empty=DESCRIBED_EMPTY)
        return _Draft(scene, f"What is in row {row + 1}?", _describe_row(scene, row, self.columns))

    def _caption(self, rng: random.Random, turn: int) -> _Draft:
        scene = self._fill(rng, {}, self.names, empty=DESCRIBED_EMPTY)
        return _Draft(scene, "Describe the picture.", describe_scene(scene, self.columns))

    def _fill(
        self, rng: random.Random, placed: dict[int, str], names: list[str], empty: float | None = None
    ) -> tuple[str, ...]:
        """
        Fills the cells around the placed objects, from a palette so small that objects often repeat. A cell stays empty
        with probability `empty`. By default, this probability is drawn for each scene, so that sparse and full grids
        are equally frequent.
        """
        palette = rng.sample(names, min(self.cells, len(names)))
        empty = rng.random() if empty is None else empty
        return tuple(
            placed[cell] if cell in placed else "" if rng.random() < empty else rng.choice(palette)
            for cell in range(self.cells)
        )

    def _containing(self, rng: random.Random, count: int, shown: list[str], others: list[str]) -> tuple[str, ...]:
        """Returns a scene with objects of `shown` in `count` cells, and none of them in the other cells."""
        placed = {cell: rng.choice(shown) for cell in rng.sample(range(self.cells), count)}
        return self._fill(rng, placed, others)

    def _some_or_none(self, rng: random.Random, turn: int) -> int:
        return rng.randint(1, self.max_count) if _yes_or_no(turn) == "yes" else 0

    def _others(self, name: str) -> list[str]:
        return [other for other in self.names if other != name]


def _yes_or_no(turn: int) -> str:
    return "no" if turn % 2 else "yes"


def _examples(
    split: str,
    num_examples: int,
    seed: int,
    cell_size: int,
    writer: _SceneWriter,
    tiles: dict[str, dict[str, PILImage.Image]],
    jitter: int,
) -> Iterator[dict[str, Any]]:
    """Yields the examples of a split. `tiles` contains the drawing of each emoji, by style and name."""
    grid = (writer.rows, writer.columns)
    styles = list(tiles)
    rng = random.Random(f"{seed}/{split}")
    jitter_rng = random.Random(f"{seed}/{split}/jitter")  # separate, so that jitter does not change the scenes
    asked: set[tuple[tuple[str, ...], str]] = set()
    for index in tqdm(range(num_examples), desc=f"Drawing {split} scenes"):
        turn, place = divmod(index, len(writer.kinds))
        kind, write = writer.kinds[place]
        for _ in range(MAX_TRIES):
            draft = write(rng, turn)
            key = (draft.scene, draft.question)
            if any(draft.scene) and key not in asked and arrangement_split(draft.scene, grid) == split:
                break
        else:
            raise ValueError(
                f"`num_examples` asks for {num_examples} examples, but after {index} the split {split!r} seems to have "
                f"no new one of kind {kind!r}. Ask for fewer, or take a larger `grid` or `vocabulary`."
            )
        asked.add(key)
        style = rng.choice(styles)
        image = _draw(draft.scene, grid, cell_size, tiles[style], jitter, jitter_rng)
        yield {
            "image": {"bytes": encode_png(image), "path": None},
            "question": draft.question,
            "answer": draft.answer,
            "kind": kind,
            "scene": draft.scene,
            "style": style,
        }


def _draw(
    scene: tuple[str, ...],
    grid: tuple[int, int],
    cell_size: int,
    tiles: dict[str, PILImage.Image],
    jitter: int,
    rng: random.Random,
) -> PILImage.Image:
    rows, columns = grid
    canvas = PILImage.new("RGB", (columns * cell_size, rows * cell_size), "white")
    for cell, name in enumerate(scene):
        if name:
            row, column = divmod(cell, columns)
            left, top = rng.randint(0, 2 * jitter), rng.randint(0, 2 * jitter)
            canvas.paste(tiles[name], (column * cell_size + left, row * cell_size + top))
    return canvas


def _tiles(style: str, names: list[str], size: int) -> dict[str, PILImage.Image]:
    """Returns the drawing of each emoji on white, by name."""
    drawings = raw_drawings(style)
    return {name: draw_on_white(drawings[name], size) for name in names}


def _look_up(vocabulary: Sequence[str]) -> list[dict[str, Any]]:
    """Checks a vocabulary and returns its entries in the table of emoji."""
    table = {entry["codepoint"]: entry for entry in emoji_entries()}
    if unknown := [codepoint for codepoint in vocabulary if codepoint not in table]:
        raise ValueError(
            f"`vocabulary` contains {', '.join(map(repr, unknown))}, which `load_emoji()` does not have. Pass "
            f"codepoints from its column `codepoint`, such as {DEFAULT_VOCABULARY[0]!r}."
        )
    if repeated := [codepoint for codepoint, uses in Counter(vocabulary).items() if uses > 1]:
        raise ValueError(
            f"`vocabulary` contains {', '.join(map(repr, repeated))} more than once. List each emoji once."
        )
    if len(vocabulary) < MIN_VOCABULARY:
        raise ValueError(f"`vocabulary` needs at least {MIN_VOCABULARY} emoji, not {len(vocabulary)}. Add some.")
    entries = [table[codepoint] for codepoint in vocabulary]
    for style in STYLES:
        drawings = raw_drawings(style)
        seen: dict[bytes, str] = {}
        for entry in entries:
            if (twin := seen.setdefault(drawings[entry["name"]], entry["name"])) != entry["name"]:
                raise ValueError(
                    f"`vocabulary` contains {twin!r} and {entry['name']!r}, which look the same in style {style!r}, so "
                    "questions about them have no right answer. Drop one of them."
                )
    return entries


def _check_kinds(kinds: Sequence[str], possible: list[str]) -> None:
    if isinstance(kinds, str) or not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(possible):
        raise ValueError(
            f"`kinds` must be a list of different kinds of question that are possible with this grid and vocabulary "
            f"({', '.join(possible)}), not {kinds!r}."
        )


def _check_num_rows(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, not {value}.")
    if value > MAX_EXAMPLES:
        raise ValueError(
            f"`{name}` must be at most {MAX_EXAMPLES}, not {value}, because the examples are kept in memory."
        )


def _check_arguments(
    split: str, num_examples: int, grid: tuple[int, int], cell_size: int, held_out_style: str | None, jitter: int
) -> None:
    check_choice("split", split, SPLITS)
    if held_out_style is not None:
        check_choice("held_out_style", held_out_style, STYLES)
    elif split == "test_style":
        raise ValueError(
            "There is no split 'test_style' with `held_out_style=None`, because training then uses all styles. Pass "
            f"one of {', '.join(map(repr, STYLES))} as `held_out_style`."
        )
    _check_num_rows("num_examples", num_examples)
    if len(grid) != 2 or not all(1 <= side <= MAX_SIDE for side in grid) or max(grid) < 2:
        raise ValueError(
            f"`grid` must be (rows, columns), each from 1 to {MAX_SIDE} and not both 1, such as (2, 2), not {grid!r}."
        )
    if cell_size < MIN_CELL_SIZE:
        raise ValueError(f"`cell_size` must be at least {MIN_CELL_SIZE} pixels, not {cell_size}.")
    if not 0 <= jitter <= cell_size // 4:
        raise ValueError(
            f"`jitter` must be from 0 to a quarter of `cell_size`, here {cell_size // 4} pixels, not {jitter}."
        )
