"""Measures what a routing report contains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...data.bad_rows import BadRowError
from ...data.rows import apply_chat_template, row_name, with_images
from ...evaluation_mode import evaluating
from ...expert_modules import base_model_of, experts_of_base
from ...model_size import model_size
from ..choices import RowChoices, choices_by_row, coactivation
from ..counts import RoutingCounts
from ..layout import RoutingLayout, statistics_by_layer
from ..passes import RoutedPass, watch_passes
from .contents import Difference, RoutingReport, UnusualRow
from .examples import Rows, draw_examples, shown_row, spread_evenly

NUM_DIFFERENCES = 4


def routing_report(
    model: PreTrainedModel,
    processor: Any,
    rows: Rows,
    *,
    model_name: str | None = None,
    data_name: str = "rows",
    collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]] | None = None,
    batch_size: int = 16,
    num_examples: int = 4,
    num_unusual: int = 3,
    max_new_tokens: int = 16,
) -> RoutingReport:
    """
    Reports how a model routes the tokens of rows to its experts: load, entropy, experts that are chosen together, the
    experts of image tokens, α, and the rows whose routing differs most from the others.

    It needs one forward pass over all rows, and one short generation for each example. Memory does not grow with the
    number of rows.

    Args:
        model (`PreTrainedModel`):
            A model of this package, an upcycled model or any mixture of experts of Transformers.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            Its processor, or the tokenizer of a language model.
        rows (`Sequence[Mapping]`):
            Rows with `messages` and `images`, as [`~toolbox.data.load_rows`] returns them.
        model_name (`str`, *optional*):
            Name of the model in the report. By default, the name in its configuration.
        data_name (`str`, *optional*, defaults to `"rows"`):
            Name of the data in the report.
        collate (`Callable`, *optional*):
            Makes a batch of rows. By default, applies the chat template of the processor.
        batch_size (`int`, *optional*, defaults to 16):
            Number of rows in a forward pass.
        num_examples (`int`, *optional*, defaults to 4):
            Number of rows with images to draw. They are spread evenly over the data.
        num_unusual (`int`, *optional*, defaults to 3):
            Number of rows to show for each modality whose routing differs most.
        max_new_tokens (`int`, *optional*, defaults to 16):
            Largest number of tokens of the answers for the examples.

    Returns:
        [`RoutingReport`]: The report.

    Raises:
        ValueError: If the model has no routed experts, if there are no rows, or if a row cannot be processed.
    """
    if not len(rows):
        raise ValueError("there are no rows to report on.")
    measured = _Measured()
    handles = watch_passes(model, measured.add)
    try:
        with evaluating(model), torch.no_grad():
            for numbers, batch in _batches(processor, rows, collate, batch_size) if handles else ():
                measured.numbers += numbers
                model(**send_to_device(dict(batch), model.device))
    finally:
        for handle in handles:
            handle.remove()
    layout, choices, counts = measured.layout, measured.choices, measured.counts
    if layout is None or choices is None or counts is None:
        name = model_name or type(model).__name__
        raise ValueError(f"{name} has no routed experts, so there is no routing to report.")
    divergences = choices.divergences()
    base = base_model_of(model)
    report = RoutingReport(
        model=model_name or model.config.name_or_path or type(base).__name__,
        model_class=type(base).__name__,
        size=model_size(base),
        data=data_name,
        num_rows=len(measured.numbers),
        layout=layout,
        counts=counts,
        statistics=statistics_by_layer(layout, counts, measured.group_names),
        coactivation=measured.pairs,
        experts_per_token=measured.experts_per_token,
        divergences=divergences,
    )
    tokens = np.concatenate(measured.tokens)
    for modality_id, modality in enumerate(layout.modalities):
        for position in most_divergent(divergences[:, modality_id], num_unusual):
            number = measured.numbers[position]
            shares, mean = choices.shares(position)[:, modality_id], choices.mean[:, modality_id]
            report.unusual.append(
                UnusualRow(
                    row=shown_row(rows[number], number),
                    modality=modality,
                    divergence=float(divergences[position, modality_id]),
                    num_tokens=int(tokens[position, modality_id]),
                    differences=differences_of(layout, shares, mean, NUM_DIFFERENCES),
                )
            )
    report.notes = _notes(base, report)
    have_images = [measured.numbers[position] for position in np.flatnonzero(tokens[:, 1:].any(axis=1)).tolist()]
    report.examples = draw_examples(model, processor, rows, spread_evenly(have_images, num_examples), max_new_tokens)
    return report


class _Measured:
    """Accumulates the routing of forward passes."""

    def __init__(self) -> None:
        self.numbers: list[int] = []  # of the rows of all passes, the one in progress included
        self.tokens: list[np.ndarray] = []  # number of tokens by row and modality
        self.layout: RoutingLayout | None = None
        self.counts: RoutingCounts | None = None
        self.choices: RowChoices | None = None
        self.pairs: list[torch.Tensor] = []
        self.experts_per_token: list[int] = []
        self.group_names: list[str] = []

    def add(self, routed: RoutedPass) -> None:
        layout, counts = routed.layout, routed.count()
        if self.layout is None or self.choices is None or self.counts is None:
            self.layout, self.group_names = layout, routed.group_names
            shape = (len(layout.layers), len(layout.modalities), layout.num_experts)
            self.counts, self.choices = counts, RowChoices(shape)
            self.pairs = [torch.zeros(layer.num_experts, layer.num_experts).long() for layer in layout.layers]
            self.experts_per_token = [0] * len(layout.layers)
        else:
            self.counts = self.counts + counts
        num_rows = len(self.numbers) - self.choices.num_rows
        chosen = [layer.chosen for layer in routed.layers]
        self.choices.add(choices_by_row(layout, routed.ids, routed.is_real, chosen, num_rows))
        tokens = torch.zeros(num_rows, len(layout.modalities), dtype=torch.long, device=routed.ids.device)
        tokens = tokens.scatter_add(1, routed.ids.view(num_rows, -1), routed.is_real.view(num_rows, -1).long())
        self.tokens.append(tokens.cpu().numpy())
        for number, (layer, experts) in enumerate(zip(layout.layers, chosen)):
            self.pairs[number] += coactivation(experts, routed.is_real, layer.num_experts).cpu()
            used = (experts < layer.num_experts)[routed.is_real.to(experts.device)].sum(dim=1)
            most = int(used.max()) if len(used) else 0
            self.experts_per_token[number] = max(self.experts_per_token[number], most)


def _batches(
    processor: Any,
    rows: Rows,
    collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]] | None,
    batch_size: int,
) -> Iterator[tuple[list[int], Mapping[str, Any]]]:
    """Yields the numbers of the rows of each batch, and the model inputs without labels."""
    for start in tqdm(range(0, len(rows), batch_size), desc="Measuring routing", unit="batch"):
        numbers = range(start, min(start + batch_size, len(rows)))
        read = {number: row for number in numbers if (row := _readable(rows, number)) is not None}
        if not read:
            continue
        if collate is None:
            batch: Mapping[str, Any] = apply_chat_template(
                processor,
                {number: with_images(row, number) for number, row in read.items()},
                padding_side="right",
                names={number: row_name(row, number) for number, row in read.items()},
            )
        else:
            batch = collate(list(read.values()))
        yield list(read), {name: value for name, value in batch.items() if name != "labels"}


def _readable(rows: Rows, number: int) -> Mapping[str, Any] | None:
    """Returns a row, or `None` if it broke after it was validated and bad rows are skipped."""
    try:
        return rows[number]
    except BadRowError as error:
        reader = getattr(rows, "reader", None)
        if reader is None:
            raise
        reader.refuse(error)
        return None


def most_divergent(divergences: np.ndarray, number: int) -> list[int]:
    """
    Returns the positions of the rows with the largest divergences.

    Args:
        divergences (`np.ndarray` of shape `(rows,)`):
            Divergence of each row; NaN for rows that are not compared.
        number (`int`):
            How many rows to return.

    Returns:
        `list[int]`: Positions in descending order of the divergence; among equal ones, the first row comes first. Rows
        that are not compared and rows that do not differ are left out.
    """
    values = np.nan_to_num(divergences)
    return [row for row in np.argsort(-values, kind="stable")[:number].tolist() if values[row] > 0]


def differences_of(layout: RoutingLayout, shares: np.ndarray, mean: np.ndarray, number: int) -> list[Difference]:
    """
    Returns the experts whose share differs most from the mean.

    Args:
        layout ([`RoutingLayout`]):
            The routed experts of the model.
        shares (`np.ndarray` of shape `(L, E)`), mean (`np.ndarray` of shape `(L, E)`):
            Shares of the experts in the choices of a row, and their means over all rows.
        number (`int`):
            How many experts to return.

    Returns:
        `list[Difference]`: The experts, in descending order of the difference.
    """
    sizes = np.nan_to_num(np.abs(shares - mean))
    found = []
    for cell in np.argsort(-sizes, axis=None, kind="stable")[:number].tolist():
        index, expert = divmod(cell, sizes.shape[1])
        if sizes[index, expert] > 0:
            layer = layout.layers[index]
            group, within = layer.group_of(expert)
            found.append(
                Difference(layer.number, group, within, float(shares[index, expert]), float(mean[index, expert]))
            )
    return found


def _notes(model: PreTrainedModel, report: RoutingReport) -> list[str]:
    """Returns what the report does not contain, and why."""
    notes = []
    if missing := [name for name in report.layout.modalities if name not in report.seen_modalities]:
        notes.append(f"The rows have no {' and no '.join(missing)} tokens.")
    if bool(report.counts.entropy.isnan().any()):
        notes.append("The model does not return the logits of all routers, so some entropies are not known.")
    if experts_of_base(model):
        notes.append("Layers that were sparse before the model was upcycled are not shown.")
    return notes
