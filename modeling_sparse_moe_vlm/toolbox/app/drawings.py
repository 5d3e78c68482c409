"""Drawings of the web page: attention heat maps, the experts of image tokens, and α by word.

The functions only need NumPy and Pillow.
"""

from __future__ import annotations

import colorsys
import html
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# The magma colour map of matplotlib, at equal distances.
_MAGMA = np.array(
    [
        (0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122),
        (229, 80, 100), (251, 135, 97), (254, 194, 135), (252, 253, 191),
    ]
)  # fmt: skip
# Hues of the first groups of experts: orange, blue, green, violet, red, teal.
_GROUP_HUES = (0.08, 0.58, 0.36, 0.78, 0.99, 0.48)
_INK, _PAPER, _FAINT = (31, 41, 55), (255, 255, 255), (107, 114, 128)
_MARGIN = 8


def magma(values: np.ndarray) -> np.ndarray:
    """
    Returns the colours of numbers.

    Args:
        values (`np.ndarray`):
            Numbers from 0 (dark) to 1 (bright). Other numbers are clipped.

    Returns:
        `np.ndarray` of shape `(*values.shape, 3)`, of type uint8.
    """
    at = np.clip(values, 0.0, 1.0) * (len(_MAGMA) - 1)
    channels = [np.interp(at, np.arange(len(_MAGMA)), _MAGMA[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def expert_colour(group: int, number: int, size: int) -> tuple[int, int, int]:
    """
    Returns the colour of an expert. Groups differ in hue, the experts of a group in lightness.

    Args:
        group (`int`):
            Number of the group.
        number (`int`):
            Number of the expert in its group.
        size (`int`):
            Number of experts of the group.
    """
    place = (number + 0.5) / size
    hue = _GROUP_HUES[group % len(_GROUP_HUES)] + 0.1 * (place - 0.5)
    red, green, blue = colorsys.hls_to_rgb(hue, 0.35 + 0.45 * place, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def fit(image: Image.Image, side: int) -> Image.Image:
    """Scales an image so that its longer side has `side` pixels. Small images keep their hard edges."""
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)


def draw_heat(image: Image.Image, heat: np.ndarray, highest: float | None = None, side: int = 320) -> Image.Image:
    """
    Draws the attention that the tokens of an image received as a heat map over the image, with a scale below.

    Args:
        image (`PIL.Image.Image`):
            The image.
        heat (`np.ndarray` of shape `(rows, columns)`):
            The share of attention of every cell.
        highest (`float`, *optional*):
            The share that is drawn in the brightest colour; by default the highest of the heat.
        side (`int`, defaults to 320):
            Longer side of the image in the drawing, in pixels.

    Returns:
        `PIL.Image.Image`: of the width of the scaled image.
    """
    highest = float(heat.max() if highest is None else highest) or 1.0
    shown = fit(image, side)
    relative = heat / highest
    colours = Image.fromarray(magma(relative)).resize(shown.size, Image.Resampling.NEAREST)
    # Almost transparent where there was little attention, so that the image is visible.
    strength = Image.fromarray((90 + 115 * np.clip(relative, 0, 1)).round().astype(np.uint8))
    grey = Image.blend(shown, shown.convert("L").convert("RGB"), 0.5)
    over = Image.composite(colours, grey, strength.resize(shown.size, Image.Resampling.NEAREST))

    drawing = Image.new("RGB", (shown.width, shown.height + 36), _PAPER)
    drawing.paste(over, (0, 0))
    bar = magma(np.linspace(0.0, 1.0, shown.width))[None].repeat(10, axis=0)
    drawing.paste(Image.fromarray(bar), (0, shown.height + 6))
    pen, font = ImageDraw.Draw(drawing), ImageFont.load_default(13)
    pen.text((2, shown.height + 18), "0 %", _INK, font)
    pen.text((shown.width - 2, shown.height + 18), percent(highest), _INK, font, anchor="ra")
    return drawing


def percent(share: float) -> str:
    """Formats a share as a percentage with three digits, such as `4.07 %`."""
    return f"{100 * share:.3g} %"


def draw_experts(
    image: Image.Image,
    experts: np.ndarray,
    layers: Sequence[int],
    groups: Sequence[Sequence[tuple[str, int]]],
    side: int = 150,
    columns: int = 4,
) -> Image.Image:
    """
    Draws the first expert of every image token, in one grid per layer, with a legend of the groups below.

    Args:
        image (`PIL.Image.Image`):
            The image.
        experts (`np.ndarray` of shape `(layers, rows, columns)`):
            Number of the expert across all routed groups of the layer. Larger numbers mean that there is none.
        layers (`Sequence[int]`):
            Numbers of the layers.
        groups (`Sequence[Sequence[tuple[str, int]]]`):
            Name and number of experts of the routed groups of every layer.
        side (`int`, defaults to 150):
            Longer side of the image in each grid, in pixels.
        columns (`int`, defaults to 4):
            Number of grids in a line.

    Returns:
        `PIL.Image.Image`
    """
    shown = fit(image, side)
    names = list(dict.fromkeys(name for of_layer in groups for name, _ in of_layer))
    font = ImageFont.load_default(14)
    width, height = shown.width + _MARGIN, shown.height + _MARGIN + 22
    columns = min(columns, len(layers))
    lines = -(-len(layers) // columns)
    legend = {name: max(size for of_layer in groups for other, size in of_layer if other == name) for name in names}
    sizes = (max(columns * width, 340), lines * height + 26 * len(legend) + _MARGIN)
    drawing = Image.new("RGB", sizes, _PAPER)
    pen = ImageDraw.Draw(drawing)
    for number, (layer, of_layer) in enumerate(zip(layers, groups, strict=True)):
        left, top = number % columns * width, number // columns * height
        pen.text((left + 1, top + 3), f"layer {layer}", _INK, font)
        colours = [
            (expert_colour(names.index(name), expert, size), str(expert))
            for name, size in of_layer
            for expert in range(size)
        ]
        drawing.paste(expert_grid(shown, experts[number], colours), (left, top + 22))
    for line, (name, size) in enumerate(legend.items()):
        _draw_legend(pen, (0, lines * height + 26 * line), drawing.width, names.index(name), name, size)
    return drawing


def expert_grid(
    shown: Image.Image, experts: np.ndarray, colours: Sequence[tuple[tuple[int, int, int], str]]
) -> Image.Image:
    """
    Draws the experts of one layer: translucent cells in their colours over the image, with labels where they fit.

    Args:
        shown (`PIL.Image.Image`):
            The image, in the size of the drawing.
        experts (`np.ndarray` of shape `(rows, columns)`):
            Number of the expert of every cell. Larger numbers than those of the experts mean that there is none.
        colours (`Sequence[tuple[tuple[int, int, int], str]]`):
            Colour and label of every expert.

    Returns:
        `PIL.Image.Image`: Of the size of the image.
    """
    rows, columns = experts.shape
    x = [round(shown.width * column / columns) for column in range(columns + 1)]
    y = [round(shown.height * row / rows) for row in range(rows + 1)]
    cells = shown.copy()
    pen = ImageDraw.Draw(cells)
    is_large = min(x[1] - x[0], y[1] - y[0]) >= 14
    font = ImageFont.load_default(min(18, max(10, (y[1] - y[0]) // 2)))
    boxes = [(row, column, int(experts[row, column])) for row in range(rows) for column in range(columns)]
    for row, column, expert in boxes:
        if expert < len(colours):
            pen.rectangle((x[column], y[row], x[column + 1] - 1, y[row + 1] - 1), colours[expert][0])
    grid = Image.blend(shown.convert("L").convert("RGB"), cells, 0.72)  # grey, so that the hues are those of experts
    pen = ImageDraw.Draw(grid)
    for row, column, expert in boxes:
        if is_large:
            pen.rectangle((x[column], y[row], x[column + 1] - 1, y[row + 1] - 1), outline=_PAPER)
            middle = (x[column] + x[column + 1]) / 2, (y[row] + y[row + 1]) / 2
            text = colours[expert][1] if expert < len(colours) else "–"
            pen.text(middle, text, _PAPER, font, anchor="mm", stroke_width=2, stroke_fill=_INK)
    return grid


def _draw_legend(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], width: int, group: int, name: str, size: int
) -> None:
    """Draws a line with the name of a group and the colours of as many of its experts as fit."""
    left, top = corner
    font = ImageFont.load_default(14)
    pen.text((left + 1, top + 4), name, _INK, font)
    left += max(70, round(pen.textlength(name, font)) + 12)
    for expert in range(size):
        if left + 24 > width - 24 and expert + 1 < size:
            pen.text((left + 2, top + 4), "…", _FAINT, font)
            break
        pen.rectangle((left, top + 1, left + 21, top + 21), expert_colour(group, expert, size))
        pen.text(
            (left + 11, top + 11), str(expert), _PAPER, ImageFont.load_default(12), anchor="mm", stroke_width=1,
            stroke_fill=_INK,
        )  # fmt: skip
        left += 24


def alpha_html(words: Sequence[str], alpha: Sequence[float], count_free_alpha: Sequence[float]) -> str:
    """
    Returns the HTML of an answer, with α below every word and as the strength of its colour, and a scale.

    Args:
        words (`Sequence[str]`):
            The words.
        alpha (`Sequence[float]`):
            α of every word, from 0 to 1.
        count_free_alpha (`Sequence[float]`):
            Count-free α of every word, from 0 to 1.
    """
    chips = "".join(
        f'<span class="word" style="background:rgba(234,108,16,{value:.2f})" title="count-free α {free:.3f}">'
        f"<span>{html.escape(word)}</span><small>{value:.2f}</small></span>"
        for word, value, free in zip(words, alpha, count_free_alpha, strict=True)
    )
    mean, free_mean = float(np.mean(alpha)), float(np.mean(count_free_alpha))
    return (
        f'<div class="alpha"><div class="words">{chips}</div>'
        '<div class="scale"><span>0 (text)</span><i></i><span>1 (images)</span></div>'
        f"<p>Mean α <b>{mean:.3f}</b>, count-free <b>{free_mean:.3f}</b></p></div>"
    )
