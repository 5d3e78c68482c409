"""Renders a routing report as one HTML page, without references to other files."""

from __future__ import annotations

import base64
import colorsys
import hashlib
import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from markupsafe import Markup
from PIL import Image

from .... import __version__
from ...app.drawings import alpha_html, draw_heat, expert_colour, expert_grid, fit
from ...model_size import short
from ..statistics import GroupRouting
from .charts import legend, line_chart
from .colours import LOAD_SCALE, LOAD_STOPS, SHARE_SCALE, SHARE_STOPS, cell_style, gradient, scale
from .contents import Example, RoutingReport, ShownRow

# With more experts, the cells of a heat map have no numbers.
MAX_NUMBERED_EXPERTS = 32
# With more experts, the matrix of a layer is an image.
MAX_EXPERTS_IN_TABLE = 12
NUM_PAIRS = 5
SIDE = 156  # of images, in pixels
MAX_SHOWN_TEXT = 1500
FOLDER = Path(__file__).parent


def render(report: RoutingReport) -> str:
    """
    Renders a routing report.

    Args:
        report ([`RoutingReport`]):
            The report.

    Returns:
        `str`: The HTML page. Its content security policy allows no script except its own, and no network access.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = Markup((FOLDER / "page.js").read_text(encoding="utf-8"))
    return environment.get_template("page.html.jinja").render(
        report=report,
        version=__version__,
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        facts=facts_of(report),
        charts=charts_of(report),
        chart_legend=Markup(legend(report.seen_modalities)),
        loads=[load_table(report, modality) for modality in report.seen_modalities],
        alarms=list(report.statistics.alarms().values()),
        load_key=gradient(LOAD_STOPS, LOAD_SCALE),
        share_key=gradient(SHARE_STOPS, SHARE_SCALE),
        pairs=pairs_of(report),
        layers=[layer.number for layer in report.layout.layers],
        examples=[example_of(report, example) for example in report.examples],
        expert_legend=expert_legend(report),
        unusual=[unusual_of(report, modality) for modality in report.seen_modalities],
        percent=percent,
    )


def percent(share: float) -> str:
    """Formats a share as a percentage with one decimal, such as `4.1 %`."""
    return f"{100 * share:.1f} %"


def facts_of(report: RoutingReport) -> list[tuple[str, str]]:
    """Returns the facts at the top of the page, by name."""
    active = ", ".join(f"{short(number)} per {modality} token" for modality, number in report.size.active.items())
    tokens = zip(report.layout.modalities, report.counts.tokens.tolist())
    numbers = [layer.number for layer in report.layout.layers]
    by_group = {
        name: sorted(
            {group.num_experts for layer in report.layout.layers for group in layer.groups if group.name == name}
        )
        for name in report.layout.group_names
    }
    experts = "; ".join(f"{name}: {' or '.join(map(str, sizes))}" for name, sizes in by_group.items())
    chosen = sorted(set(report.experts_per_token))
    return [
        ("Model", f"{report.model} ({report.model_class})"),
        ("Parameters", f"{short(report.size.total)} in total"),
        ("Active parameters", active or "not known for this architecture"),
        ("Data", f"{report.data}, {report.num_rows:,} row{'s' * (report.num_rows != 1)}"),
        ("Tokens", ", ".join(f"{number:,} {modality}" for modality, number in tokens)),
        (
            "Sparse layers",
            f"{len(numbers)} ({', '.join(map(str, numbers))})"
            if len(numbers) <= 12
            else f"{len(numbers)} (from {numbers[0]} to {numbers[-1]})",
        ),
        ("Routed experts per layer", experts),
        ("Experts per token", " or ".join(map(str, chosen)) if len(chosen) <= 2 else f"up to {chosen[-1]}"),
    ]


def charts_of(report: RoutingReport) -> list[dict[str, Any]]:
    """Returns the line charts of the violation and the entropy by layer."""
    layers = [layer.number for layer in report.layout.layers]

    def by_layer(figure: Any) -> dict[str, list[float]]:
        return {
            modality: [_mean([figure(row) for row in _rows_of(report, layer, modality)]) for layer in layers]
            for modality in report.seen_modalities
        }

    violation = by_layer(lambda row: row.max_violation)
    entropy = by_layer(relative_entropy)
    return [
        {"title": "Max violation by layer", "svg": Markup(line_chart(layers, violation, "max violation"))},
        {
            "title": "Router entropy by layer (1: uniform)",
            "svg": Markup(line_chart(layers, entropy, "router entropy", highest=1.0)),
        },
    ]


def relative_entropy(row: GroupRouting) -> float:
    """Returns the entropy of the router relative to that of a uniform distribution; NaN for a single expert."""
    return row.entropy / math.log(len(row.wanted)) if len(row.wanted) > 1 else math.nan


def _rows_of(report: RoutingReport, layer: int, modality: str) -> list[GroupRouting]:
    place = f"layer_{layer}"
    return [row for row in report.statistics.rows if (row.place, row.modality) == (place, modality)]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def load_table(report: RoutingReport, modality: str) -> dict[str, Any]:
    """
    Returns the heat maps of the load of a modality: one table for each group that serves it, with one row per layer.
    """
    tables = []
    for group in report.layout.group_names:
        rows = [row for row in report.statistics.rows if (row.group, row.modality) == (group, modality)]
        if rows:
            width = max(len(row.wanted) for row in rows)
            tables.append(
                {
                    "group": group,
                    "width": width,
                    "numbered": width <= MAX_NUMBERED_EXPERTS,
                    "rows": [_load_row(row, width) for row in rows],
                }
            )
    return {"modality": modality, "tables": tables}


def _load_row(row: GroupRouting, width: int) -> dict[str, Any]:
    size = len(row.wanted)
    cells = [
        {
            "text": f"{share * size:.2f}",
            "style": cell_style(share * size, LOAD_STOPS, LOAD_SCALE),
            "title": f"expert {expert}: {count:,} choices, {percent(share)}",
            "dead": count == 0,
        }
        for expert, (share, count) in enumerate(zip(row.load, row.wanted, strict=True))
    ]
    return {
        "layer": row.place.removeprefix("layer_"),
        "cells": cells,
        "missing": width - size,
        "figures": [
            _number(row.max_violation),
            _number(relative_entropy(row)),
            f"{row.effective_experts:.1f}",
            str(row.dead_experts),
            percent(row.dropped_share),
        ],
    }


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def pairs_of(report: RoutingReport) -> list[dict[str, Any]]:
    """Returns, for each layer, the matrix of experts that tokens chose together, and the most frequent pairs."""
    found = []
    for layer, counts, most in zip(report.layout.layers, report.coactivation, report.experts_per_token, strict=True):
        shares = pair_shares(counts)
        names = [layer.group_of(expert) for expert in range(layer.num_experts)]
        labels = [str(expert) if len(layer.groups) == 1 else f"{group} {expert}" for group, expert in names]
        is_table = layer.num_experts <= MAX_EXPERTS_IN_TABLE
        found.append(
            {
                "layer": layer.number,
                "single": most <= 1,
                "labels": labels,
                "rows": _pair_rows(labels, counts, shares) if is_table else None,
                "image": None if is_table else _pair_image(shares),
                "top": [
                    [f"{labels[i]} + {labels[j]}", f"{both:,}", percent(share), f"{ratio:.2f} ×"]
                    for i, j, both, share, ratio in top_pairs(counts, NUM_PAIRS)
                ],
            }
        )
    return found


def pair_shares(counts: torch.Tensor) -> np.ndarray:
    """
    Returns, for each pair of experts, the share of the tokens of the first that also chose the second, `(E, E)`. The
    diagonal and rows without tokens are NaN.
    """
    pairs = counts.numpy().astype(float)
    tokens = pairs.diagonal()[:, None].copy()
    np.fill_diagonal(pairs, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(tokens > 0, pairs / tokens, np.nan)


def top_pairs(counts: torch.Tensor, number: int) -> list[tuple[int, int, int, float, float]]:
    """
    Returns the pairs of experts that most tokens chose together.

    Args:
        counts (`torch.Tensor` of shape `(E, E)`):
            Number of tokens that chose both experts; the diagonal is the number of tokens of each expert.
        number (`int`):
            How many pairs to return.

    Returns:
        `list[tuple[int, int, int, float, float]]`: The two experts, the number of tokens that chose both, its share in
        the tokens that chose at least one of the two, and its ratio to the mean over all pairs. In descending order of
        the number of tokens; pairs without tokens are left out.
    """
    size = len(counts)
    upper = torch.triu(counts, diagonal=1)
    mean = float(upper.sum()) / max(size * (size - 1) / 2, 1)
    found = []
    for cell in upper.flatten().argsort(descending=True, stable=True)[:number].tolist():
        i, j = divmod(cell, size)
        both = int(upper[i, j])
        if both:
            either = int(counts[i, i] + counts[j, j]) - both
            found.append((i, j, both, both / either, both / mean))
    return found


def _pair_rows(labels: Sequence[str], counts: torch.Tensor, shares: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for i, label in enumerate(labels):
        cells = [
            {
                "text": "" if math.isnan(share) else f"{100 * share:.0f}",
                "style": cell_style(share, SHARE_STOPS, SHARE_SCALE),
                "title": f"{label} and {labels[j]}: {int(counts[i, j]):,} tokens",
            }
            for j, share in enumerate(shares[i].tolist())
        ]
        rows.append({"label": label, "cells": cells})
    return rows


def _pair_image(shares: np.ndarray) -> str:
    """Returns the matrix as an image with one pixel per pair, whose diagonal is transparent."""
    known = ~np.isnan(shares)
    colours = scale(np.nan_to_num(shares), SHARE_STOPS, SHARE_SCALE)
    return data_uri(Image.fromarray(np.dstack([colours, (255 * known).astype("u1")])), "PNG")


def data_uri(image: Image.Image, format: str = "WEBP") -> str:
    """Returns an image as a data URI."""
    buffer = BytesIO()
    image.save(buffer, format, **({"quality": 88} if format == "WEBP" else {}))
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def thumbnail(image: Image.Image, side: int = SIDE) -> dict[str, Any]:
    """Returns an image that fits into a square, with its size."""
    small = fit(image, side)
    return {"uri": data_uri(small), "width": small.width, "height": small.height}


def shown(row: ShownRow) -> dict[str, Any]:
    """Returns the name, texts and thumbnails of a row. Long texts are cut, which the page says."""
    messages = [
        {"role": role, "text": text[:MAX_SHOWN_TEXT], "more": max(0, len(text) - MAX_SHOWN_TEXT)}
        for role, text in row.messages
    ]
    return {"name": row.name, "messages": messages, "images": [thumbnail(image) for image in row.images]}


def example_of(report: RoutingReport, example: Example) -> dict[str, Any]:
    """Returns a row with the drawings of its experts by layer, α by word and the attention to its images."""
    answer, images = example.answer, example.row.images
    names = report.layout.group_names
    grids = [
        [
            data_uri(expert_grid(fit(image, SIDE), experts[number], grid_colours(names, groups)))
            for number, groups in enumerate(answer.groups)
        ]
        for image, experts in zip(images, answer.experts)
    ]
    # All images of a row have the same scale, so that they can be compared.
    highest = max((float(cells.max()) for cells in answer.heat), default=0.0)
    heat = [draw_heat(image, cells, highest, side=SIDE) for image, cells in zip(images, answer.heat)]
    alpha = alpha_html(answer.words, answer.alpha, answer.count_free_alpha) if answer.alpha else ""
    return {
        "row": shown(example.row),
        "text": answer.text,
        "layers": [layer.number for layer in report.layout.layers],
        "grids": grids,
        "grids_note": answer.experts_note,
        "alpha": Markup(alpha),
        "alpha_note": answer.alpha_note,
        "heat": [data_uri(drawing) for drawing in heat],
        "heat_note": answer.heat_note,
    }


def grid_colours(names: Sequence[str], groups: Sequence[tuple[str, int]]) -> list[tuple[tuple[int, int, int], str]]:
    """
    Returns the colour and the number within the group of all experts of a layer. With several groups, each has its own
    hue. In a single group, each expert has its own.

    Args:
        names (`Sequence[str]`):
            Names of all groups of the model.
        groups (`Sequence[tuple[str, int]]`):
            Name and number of experts of the groups of the layer.
    """
    if len(names) > 1:
        return [
            (expert_colour(names.index(name), expert, size), str(expert))
            for name, size in groups
            for expert in range(size)
        ]
    return [(_own_hue(expert, size), str(expert)) for _, size in groups for expert in range(size)]


def _own_hue(expert: int, size: int) -> tuple[int, int, int]:
    """Returns a colour whose hue differs from those of the other experts. Neighbours also differ in lightness."""
    red, green, blue = colorsys.hls_to_rgb((0.58 + expert / size) % 1.0, (0.45, 0.6)[expert % 2], 0.55)
    return round(255 * red), round(255 * green), round(255 * blue)


def expert_legend(report: RoutingReport) -> list[dict[str, Any]]:
    """Returns the colours of the experts by group."""
    names, legends = report.layout.group_names, []
    for name in names:
        size = max(group.num_experts for layer in report.layout.layers for group in layer.groups if group.name == name)
        colours = ["rgb({},{},{})".format(*colour) for colour, _ in grid_colours(names, [(name, size)])]
        legends.append({"name": name, "colours": colours})
    return legends


def unusual_of(report: RoutingReport, modality: str) -> dict[str, Any]:
    """Returns the rows of a modality whose routing differs most, and the divergence of a typical row."""
    values = report.divergences[:, report.layout.modalities.index(modality)]
    several = len(report.layout.group_names) > 1
    rows = [
        {
            "row": shown(unusual.row),
            "divergence": f"{unusual.divergence:.3f}",
            "tokens": f"{unusual.num_tokens:,}",
            "differences": [
                {
                    "layer": item.layer,
                    "expert": f"{item.group} {item.expert}" if several else str(item.expert),
                    "share": item.share,
                    "mean": item.mean,
                }
                for item in unusual.differences
            ],
        }
        for unusual in report.unusual
        if unusual.modality == modality
    ]
    return {"modality": modality, "rows": rows, "median": f"{float(np.nanmedian(values)):.3f}"}
