"""Counts of choices by row and by pair, and divergences, with values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.routing import choices as module
from modeling_sparse_moe_vlm.toolbox.routing.choices import (
    RowChoices,
    choices_by_row,
    coactivation,
    jensen_shannon,
    shares_of,
)
from modeling_sparse_moe_vlm.toolbox.routing.layout import RoutedGroup, RoutedLayer, RoutingLayout

BOTH = ("text", "image")
# Layer 0 has three experts, layer 2 has two.
LAYOUT = RoutingLayout(
    BOTH, (RoutedLayer(0, (RoutedGroup("joint", 3, BOTH),)), RoutedLayer(2, (RoutedGroup("joint", 2, BOTH),)))
)
# Two rows of three tokens. The last token of the second row is padding.
IDS = torch.tensor([0, 1, 1, 0, 0, 1])
IS_REAL = torch.tensor([True, True, True, True, True, False])
CHOSEN = [
    torch.tensor([[0, 1], [1, 2], [2, 1], [0, 2], [0, 3], [1, 0]]),  # 3 is an unused slot
    torch.tensor([[0], [1], [1], [2], [1], [0]]),  # 2 is an unused slot
]


def test_choices_by_row():
    counts = choices_by_row(LAYOUT, IDS, IS_REAL, CHOSEN, 2)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [
        [[[1, 1, 0], [0, 2, 2]], [[1, 0, 0], [0, 2, 0]]],
        [[[2, 0, 1], [0, 0, 0]], [[0, 1, 0], [0, 0, 0]]],
    ]
    together = choices_by_row(LAYOUT, IDS, IS_REAL, CHOSEN, 1)
    assert together.tolist() == [counts.sum(dim=0).tolist()]


def test_coactivation():
    assert coactivation(CHOSEN[0], IS_REAL, 3).tolist() == [[3, 1, 1], [1, 3, 2], [1, 2, 3]]
    assert coactivation(CHOSEN[1], IS_REAL, 2).tolist() == [[1, 0], [0, 3]]
    assert coactivation(CHOSEN[0], ~IS_REAL, 3).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]


def test_jensen_shannon():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.5, 0.0, 0.5])
    assert jensen_shannon(p, p) == 0
    assert jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 1
    assert jensen_shannon(p, q) == pytest.approx(0.5)
    assert jensen_shannon(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(
        0.5 * math.log2(1 / 0.75) + 0.5 * (0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25))
    )
    values = jensen_shannon(np.stack([p, p, np.full(3, np.nan)]), np.stack([p, q, q]))
    assert values[0] == 0
    assert values[1] == pytest.approx(0.5)
    assert np.isnan(values[2])


def test_shares():
    shares = shares_of(np.array([[1, 3], [0, 0]]))
    assert shares[0].tolist() == [0.25, 0.75]
    assert np.isnan(shares[1]).all()


@pytest.mark.parametrize("chunk", [1, 2, 256])
def test_rows(monkeypatch, chunk):
    """Rows are compared with the mean of all rows, in which each row counts equally."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    counts = torch.tensor(
        [  # rows, layers, modalities, experts
            [[[4, 0], [0, 0]], [[1, 1], [0, 0]]],
            [[[0, 1], [2, 0]], [[1, 1], [1, 1]]],
            [[[2, 0], [0, 6]], [[1, 1], [0, 0]]],
        ]
    )
    rows = RowChoices((2, 2, 2))
    rows.add(counts[:2])
    rows.add(counts[2:])
    assert rows.num_rows == 3
    np.testing.assert_allclose(rows.mean, [[[2 / 3, 1 / 3], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]])

    mean = np.array([2 / 3, 1 / 3])
    first = float(jensen_shannon(np.array([1.0, 0.0]), mean))
    second = float(jensen_shannon(np.array([0.0, 1.0]), mean))
    one_expert = float(jensen_shannon(np.array([1.0, 0.0]), np.array([0.5, 0.5])))
    assert second > first > 0
    # Layers without choices of the modality are left out of the mean over layers.
    expected = [[first / 2, np.nan], [second / 2, one_expert / 2], [first / 2, one_expert]]
    np.testing.assert_allclose(rows.divergences(), expected)

    np.testing.assert_array_equal(rows.shares(2)[:, 0], [[1.0, 0.0], [0.5, 0.5]])
    np.testing.assert_array_equal(rows.shares(1)[0], [[0.0, 1.0], [1.0, 0.0]])
    assert np.isnan(rows.shares(0)[:, 1]).all()


def test_a_modality_without_tokens_has_no_mean():
    rows = RowChoices((1, 2, 2))
    rows.add(torch.tensor([[[[1, 0], [0, 0]]]]))
    assert np.isnan(rows.mean[0, 1]).all()
    np.testing.assert_array_equal(rows.divergences(), [[0.0, np.nan]])
