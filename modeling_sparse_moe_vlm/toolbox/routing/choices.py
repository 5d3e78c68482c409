"""Counts which experts tokens choose: by row, in pairs, and how much rows differ."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from .layout import RoutingLayout

# Rows that are read from the temporary file at a time.
CHUNK = 256


def choices_by_row(
    layout: RoutingLayout,
    ids: torch.Tensor,
    is_real: torch.Tensor,
    chosen: Sequence[torch.Tensor],
    num_rows: int,
) -> torch.Tensor:
    """
    Counts the choices of each row by layer, modality and expert.

    Args:
        layout ([`RoutingLayout`]):
            The routed experts of the model: L layers, M modalities and at most E experts.
        ids (`torch.Tensor` of shape `(num_rows * length,)`):
            Modality id of every token.
        is_real (`torch.Tensor` of shape `(num_rows * length,)`):
            `False` for padding, which is not counted.
        chosen (`Sequence[torch.Tensor]`):
            Numbers of the chosen experts, `(num_rows * length, k)` for each layer. Numbers that are not an expert of
            the layer are unused slots, which are not counted.
        num_rows (`int`):
            Number of rows.

    Returns:
        `torch.Tensor` of shape `(num_rows, L, M, E)`, of type int64.
    """
    num_modalities, width = len(layout.modalities), layout.num_experts
    rows = torch.arange(num_rows, device=ids.device).repeat_interleave(len(ids) // num_rows)
    by_layer = []
    for layer, experts in zip(layout.layers, chosen, strict=True):
        experts = experts.to(ids.device)
        column = experts.masked_fill(~is_real[:, None] | (experts >= layer.num_experts), width)
        cell = ((rows * num_modalities + ids)[:, None] * (width + 1) + column).flatten()
        counts = torch.zeros(num_rows * num_modalities * (width + 1), dtype=torch.long, device=ids.device)
        counts = counts.index_add(0, cell, torch.ones_like(cell))
        by_layer.append(counts.view(num_rows, num_modalities, width + 1)[..., :width])
    return torch.stack(by_layer, dim=1)


def coactivation(chosen: torch.Tensor, is_real: torch.Tensor, num_experts: int) -> torch.Tensor:
    """
    Counts the tokens that chose both of two experts.

    Args:
        chosen (`torch.Tensor` of shape `(T, k)`):
            Numbers of the chosen experts; `num_experts` for an unused slot.
        is_real (`torch.Tensor` of shape `(T,)`):
            `False` for padding, which is not counted.
        num_experts (`int`):
            Number of experts E.

    Returns:
        `torch.Tensor` of shape `(E, E)`: Symmetric, of type int64. The diagonal is the number of tokens that chose the
        expert.
    """
    is_chosen = torch.zeros(len(chosen), num_experts + 1, dtype=torch.float64, device=chosen.device)
    is_chosen = is_chosen.scatter(1, chosen.clamp(max=num_experts), 1.0)[is_real.to(chosen.device), :num_experts]
    return (is_chosen.T @ is_chosen).long()


class RowChoices:
    """
    The choices of all rows, in a temporary file, so that memory does not grow with the number of rows.

    Args:
        shape (`tuple[int, int, int]`): Numbers of layers, modalities and experts.
    """

    def __init__(self, shape: tuple[int, int, int]):
        self.shape = shape
        self.num_rows = 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the object)
        self._sum = np.zeros(shape)
        self._num_with_choices = np.zeros(shape[:2])

    def add(self, counts: torch.Tensor) -> None:
        """Adds the choices of the next rows, `(rows, L, M, E)`."""
        array = counts.cpu().numpy()
        self._file.seek(0, 2)
        self._file.write(array.astype(np.int32).tobytes())
        self.num_rows += len(array)
        shares = shares_of(array)
        self._sum += np.nan_to_num(shares).sum(axis=0)
        self._num_with_choices += (~np.isnan(shares[..., 0])).sum(axis=0)

    @property
    def mean(self) -> np.ndarray:
        """
        The mean distribution of the rows over the experts, `(L, M, E)`. Every row that has choices counts equally. NaN
        where no row has any.
        """
        with np.errstate(invalid="ignore"):
            return self._sum / self._num_with_choices[..., None]

    def _chunks(self) -> Iterator[np.ndarray]:
        """Yields the choices of all rows, some rows at a time."""
        size = int(np.prod(self.shape)) * np.dtype(np.int32).itemsize
        self._file.seek(0)
        while block := self._file.read(CHUNK * size):
            yield np.frombuffer(block, np.int32).reshape(-1, *self.shape)

    def divergences(self) -> np.ndarray:
        """
        Returns the divergence of each row from the mean of all rows, `(rows, M)`: the Jensen–Shannon divergence in
        bits, averaged over layers. NaN where the row has no choices of the modality.
        """
        return np.concatenate([_mean_over_layers(shares_of(chunk), self.mean) for chunk in self._chunks()])

    def shares(self, row: int) -> np.ndarray:
        """Returns the distribution of one row over the experts, `(L, M, E)`. NaN where the row has no choices."""
        size = int(np.prod(self.shape)) * np.dtype(np.int32).itemsize
        self._file.seek(row * size)
        return shares_of(np.frombuffer(self._file.read(size), np.int32).reshape(self.shape))


def shares_of(counts: np.ndarray) -> np.ndarray:
    """Divides counts by their sum over the last dimension. NaN where the sum is 0."""
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=-1, keepdims=True)


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """
    Returns the Jensen–Shannon divergence of distributions over the last dimension, in bits: 0 if they are equal, 1 if
    they have no expert in common. NaN where a distribution is NaN.
    """
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(part == 0, 0.0, part * np.log2(part / middle)).sum(axis=-1) for part in (p, q)]
    return np.clip((terms[0] + terms[1]) / 2, 0.0, None)


def _mean_over_layers(shares: np.ndarray, mean: np.ndarray) -> np.ndarray:
    divergences = jensen_shannon(shares, mean)
    known = ~np.isnan(divergences)
    with np.errstate(invalid="ignore"):
        return np.where(known, divergences, 0.0).sum(axis=1) / known.sum(axis=1)
