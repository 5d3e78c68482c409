"""Colour scales of the report, and text colours that can be read on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Load relative to a balanced load: 0 is dark blue, 1 (balanced) almost white, and 3 or more dark red.
LOAD_SCALE = ((33, 94, 156), (146, 197, 222), (247, 247, 247), (244, 165, 130), (165, 20, 38))
LOAD_STOPS = (0.0, 0.5, 1.0, 2.0, 3.0)
# Shares from 0 to 1: almost white to dark green.
SHARE_SCALE = ((247, 250, 247), (161, 217, 155), (49, 145, 84), (0, 68, 27))
SHARE_STOPS = (0.0, 0.25, 0.6, 1.0)
# Colours of modalities in line charts: text, image, video, audio.
MODALITY_COLOURS = ("#2f7fc1", "#ea6c10", "#8d5fc4", "#2f9e63")


def scale(values: np.ndarray, stops: Sequence[float], colours: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """
    Returns the colours of numbers on a scale.

    Args:
        values (`np.ndarray`):
            Numbers. Those outside of the scale get the colour of its end.
        stops (`Sequence[float]`):
            Positions of the colours, in ascending order.
        colours (`Sequence[tuple[int, int, int]]`):
            Red, green and blue at each position.

    Returns:
        `np.ndarray` of shape `(*values.shape, 3)`, of type uint8.
    """
    table = np.array(colours)
    return np.stack([np.interp(values, stops, table[:, channel]) for channel in range(3)], axis=-1).round().astype("u1")


def cell_style(value: float, stops: Sequence[float], colours: Sequence[tuple[int, int, int]]) -> str:
    """Returns the CSS of a cell with a number: its colour on the scale, and a text colour that contrasts with it."""
    if math.isnan(value):
        return ""
    red, green, blue = scale(np.array(value), stops, colours).tolist()
    is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    return f"background:rgb({red},{green},{blue});color:{'#fff' if is_dark else '#111'}"


def gradient(stops: Sequence[float], colours: Sequence[tuple[int, int, int]]) -> str:
    """Returns the CSS of a colour key, from left to right."""
    first, last = stops[0], stops[-1]
    parts = [
        f"rgb({red},{green},{blue}) {100 * (stop - first) / (last - first):.0f}%"
        for stop, (red, green, blue) in zip(stops, colours, strict=True)
    ]
    return f"background:linear-gradient(to right,{','.join(parts)})"
