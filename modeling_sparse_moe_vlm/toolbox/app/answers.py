"""Answers, with the attention and the routing behind them, by word and by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .generation import Generation
from .image_tokens import TokenGrid
from .recording import Recording

NO_IMAGE = "There is no image in the conversation."
NO_ATTENTION = "This model does not return its attention matrices, so its attention to the image is not known."
NO_EXPERTS = "This model has no experts of this package. `sparse-moe-vlm upcycle` makes a model that has them."


@dataclass
class Answer:
    """
    An answer of the model. Fields that are not known are empty, and the note beside them says why.

    Args:
        text (`str`):
            The answer.
        words (`list[str]`):
            Its words.
        alpha (`list[float]`), count_free_alpha (`list[float]`):
            α of every word: the share of attention that went to images, averaged over its tokens, layers and heads.
        alpha_note (`str`):
            Why there is no α.
        heat (`list[np.ndarray]`):
            For every image, the share of the attention to images that each cell received, `(rows, columns)`, averaged
            over words, layers and heads. The sum over all images is 1.
        heat_note (`str`):
            Why there is no heat.
        experts (`list[np.ndarray]`):
            For every image, the first routed expert of each cell, `(sparse layers, rows, columns)`.
        layers (`list[int]`):
            Numbers of the sparse layers.
        groups (`list[list[tuple[str, int]]]`):
            Name and number of experts of the routed groups of every sparse layer.
        experts_note (`str`):
            Why there are no experts.
    """

    text: str
    words: list[str] = field(default_factory=list)
    alpha: list[float] = field(default_factory=list)
    count_free_alpha: list[float] = field(default_factory=list)
    alpha_note: str = ""
    heat: list[np.ndarray] = field(default_factory=list)
    heat_note: str = ""
    experts: list[np.ndarray] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    groups: list[list[tuple[str, int]]] = field(default_factory=list)
    experts_note: str = ""


def explained(
    text: str,
    words: Sequence[tuple[str, Sequence[int]]],
    generation: Generation,
    grids: Sequence[TokenGrid] | str,
    length: int,
) -> Answer:
    """
    Creates an answer from the recording of a generation.

    Args:
        text (`str`):
            The answer.
        words (`Sequence[tuple[str, Sequence[int]]]`):
            Its words, with the numbers of their tokens.
        generation ([`~generation.Generation`]):
            The recording of the generation.
        grids (`Sequence[TokenGrid]` or `str`):
            The tokens of every image, or why they are not known.
        length (`int`):
            Length of the prompt.

    Returns:
        [`Answer`]: The answer.
    """
    answer = Answer(text, [word for word, _ in words], alpha_note=generation.alpha_note)
    if not words:
        answer.alpha_note = answer.heat_note = answer.experts_note = "The answer is empty."
        return answer
    numbers = [list(of_word) for _, of_word in words]
    if generation.alpha:
        answer.alpha = _mean_by_word(generation.alpha, numbers)
        answer.count_free_alpha = _mean_by_word(generation.count_free_alpha, numbers)
    if isinstance(grids, str) or not grids:
        answer.heat_note = answer.experts_note = grids if isinstance(grids, str) else NO_IMAGE
        return answer
    steps = [step for of_word in numbers for step in of_word]
    attention = generation.recording.attention_to_prompt(steps, length)
    if attention is None:
        answer.heat_note = NO_ATTENTION
    else:
        answer.heat = image_heat(attention.mean(axis=0), grids)
    _add_experts(answer, generation.recording, grids)
    return answer


def image_heat(attention: np.ndarray, grids: Sequence[TokenGrid]) -> list[np.ndarray]:
    """
    Computes how the attention to images is distributed over their cells.

    Args:
        attention (`np.ndarray` of shape `(prompt length,)`):
            Attention to every token of the prompt.
        grids (`Sequence[TokenGrid]`):
            The tokens of every image.

    Returns:
        `list[np.ndarray]`: One array `(rows, columns)` for each image. The sum over all images is 1.
    """
    heat = [grid.spread(attention) for grid in grids]
    total = sum(float(cells.sum()) for cells in heat)
    return [cells / total if total else cells for cells in heat]


def _mean_by_word(values: Sequence[float], numbers: Sequence[Sequence[int]]) -> list[float]:
    return [float(np.mean([values[token] for token in of_word])) for of_word in numbers]


def _add_experts(answer: Answer, recording: Recording, grids: Sequence[TokenGrid]) -> None:
    if not recording.experts:
        answer.experts_note = NO_EXPERTS
        return
    experts = np.stack([layer.numpy() for layer in recording.experts])
    answer.experts = [experts[:, grid.positions] for grid in grids]
    answer.layers, answer.groups = recording.layers, recording.groups
