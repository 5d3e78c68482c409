"""Figures: a model's answers beside the images, and the load of its experts."""

from __future__ import annotations

import math
import random
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ..evaluation.metrics.exact_match.exact_match import is_right

RIGHT, WRONG = "darkgreen", "firebrick"
NO_BREAK = "\u00a0"  # a space at which lines are not broken


def draw_answers(
    rows: Sequence[dict[str, Any]],
    answers: Sequence[str],
    path: str | Path,
    columns: int = 4,
    title: str | None = None,
) -> None:
    """
    Draws images with their question, the model's answer and the reference answer. The frame of an image is green where
    the answer is right, and red where it is wrong.

    Args:
        rows (`Sequence[dict]`):
            Rows with `image`, `question` and `answer`.
        answers (`Sequence[str]`):
            The model's answers.
        path (`str` or `Path`):
            Where to write the PNG.
        columns (`int`, *optional*, defaults to 4):
            Number of images per line.
        title (`str`, *optional*):
            Title of the figure.
    """
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(3.2 * columns, 4.4 * lines), layout="constrained")
    if title is not None:
        figure.suptitle(title, fontsize=11, parse_math=False)
    for axes, row, answer in zip(figure.subplots(lines, columns, squeeze=False).flat, rows, answers, strict=False):
        is_correct = is_right(answer, row["answer"])
        colour = RIGHT if is_correct else WRONG
        axes.imshow(row["image"], interpolation="nearest")
        # A dollar sign does not start a formula.
        axes.set_title("\n".join(textwrap.wrap(row["question"], 34)), fontsize=9, parse_math=False)
        spoken = f"model: {answer or '(nothing)'}{NO_BREAK}{'✓' if is_correct else '✗'}"
        lines_below = [*textwrap.wrap(spoken, 34), *textwrap.wrap(f"reference: {row['answer']}", 34)]
        axes.set_xlabel("\n".join(lines_below), fontsize=9, color=colour, parse_math=False)
        axes.set(xticks=[], yticks=[])
        for side in axes.spines.values():
            side.set(color=colour, linewidth=3)
    for axes in figure.axes:
        if not axes.images:
            axes.set_axis_off()
    save_figure(figure, path)


def some_of_each(is_correct: Sequence[bool], number: int, seed: int = 0) -> list[int]:
    """
    Chooses answers to show: failures as well as successes, in random order. Where there are enough
    of both, a third are failures.

    Args:
        is_correct (`Sequence[bool]`):
            Whether each answer is right.
        number (`int`):
            How many to choose.
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice.

    Returns:
        `list[int]`: Indices of `number` answers, or of all where there are fewer.
    """
    rng = random.Random(seed)
    right, wrong = ([i for i, flag in enumerate(is_correct) if flag is wanted] for wanted in (True, False))
    num_wrong = min(len(wrong), max(number // 3, number - len(right)))
    chosen = rng.sample(wrong, num_wrong) + rng.sample(right, min(len(right), number - num_wrong))
    rng.shuffle(chosen)
    return chosen


def draw_expert_load(load: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """
    Draws the load of every expert, relative to a balanced load, as one heat map per modality. The number in each cell
    is the relative load: 1 is balanced, 2 is twice as much. Cells without an expert are blank.

    Args:
        load (`Mapping[str, torch.Tensor]`):
            By modality, a tensor of shape `(layers, experts)`, as [`~toolbox.routing.expert_load`] returns it.
        path (`str` or `Path`):
            Where to write the PNG.

    Raises:
        ValueError: If `load` is empty because the model has no routed experts.
    """
    if not load:
        raise ValueError("`load` is empty: the model has no routed experts whose load could be drawn.")
    # Multiplied by the number of experts, so that layers with few and with many experts compare.
    relative = {modality: shares * (~shares.isnan()).sum(dim=1, keepdim=True) for modality, shares in load.items()}
    layers, experts = next(iter(relative.values())).shape
    figure = Figure(figsize=(1.5 + len(load) * max(3.0, 0.5 * experts), 1.6 + 0.5 * layers), layout="constrained")
    highest = max(1.0, *(float(values.nan_to_num().max()) for values in relative.values()))
    plots = figure.subplots(1, len(load), squeeze=False)[0]
    for axes, (modality, values) in zip(plots, relative.items(), strict=True):
        image = axes.imshow(values.numpy(), vmin=0.0, vmax=highest, cmap="viridis", aspect="auto")
        axes.set(title=f"{modality} tokens", xlabel="expert", ylabel="sparse layer")
        axes.set_xticks(range(experts))
        axes.set_yticks(range(layers))
        for (layer, expert), value in zip(
            product(range(layers), range(experts)), values.flatten().tolist(), strict=True
        ):
            if not math.isnan(value):  # light text on dark cells, and the other way round
                colour = "white" if value < 0.6 * highest else "black"
                axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=list(plots), label="load relative to balanced")
    figure.suptitle("Load of the routed experts (1: balanced, blank: no expert)", fontsize=10)
    save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG. Characters that the font lacks are drawn as boxes, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=110)
