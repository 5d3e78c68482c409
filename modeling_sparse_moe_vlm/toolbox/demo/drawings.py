"""Drawings of what a model does: its answers with the images, and the load of its experts."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ..evaluation.metrics.exact_match.exact_match import is_right


def draw_answers(rows: Sequence[dict[str, Any]], answers: Sequence[str], path: str | Path, columns: int = 4) -> None:
    """
    Draws images with their question, the answer and, where that is wrong, the right one.

    Args:
        rows (`Sequence[dict]`):
            Rows with `image`, `question` and `answer`.
        answers (`Sequence[str]`):
            The model's answers.
        path (`str` or `Path`):
            Where to write the PNG.
        columns (`int`, defaults to 4):
            Number of images per line.
    """
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * lines), layout="constrained")
    for axes, row, answer in zip(figure.subplots(lines, columns, squeeze=False).flat, rows, answers, strict=False):
        right = is_right(answer, row["answer"])
        text = "\n".join(textwrap.wrap(row["question"], 34) + textwrap.wrap(answer or "(nothing)", 34))
        if not right:
            text += "\n" + "\n".join(textwrap.wrap(f"(right: {row['answer']})", 34))
        axes.imshow(row["image"], interpolation="nearest")
        # A dollar sign does not start a formula.
        axes.set_title(text, fontsize=9, color="darkgreen" if right else "firebrick", parse_math=False)
    for axes in figure.axes:
        axes.set_axis_off()
    save_figure(figure, path)


def draw_expert_load(load: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """
    Draws the load of every expert, relative to a balanced one, as one heat map per modality. Where there is no expert
    the map is blank.

    Args:
        load (`Mapping[str, torch.Tensor]`):
            By modality, `(layers, experts)`, as [`~toolbox.routing.expert_load`] returns it.
        path (`str` or `Path`):
            Where to write the PNG.

    Raises:
        ValueError: If the load is empty, as that of a model without routed experts.
    """
    if not load:
        raise ValueError("`load` is empty: a model without routed experts has no load of experts to draw.")
    # Multiplied by the number of experts, layers with few and with many of them compare.
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
    figure.colorbar(image, ax=list(plots), label="share of the modality's slots × experts")
    figure.suptitle("Load of the routed experts (1: balanced, blank: no such expert)", fontsize=10)
    save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG. Models may say what no font can show: that is drawn as a box, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=110)
