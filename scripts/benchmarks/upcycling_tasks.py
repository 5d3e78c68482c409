"""The two tasks of upcycling.py, from the built-in data: knowledge (facts) and relations (positions)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from datasets import concatenate_datasets
from PIL import Image
from transformers import PreTrainedTokenizerBase

from modeling_sparse_moe_vlm.toolbox.demo import emoji_questions, scenes

IMAGE_SIZE = 32
TRAINING_SIZES = (28, 29, 31, 32)  # pixels
HELD_OUT_SIZE = 30
KNOWLEDGE = ("name", "group", "name", "keyword")  # names twice, because they take longest to learn
RELATIONS = ("left_of", "right_of", "above", "below", "position")
HELD_OUT_SEED = 1_000_003
IGNORED = -100


class Example(NamedTuple):
    """A question about an image `(3, S, S)` of type uint8, and its answer."""

    image: torch.Tensor
    question: str
    answer: str
    kind: str


class Task(Protocol):
    """A task with several kinds of questions, which are drawn in turn."""

    kinds: tuple[str, ...]

    def sample(self, count: int, rng: random.Random) -> list[Example]:
        """Draws training examples."""

    def held_out(self, count: int) -> list[Example]:
        """Returns examples that do not occur in training. They are the same in every call."""


class Knowledge:
    """
    Questions about the names of emoji, their groups and their keywords: thousands of facts to memorise. An emoji is
    drawn in one of several sizes at any position in the image. One size is held out, but no facts are.
    """

    kinds = KNOWLEDGE

    def __init__(self, num_emoji: int | None = None):
        rows = concatenate_datasets([emoji_questions(split) for split in ("train", "validation", "test")])
        kinds, names = rows["kind"], [scene[0] for scene in rows["scene"]]
        self.names = sorted(set(names))[:num_emoji]
        chosen = set(self.names)
        first = {name: row for row, name in reversed(list(enumerate(names))) if name in chosen}
        self._drawings = {name: _in_all_sizes(rows[row]["image"]) for name, row in first.items()}
        facts = list(zip(names, rows["question"], rows["answer"], kinds, strict=True))
        self._facts = {
            kind: sorted({fact[:3] for fact in facts if fact[3] == kind and fact[0] in chosen})
            for kind in dict.fromkeys(self.kinds)
        }

    def texts(self) -> Iterator[str]:
        for facts in self._facts.values():
            for _, question, answer in facts:
                yield from (question, answer)

    def sample(self, count: int, rng: random.Random) -> list[Example]:
        return [
            self._draw(kind, rng.choice(self._facts[kind]), rng.choice(TRAINING_SIZES), rng)
            for kind in _in_turn(self.kinds, count, rng)
        ]

    def held_out(self, count: int) -> list[Example]:
        rng = random.Random(HELD_OUT_SEED)
        share = -(-count // len(self._facts))
        return [
            self._draw(kind, fact, HELD_OUT_SIZE, rng)
            for kind, facts in self._facts.items()
            for fact in rng.sample(facts, min(share, len(facts)))
        ]

    def _draw(self, kind: str, fact: tuple[str, str, str], size: int, rng: random.Random) -> Example:
        name, question, answer = fact
        top, left = rng.randint(0, IMAGE_SIZE - size), rng.randint(0, IMAGE_SIZE - size)
        image = torch.full((3, IMAGE_SIZE, IMAGE_SIZE), 255, dtype=torch.uint8)
        image[:, top : top + size, left : left + size] = self._drawings[name][size]
        return Example(image, question, answer, kind)


class Relations:
    """
    Questions about the positions of objects in scenes of a few frequent objects, which need few facts. Arrangements of
    objects are held out.
    """

    kinds = RELATIONS

    def __init__(self, num_scenes: int, seed: int = 0):
        self._train = _scenes("train", num_scenes, seed)

    def texts(self) -> Iterator[str]:
        for examples in self._train.values():
            for example in examples:
                yield from (example.question, example.answer)

    def sample(self, count: int, rng: random.Random) -> list[Example]:
        return [rng.choice(self._train[kind]) for kind in _in_turn(self.kinds, count, rng)]

    def held_out(self, count: int) -> list[Example]:
        share = -(-count // len(self.kinds))
        by_kind = _scenes("test", 3 * count, 0)  # less than half of the questions about scenes are of other kinds
        return [example for examples in by_kind.values() for example in examples[:share]]


class Collator:
    """
    Makes batches of image tokens, question and answer, padded on the right. The targets are the answer and the end
    token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            A tokenizer with `<image>`, `<|im_start|>` (which precedes an answer) and `<|im_end|>`.
        image_seq_length (`int`):
            Number of tokens of an image.
        device (`str`, defaults to `"cpu"`):
            Device of the batches.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_seq_length: int, device: str = "cpu"):
        self._device = device
        image, start = tokenizer.convert_tokens_to_ids(["<image>", "<|im_start|>"])
        self._image, self._start, self._end = [image] * image_seq_length, [start], [tokenizer.eos_token_id]
        self._padding = tokenizer.pad_token_id
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        rows = [
            (self._image + self._encode(example.question) + self._start, self._encode(example.answer) + self._end)
            for example in examples
        ]
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        input_ids = torch.full((len(rows), length), self._padding)
        labels = torch.full((len(rows), length), IGNORED)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            input_ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        pixels = torch.stack([example.image for example in examples]).float() / 127.5 - 1
        is_real = (input_ids != self._padding).long()
        batch = {"input_ids": input_ids, "attention_mask": is_real, "pixel_values": pixels, "labels": labels}
        return {name: tensor.to(self._device) for name, tensor in batch.items()}

    def _encode(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self._tokenizer(text)["input_ids"]
        return self._ids[text]


def batches(shares: Mapping[Task, int], collator: Collator, steps: int, seed: str) -> Iterator[dict[str, torch.Tensor]]:
    """Yields training batches with `shares` questions of each task. They only depend on the `seed`."""
    rng = random.Random(seed)
    for _ in range(steps):
        yield collator([example for task, share in shares.items() for example in task.sample(share, rng)])


def _in_turn(kinds: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Returns the kinds of `count` questions: all kinds in turn, starting with a random one."""
    first = rng.randrange(len(kinds))
    return [kinds[(first + number) % len(kinds)] for number in range(count)]


def _in_all_sizes(drawing: Image.Image) -> dict[int, torch.Tensor]:
    return {
        size: _to_tensor(drawing.resize((size, size), Image.Resampling.LANCZOS))
        for size in (*TRAINING_SIZES, HELD_OUT_SIZE)
    }


def _scenes(split: str, count: int, seed: int) -> dict[str, list[Example]]:
    """Returns the questions about relations in scenes, by kind."""
    rows = scenes(split, count, seed, cell_size=IMAGE_SIZE // 2)
    rows = rows.select([row for row, kind in enumerate(rows["kind"]) if kind in RELATIONS])
    examples: dict[str, list[Example]] = {kind: [] for kind in RELATIONS}
    for row in rows:
        example = Example(_to_tensor(row["image"]), row["question"], row["answer"], row["kind"])
        examples[row["kind"]].append(example)
    return examples


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
