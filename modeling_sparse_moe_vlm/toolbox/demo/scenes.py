"""Scenes of emoji on a grid, with questions that only the image answers."""

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
# What a question calls a category, and the Unicode subgroups (by how they begin) that make it up.
CATEGORIES = {
    "an animal": ("animal-",),
    "a plant": ("plant-",),
    "food": ("food-",),
    "a means of transport": ("transport-air", "transport-ground", "transport-water"),
}
# Kind of question: its words, and the step from the object asked about to its neighbour in rows and columns.
DIRECTIONS = {
    "left_of": ("left of", 0, -1),
    "right_of": ("right of", 0, 1),
    "above": ("above", -1, 0),
    "below": ("below", 1, 0),
}
MIN_VOCABULARY = 4  # fewer, and the answer to a question about a neighbour is half guessed
MAX_SIDE = 8
MIN_CELL_SIZE = 8  # pixels; smaller drawings cannot be told apart
MAX_COUNT = 3
DESCRIBED_EMPTY = 0.2  # chance of an empty cell in scenes to be described; with more, "nothing" would be a good guess
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
) -> Dataset:
    """
    Draws scenes of emoji on a grid and asks one question about each.

    The kinds of question take turns, so that they have equal shares: what is `left_of`, `right_of`, `above` or `below`
    an object, its `position`, what a `row` holds, whether an object or a category of objects is there (`exists`,
    `exists_category`) and how often (`count`, `count_category`; up to 3, and in half the cells at most), and a
    `caption` of the whole scene. Every question has one right answer, and the question does not give it away:
    see [`~toolbox.evaluation.blind_baseline`]. Kinds that make no sense on a grid or vocabulary (`above` in a single
    row) are left out. Categories are those of Unicode, see `CATEGORIES`.

    An arrangement of objects belongs to one split for good, whatever the seed and size of the splits: 70 % to `train`,
    10 % to each of the others. Within a split, no question is asked twice about the same arrangement. The same
    arguments give the same dataset, and a smaller `num_examples` gives its first rows.

    The images are drawn here and kept in memory as PNG (about 5 kB at 64×64 pixels), so that the result is an
    ordinary dataset; `save_to_disk` and `load_from_disk` put them on disk instead.

    Args:
        split (`str`):
            `"train"`, `"validation"`, `"test"` or `"test_style"`.
        num_examples (`int`):
            The number of rows.
        seed (`int`, *optional*, defaults to 0):
            Decides what is drawn and asked.
        grid (`tuple[int, int]`, *optional*, defaults to `(2, 2)`):
            The numbers of rows and columns.
        cell_size (`int`, *optional*, defaults to 32):
            The width and height of a cell in pixels.
        vocabulary (`Sequence[str]`, *optional*):
            The codepoints of the emoji to draw, as in the table that [`load_emoji`] loads. By default
            `DEFAULT_VOCABULARY`.
        held_out_style (`str`, *optional*, defaults to `"noto"`):
            The style of drawing that only `test_style` shows. With `None` all splits mix all styles, and there is no
            `test_style`.
        jitter (`int`, *optional*, defaults to 0):
            How many pixels an emoji may stray from the middle of its cell. It is drawn smaller to leave room.

    Returns:
        `datasets.Dataset`: The columns `image`, `question`, `answer`, `kind`, `scene` (the names in reading order,
        `""` for an empty cell) and `style`.

    Raises:
        `ValueError`: If an argument makes no sense, or if the split has not enough different examples.
    """
    _check_arguments(split, num_examples, grid, cell_size, held_out_style, jitter)
    if split == "test_style":
        styles = [style for style in STYLES if style == held_out_style]
    else:
        styles = [style for style in STYLES if style != held_out_style]
    entries = _look_up(DEFAULT_VOCABULARY if vocabulary is None else vocabulary)
    writer = _SceneWriter(grid, entries)
    tiles = {style: _tiles(style, writer.names, cell_size - 2 * jitter) for style in styles}

    examples = _examples(split, num_examples, seed, cell_size, writer, tiles, jitter)
    parts = []  # built bit by bit, since Dataset.from_list copies its rows several times
    while rows := list(islice(examples, ROWS_PER_PART)):
        parts.append(Dataset.from_list(rows, features=EXAMPLE_FEATURES))
    return concatenate_datasets(parts)


def load_scenes(
    num_train: int = 20_000, num_heldout: int = 2_000, held_out_style: str | None = HELD_OUT_STYLE, **kwargs: Any
) -> DatasetDict:
    """
    Draws all splits of the scenes.

    Args:
        num_train (`int`, *optional*, defaults to 20000):
            The number of rows of `train`.
        num_heldout (`int`, *optional*, defaults to 2000):
            The number of rows of each other split.
        held_out_style (`str`, *optional*, defaults to `"noto"`):
            The style of drawing that only `test_style` shows. With `None` there is no `test_style`.
        kwargs:
            Further arguments of [`scenes`].

    Returns:
        `datasets.DatasetDict`: The splits `train`, `validation`, `test` and `test_style`.

    Raises:
        `ValueError`: As [`scenes`] does.
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
    Draws scenes for a model that knows the other styles and is to learn the held-out one.

    Args:
        num_train (`int`, *optional*, defaults to 10000):
            The number of rows of `train`.
        num_heldout (`int`, *optional*, defaults to 500):
            The number of rows of each other split.
        held_out_style (`str`, *optional*, defaults to `"noto"`):
            The style of drawing to learn.
        kwargs:
            Further arguments of [`scenes`].

    Returns:
        `datasets.DatasetDict`: `train` and `test_style` in the style to learn, `test` in the others.

    Raises:
        `ValueError`: As [`scenes`] does.
    """
    _check_num_rows("num_train", num_train)
    _check_num_rows("num_heldout", num_heldout)
    # The training split is drawn in every style but the one that is held out.
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
    Tells which split an arrangement of objects belongs to, whatever is asked about it.

    Args:
        scene (`Sequence[str]`):
            The names by cell in reading order, `""` for an empty cell.
        grid (`tuple[int, int]`):
            The numbers of rows and columns.

    Returns:
        `str`: The split.
    """
    bucket = stable_bucket("\n".join([f"{grid[0]}x{grid[1]}", *scene]))
    return SPLITS[max(0, bucket // 10 - 6)]  # 70 : 10 : 10 : 10


def to_messages(example: dict[str, Any]) -> dict[str, Any]:
    """
    Turns an example into a chat, in the form that Transformers' chat templates and TRL's trainers take.

    Args:
        example (`dict[str, Any]`):
            A row of [`scenes`] or [`emoji_questions`].

    Returns:
        `dict[str, Any]`: `messages`, a question of the user and an answer of the assistant, and `images`, the image
        in a list.
    """
    return {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example["question"]}]},
            {"role": "assistant", "content": [{"type": "text", "text": example["answer"]}]},
        ],
        "images": [example["image"]],
    }


class _Draft(NamedTuple):
    scene: tuple[str, ...]
    question: str
    answer: str


class _SceneWriter:
    """
    Writes a scene together with a question about it and the answer, a method for each kind of question.

    The methods take `turn`, which counts the examples of a kind, to deal out the answers of closed questions evenly
    whatever scenes are thrown away.
    """

    def __init__(self, grid: tuple[int, int], entries: list[dict[str, Any]]) -> None:
        self.rows, self.columns = grid
        self.cells = self.rows * self.columns
        # A grid full of one object leaves too few different scenes.
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
        self.kinds = list(kinds.items())

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
        scene = self._holding(rng, self._some_or_none(rng, turn), [name], self._others(name))
        return _Draft(scene, f"Can you see the {name}?", _yes_or_no(turn))

    def _count(self, rng: random.Random, turn: int) -> _Draft:
        name = rng.choice(self.names)
        count = turn % (self.max_count + 1)
        scene = self._holding(rng, count, [name], self._others(name))
        return _Draft(scene, f"How often can you see the {name}?", str(count))

    def _exists_category(self, rng: random.Random, turn: int) -> _Draft:
        phrase, members, others = rng.choice(self.categories)
        scene = self._holding(rng, self._some_or_none(rng, turn), members, others)
        return _Draft(scene, f"Can you see {phrase}?", _yes_or_no(turn))

    def _count_category(self, rng: random.Random, turn: int) -> _Draft:
        phrase, members, others = rng.choice(self.categories)
        count = turn % (self.max_count + 1)
        scene = self._holding(rng, count, members, others)
        return _Draft(scene, f"How often can you see {phrase}?", str(count))

    def _row(self, rng: random.Random, turn: int) -> _Draft:
        row = turn % self.rows
        scene = self._fill(rng, {}, self.names, empty=DESCRIBED_EMPTY)
        return _Draft(scene, f"What is in row {row + 1}?", self._describe_row(scene, row))

    def _caption(self, rng: random.Random, turn: int) -> _Draft:
        scene = self._fill(rng, {}, self.names, empty=DESCRIBED_EMPTY)
        rows = [self._describe_row(scene, row) for row in range(self.rows)]
        return _Draft(scene, "Describe the picture.", " above ".join(rows))

    def _fill(
        self, rng: random.Random, placed: dict[int, str], names: list[str], empty: float | None = None
    ) -> tuple[str, ...]:
        """
        Fills the cells around what is placed, from a palette so small that repeats are common. A cell stays empty with
        the chance `empty`, by default drawn for each scene: from a lone object to a full grid, all are as common.
        """
        palette = rng.sample(names, min(self.cells, len(names)))
        empty = rng.random() if empty is None else empty
        return tuple(
            placed[cell] if cell in placed else "" if rng.random() < empty else rng.choice(palette)
            for cell in range(self.cells)
        )

    def _holding(self, rng: random.Random, count: int, shown: list[str], others: list[str]) -> tuple[str, ...]:
        """A scene with something of `shown` in `count` cells and nothing of it in the rest."""
        placed = {cell: rng.choice(shown) for cell in rng.sample(range(self.cells), count)}
        return self._fill(rng, placed, others)

    def _some_or_none(self, rng: random.Random, turn: int) -> int:
        return rng.randint(1, self.max_count) if _yes_or_no(turn) == "yes" else 0

    def _others(self, name: str) -> list[str]:
        return [other for other in self.names if other != name]

    def _describe_row(self, scene: tuple[str, ...], row: int) -> str:
        names = [name or "nothing" for name in scene[row * self.columns : (row + 1) * self.columns]]
        return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


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
    """Writes and draws the examples of a split one by one, from the tiles by style and name."""
    grid = (writer.rows, writer.columns)
    styles = list(tiles)
    rng = random.Random(f"{seed}/{split}")
    jitter_rng = random.Random(f"{seed}/{split}/jitter")  # its own, so that jitter does not change the scenes
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
    """The emoji of a vocabulary, each drawn once and ready to paste."""
    drawings = raw_drawings(style)
    return {name: draw_on_white(drawings[name], size) for name in names}


def _look_up(vocabulary: Sequence[str]) -> list[dict[str, Any]]:
    """The entries of a vocabulary in the table of emoji."""
    table = {entry["codepoint"]: entry for entry in emoji_entries()}
    if unknown := [codepoint for codepoint in vocabulary if codepoint not in table]:
        raise ValueError(
            f"`vocabulary` holds {', '.join(map(repr, unknown))}, which `load_emoji()` does not have. Pass codepoints "
            f"from its column `codepoint`, such as {DEFAULT_VOCABULARY[0]!r}."
        )
    if repeated := [codepoint for codepoint, uses in Counter(vocabulary).items() if uses > 1]:
        raise ValueError(f"`vocabulary` holds {', '.join(map(repr, repeated))} more than once. List each emoji once.")
    if len(vocabulary) < MIN_VOCABULARY:
        raise ValueError(f"`vocabulary` needs at least {MIN_VOCABULARY} emoji, not {len(vocabulary)}. Add some.")
    entries = [table[codepoint] for codepoint in vocabulary]
    for style in STYLES:
        drawings = raw_drawings(style)
        seen: dict[bytes, str] = {}
        for entry in entries:
            if (twin := seen.setdefault(drawings[entry["name"]], entry["name"])) != entry["name"]:
                raise ValueError(
                    f"`vocabulary` holds {twin!r} and {entry['name']!r}, which look the same in style {style!r}, so "
                    "questions about them have no right answer. Drop one of them."
                )
    return entries


def _check_num_rows(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, not {value}.")
    if value > MAX_EXAMPLES:
        raise ValueError(
            f"`{name}` must be at most {MAX_EXAMPLES}, not {value}, since the examples are kept in memory."
        )


def _check_arguments(
    split: str, num_examples: int, grid: tuple[int, int], cell_size: int, held_out_style: str | None, jitter: int
) -> None:
    check_choice("split", split, SPLITS)
    if held_out_style is not None:
        check_choice("held_out_style", held_out_style, STYLES)
    elif split == "test_style":
        raise ValueError(
            "There is no split 'test_style' with `held_out_style=None`, since training then uses all styles. Pass "
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
