"""Line charts by layer, as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from .colours import MODALITY_COLOURS

WIDTH, HEIGHT = 440, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 40
NUM_LABELS = 12  # layers that are labelled on the axis, at most


def line_chart(
    layers: Sequence[int], series: Mapping[str, Sequence[float]], label: str, highest: float | None = None
) -> str:
    """
    Draws a line chart of a figure by layer.

    Args:
        layers (`Sequence[int]`):
            Numbers of the layers.
        series (`Mapping[str, Sequence[float]]`):
            Values of each line by layer, by the name of the line. NaN leaves a gap.
        label (`str`):
            Label of the vertical axis, which begins at 0.
        highest (`float`, *optional*):
            End of the vertical axis. By default, a round number above all values.

    Returns:
        `str`: The SVG. A legend names the lines if there are several.
    """
    known = [value for values in series.values() for value in values if not math.isnan(value)]
    top, step = (highest, highest / 4) if highest else _axis(max(known, default=1.0))

    def x(position: int) -> float:
        share = 0.5 if len(layers) == 1 else position / (len(layers) - 1)
        return round(LEFT + 8 + share * (WIDTH - LEFT - RIGHT - 16), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)} by layer">']
    for tick in range(round(top / step) + 1):
        value = tick * step
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>')
    every = -(-len(layers) // NUM_LABELS)
    for position, layer in enumerate(layers):
        if position % every == 0:
            parts.append(f'<text x="{x(position)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{layer}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">layer</text>')
    for number, (name, values) in enumerate(series.items()):
        colour = MODALITY_COLOURS[number % len(MODALITY_COLOURS)]
        points = [(x(i), y(value)) for i, value in enumerate(values) if not math.isnan(value)]
        path = " ".join(f"{left},{down}" for left, down in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for i, value in enumerate(values):
            if not math.isnan(value):
                title = f"<title>{html.escape(name)}, layer {layers[i]}: {value:.3f}</title>"
                parts.append(f'<circle cx="{x(i)}" cy="{y(value)}" r="3.5" fill="{colour}">{title}</circle>')
    parts.append("</svg>")
    return "".join(parts)


def legend(names: Sequence[str]) -> str:
    """Returns the HTML of a legend of the lines."""
    items = [
        f'<span><i style="background:{MODALITY_COLOURS[i % len(MODALITY_COLOURS)]}"></i>{html.escape(name)}</span>'
        for i, name in enumerate(names)
    ]
    return f'<div class="legend">{"".join(items)}</div>'


def _axis(highest: float) -> tuple[float, float]:
    """Returns a round end of an axis that is not below a number, and the distance of its four or five ticks."""
    size = 10 ** math.floor(math.log10(highest)) if highest > 0 else 1.0
    step = next(factor * size for factor in (0.25, 0.5, 1.0, 2.0, 2.5) if 5 * factor * size >= highest)
    return step * max(1, math.ceil(highest / step - 1e-9)), step
