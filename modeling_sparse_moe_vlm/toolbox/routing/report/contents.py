"""What a routing report contains."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from ...app.answers import Answer
from ...model_size import ModelSize
from ..counts import RoutingCounts
from ..layout import RoutingLayout
from ..statistics import RoutingStatistics


@dataclass(frozen=True)
class ShownRow:
    """
    A row of the data that the report shows.

    Args:
        name (`str`): Name of the row, such as `"train.jsonl, row 12"`.
        messages (`list[tuple[str, str]]`): Role and text of each message. Images are left out.
        images (`list[Image.Image]`): Images of the row.
    """

    name: str
    messages: list[tuple[str, str]]
    images: list[Image.Image]


@dataclass(frozen=True)
class Difference:
    """
    An expert that the tokens of a row choose more or less often than in the mean of all rows.

    Args:
        layer (`int`): Number of the layer.
        group (`str`): Name of the group.
        expert (`int`): Number of the expert within the group.
        share (`float`): Share of the expert in the choices of the row in this layer.
        mean (`float`): Mean share over all rows.
    """

    layer: int
    group: str
    expert: int
    share: float
    mean: float


@dataclass(frozen=True)
class UnusualRow:
    """
    A row whose routing differs from the mean of all rows.

    Args:
        row ([`ShownRow`]): The row.
        modality (`str`): Modality whose tokens are compared.
        divergence (`float`): Jensen–Shannon divergence from the mean in bits, averaged over layers.
        num_tokens (`int`): Number of tokens of the modality in the row.
        differences (`list[Difference]`): The largest differences, in descending order of their size.
    """

    row: ShownRow
    modality: str
    divergence: float
    num_tokens: int
    differences: list[Difference]


@dataclass(frozen=True)
class Example:
    """
    A row with the model's answer and the attention and routing behind it.

    Args:
        row ([`ShownRow`]): The row.
        answer ([`~toolbox.app.answers.Answer`]): The answer, with the experts of the image tokens and α by word.
    """

    row: ShownRow
    answer: Answer


@dataclass
class RoutingReport:
    """
    How a model routes the tokens of a dataset. `to_html` returns it as a page.

    Args:
        model (`str`): Name of the model.
        model_class (`str`): Name of the class of the model.
        size ([`~toolbox.model_size.ModelSize`]): Number of parameters.
        data (`str`): Name of the data.
        num_rows (`int`): Number of rows.
        layout ([`RoutingLayout`]): The routed experts of the model.
        counts ([`~toolbox.routing.RoutingCounts`]): Counts of all tokens.
        statistics ([`~toolbox.routing.RoutingStatistics`]): Statistics by layer, group and modality.
        coactivation (`list[torch.Tensor]`):
            For each layer, the number of tokens that chose both of two experts, `(E, E)`.
        experts_per_token (`list[int]`): For each layer, the largest number of experts of a token.
        divergences (`np.ndarray` of shape `(rows, M)`):
            Divergence of every row from the mean of all rows, by modality. NaN without tokens of the modality.
        unusual (`list[UnusualRow]`): The rows with the largest divergences, by modality.
        examples (`list[Example]`): Rows with images, drawn with the experts of their image tokens.
        notes (`list[str]`): What the report does not contain, and why.
    """

    model: str
    model_class: str
    size: ModelSize
    data: str
    num_rows: int
    layout: RoutingLayout
    counts: RoutingCounts
    statistics: RoutingStatistics
    coactivation: list[torch.Tensor]
    experts_per_token: list[int]
    divergences: np.ndarray
    unusual: list[UnusualRow] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def seen_modalities(self) -> list[str]:
        """Modalities with tokens in the data."""
        return [name for name, number in zip(self.layout.modalities, self.counts.tokens.tolist()) if number]

    def to_html(self) -> str:
        """Returns the report as a self-contained HTML page, without references to other files."""
        from .page import render

        return render(self)
