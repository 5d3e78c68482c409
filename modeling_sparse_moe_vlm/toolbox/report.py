"""Pictures of what a model does: its answers beside the scenes, and the load of its experts."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure


def draw_answers(rows: Sequence[dict[str, Any]], answers: Sequence[str], path: str | Path, columns: int = 4) -> None:
    """
    Draws pictures with question, answer and, where the answer is wrong, the right one.

    Args:
        rows (`Sequence[dict]`):
            Rows with `image`, `question` and `answer`.
        answers (`Sequence[str]`):
            The model's answers.
        path (`str` or `Path`):
            Where to write the PNG.
        columns (`int`, defaults to 4):
            Number of pictures per line.
    """
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * lines), layout="constrained")
    for axes, row, answer in zip(figure.subplots(lines, columns, squeeze=False).flat, rows, answers, strict=False):
        right = answer == row["answer"]
        text = "\n".join(textwrap.wrap(row["question"], 34) + textwrap.wrap(answer or "(nothing)", 34))
        if not right:
            text += "\n" + "\n".join(textwrap.wrap(f"(right: {row['answer']})", 34))
        axes.imshow(row["image"], interpolation="nearest")
        axes.set_title(text, fontsize=9, color="darkgreen" if right else "firebrick")
    for axes in figure.axes:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


def draw_expert_load(load: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """
    Draws the load of every expert as one heat map per modality.

    Args:
        load (`Mapping[str, torch.Tensor]`):
            By modality, `(layers, experts)`, as [`expert_load`] returns it.
        path (`str` or `Path`):
            Where to write the PNG.
    """
    layers, experts = next(iter(load.values())).shape
    figure = Figure(figsize=(1.5 + len(load) * max(3.0, 0.5 * experts), 1.6 + 0.5 * layers), layout="constrained")
    highest = max(float(shares.max()) for shares in load.values())
    plots = figure.subplots(1, len(load), squeeze=False)[0]
    for axes, (modality, shares) in zip(plots, load.items(), strict=True):
        image = axes.imshow(shares.numpy(), vmin=0.0, vmax=highest, cmap="viridis", aspect="auto")
        axes.set(title=f"{modality} tokens", xlabel="expert", ylabel="sparse layer")
        axes.set_xticks(range(experts))
        axes.set_yticks(range(layers))
    figure.colorbar(image, ax=list(plots), label="share of the modality's slots")
    figure.suptitle(f"Load of the routed experts (balanced: {1 / experts:.0%})", fontsize=10)
    figure.savefig(path, dpi=110)
