"""The emoji that the package contains: a table of drawings, and questions about single emoji."""

import hashlib
import io
import random
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from ...checks import check_choice

EMOJI_FILE = Path(__file__).parent / "assets" / "emoji.parquet"
DRAWING_SIZE = 64
STYLES = ("twemoji", "noto")
HELD_OUT_STYLE = "noto"
SPLITS = ("train", "validation", "test", "test_style")
EXAMPLE_FEATURES = Features(
    {
        "image": Image(),
        "question": Value("string"),
        "answer": Value("string"),
        "kind": Value("string"),
        "scene": [Value("string")],
        "style": Value("string"),
    }
)


def load_emoji(style: str | None = None) -> Dataset:
    """
    Loads the table of emoji drawings, which has 1,906 emoji in each of two drawing styles.

    The background of the drawings is transparent. [`draw_on_white`] makes it white.

    Args:
        style (`str`, *optional*):
            `"twemoji"` or `"noto"` to load the drawings of one style. By default, both are loaded (3,812 rows).

    Returns:
        `datasets.Dataset`: A dataset with the columns `codepoint`, `emoji`, `name`, `keywords`, `group`, `subgroup`,
        `style` and `image`.

    Raises:
        ValueError: If there is no such style.
    """
    if style is not None:
        check_choice("style", style, STYLES)
    filters = None if style is None else [("style", "=", style)]
    return Dataset(pq.read_table(EMOJI_FILE, filters=filters)).cast_column("image", Image())


def emoji_questions(split: str = "train", seed: int = 0) -> Dataset:
    """
    Makes a dataset of questions about single emoji, each drawn on a white square of 64×64 pixels.

    There are four kinds of question: the `name` of the emoji, its `group`, whether a `keyword` goes with it, and a
    `caption` of its name and keywords. For every keyword in a split, the answer is as often "yes" as "no". Emoji that
    share their drawing with another emoji are left out, because the image does not show which one is meant. An example
    is the flag of Norway, which is also that of Svalbard & Jan Mayen.

    Each pair of an emoji and a question always belongs to the same split, with any seed: 80 % belong to `train`,
    10 % to `validation` and 10 % to `test`. Thus `test` asks about images that `train` contains, but it asks different
    questions about them. `test_style` has the same rows as `train`, in a drawing style that no other split contains.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"validation"`, `"test"` or `"test_style"`.
        seed (`int`, *optional*, defaults to 0):
            Seed of the order of the rows and of the choice of keywords.

    Returns:
        `datasets.Dataset`: A dataset with the columns `image`, `question`, `answer`, `kind`, `scene` (a list with the
        name of the emoji) and `style`.

    Raises:
        ValueError: If there is no such split.
    """
    check_choice("split", split, SPLITS)
    style = HELD_OUT_STYLE if split == "test_style" else STYLES[0]
    asked_in = "train" if split == "test_style" else split
    rng = random.Random(f"{seed}/{asked_in}")

    emoji = _distinct_emoji()
    rows: list[tuple[str, str, str, str]] = []  # name, kind, question, answer
    for entry in emoji:
        name = entry["name"]
        if _question_split(name, "name") == asked_in:
            rows.append((name, "name", "What is this emoji called?", name))
        if _question_split(name, "group") == asked_in:
            rows.append((name, "group", "To which group of emoji does this one belong?", entry["group"]))
        if _question_split(name, "caption") == asked_in:
            rows.append((name, "caption", "Describe the picture.", f"{name}: {', '.join(entry['keywords'])}"))
        word = rng.choice(entry["keywords"])
        if _question_split(name, word) == asked_in:
            # Adds a "no" for every "yes" to the same word, so that the word does not reveal the answer.
            other = rng.choice(emoji)
            while (
                word in other["keywords"] or word == other["name"] or _question_split(other["name"], word) != asked_in
            ):
                other = rng.choice(emoji)
            question = f'Does the word "{word}" go with this picture?'
            rows += [(name, "keyword", question, "yes"), (other["name"], "keyword", question, "no")]
    rng.shuffle(rows)

    drawings = raw_drawings(style)
    images = {entry["name"]: encode_png(draw_on_white(drawings[entry["name"]], DRAWING_SIZE)) for entry in emoji}
    return Dataset.from_list(
        [
            {
                "image": {"bytes": images[name], "path": None},
                "question": question,
                "answer": answer,
                "kind": kind,
                "scene": [name],
                "style": style,
            }
            for name, kind, question, answer in rows
        ],
        features=EXAMPLE_FEATURES,
    )


def _distinct_emoji() -> list[dict[str, Any]]:
    """Returns the emoji that do not share their drawing with another emoji in any style."""
    shared: set[str] = set()
    for style in STYLES:
        drawings = raw_drawings(style)
        uses = Counter(drawings.values())
        shared |= {name for name, drawing in drawings.items() if uses[drawing] > 1}
    return [entry for entry in emoji_entries() if entry["name"] not in shared]


def _question_split(name: str, topic: str) -> str:
    bucket = stable_bucket(f"{name}/{topic}")
    return "train" if bucket < 80 else "validation" if bucket < 90 else "test"


def stable_bucket(key: str) -> int:
    """
    Hashes a key into one of 100 buckets. The bucket is the same in every process and on every machine.

    Args:
        key (`str`):
            Key to hash.

    Returns:
        `int`: The number of the bucket, from 0 to 99.
    """
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % 100


def emoji_entries() -> list[dict[str, Any]]:
    """
    Returns the entries of the emoji, without their drawings.

    Returns:
        `list[dict[str, Any]]`: The `codepoint`, `name`, `keywords`, `group` and `subgroup` of each emoji.
    """
    columns = ["codepoint", "name", "keywords", "group", "subgroup"]
    return pq.read_table(EMOJI_FILE, columns=columns, filters=[("style", "=", STYLES[0])]).to_pylist()


@cache
def raw_drawings(style: str) -> Mapping[str, bytes]:
    """
    Returns the drawings of a style as they are stored.

    Args:
        style (`str`):
            `"twemoji"` or `"noto"`.

    Returns:
        `Mapping[str, bytes]`: The bytes of the PNG file of each emoji, by name.
    """
    table = pq.read_table(EMOJI_FILE, columns=["name", "image"], filters=[("style", "=", style)])
    return {row["name"]: row["image"]["bytes"] for row in table.to_pylist()}


def draw_on_white(png: bytes, size: int) -> PILImage.Image:
    """
    Draws a transparent drawing on a white background.

    Args:
        png (`bytes`):
            PNG file of the drawing.
        size (`int`):
            Width and height of the result in pixels.

    Returns:
        `PIL.Image.Image`: An RGB image of `size` × `size` pixels.
    """
    drawing = PILImage.open(io.BytesIO(png)).convert("RGBA")
    white = PILImage.new("RGBA", drawing.size, "white")
    return PILImage.alpha_composite(white, drawing).convert("RGB").resize((size, size), PILImage.Resampling.LANCZOS)


def encode_png(image: PILImage.Image) -> bytes:
    """
    Encodes an image as PNG, with little compression, because that is fast.

    Args:
        image (`PIL.Image.Image`):
            Image to encode.

    Returns:
        `bytes`: A PNG file.
    """
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
