"""The experts of a model by layer, and statistics and loads by layer."""

import math

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.routing import RoutingCounts, measure_routing, routing_statistics
from modeling_sparse_moe_vlm.toolbox.routing.layout import (
    RoutedGroup,
    RoutedLayer,
    RoutingLayout,
    layout_of,
    load_by_modality,
    statistics_by_layer,
)
from modeling_sparse_moe_vlm.toolbox.routing.statistics import load_of_counts
from tests.support.models import make_config, make_inputs, make_model

BOTH = ("text", "image")
TEXT_GROUP, IMAGE_GROUP = RoutedGroup("text", 2, ("text",)), RoutedGroup("image", 3, ("image",))
LAYOUT = RoutingLayout(
    BOTH, (RoutedLayer(1, (TEXT_GROUP, IMAGE_GROUP)), RoutedLayer(4, (RoutedGroup("image", 2, ("image",)),)))
)
COUNTS = RoutingCounts(
    tokens=torch.tensor([10, 4]),
    wanted=torch.tensor([[[7, 3, 0, 0, 0], [0, 0, 1, 0, 3]], [[0, 0, 0, 0, 0], [4, 0, 0, 0, 0]]]),
    dropped=torch.tensor([[[2, 0, 0, 0, 0], [0, 0, 0, 0, 1]], [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]]),
    entropy=torch.tensor([[[5.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 1.0]]]),
)


def test_experts_and_groups():
    first = LAYOUT.layers[0]
    assert (first.num_experts, LAYOUT.num_experts) == (5, 5)
    assert (first.first_of("text"), first.first_of("image")) == (0, 2)
    assert [first.group_of(expert) for expert in range(5)] == [
        ("text", 0), ("text", 1), ("image", 0), ("image", 1), ("image", 2),
    ]  # fmt: skip
    with pytest.raises(IndexError, match="layer 1 has 5 routed experts"):
        first.group_of(5)
    assert LAYOUT.group_names == ["text", "image"]


def test_statistics():
    rows = statistics_by_layer(LAYOUT, COUNTS, ["text", "image"]).rows
    assert [(row.place, row.group, row.modality, row.num_tokens, row.wanted, row.dropped) for row in rows] == [
        ("layer_1", "text", "text", 10, (7, 3), (2, 0)),
        ("layer_1", "image", "image", 4, (1, 0, 3), (0, 0, 1)),
        ("layer_4", "image", "image", 4, (4, 0), (0, 0)),
    ]
    assert [row.entropy for row in rows] == [0.5, 0.5, 0.25]
    without = RoutingCounts(torch.tensor([0, 4]), COUNTS.wanted, COUNTS.dropped, COUNTS.entropy)
    assert math.isnan(statistics_by_layer(LAYOUT, without, ["text", "image"]).rows[0].entropy)


def test_loads():
    loads = load_by_modality(LAYOUT, COUNTS)
    expected = {
        "text": [[0.7, 0.3, math.nan, math.nan, math.nan], [math.nan] * 5],
        "image": [[math.nan, math.nan, 0.25, 0.0, 0.75], [1.0, 0.0, math.nan, math.nan, math.nan]],
    }
    for modality in BOTH:
        torch.testing.assert_close(loads[modality], torch.tensor(expected[modality]), equal_nan=True)


@pytest.mark.parametrize("groups", ["joint", "isolated", "hybrid"])
def test_agrees_with_the_statistics_of_a_model(groups):
    model = make_model(expert_groups=groups, num_hidden_layers=3, mlp_only_layers=[1])
    config = model.config.text_config
    counts = measure_routing(model, [make_inputs()])
    layout = layout_of(config)
    assert [layer.number for layer in layout.layers] == [0, 2]
    assert statistics_by_layer(layout, counts, config.routed_group_names) == routing_statistics(config, counts)
    for modality, load in load_of_counts(config, counts).items():
        torch.testing.assert_close(load_by_modality(layout, counts)[modality], load, equal_nan=True)


def test_layers_of_a_pool_are_separate():
    config = make_config(num_hidden_layers=3, expert_pool=[None, 0, 0]).text_config
    assert [layer.number for layer in layout_of(config).layers] == [0, 1, 2]
