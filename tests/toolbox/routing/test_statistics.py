"""Routing statistics: the figures, the alarm, and the load of the experts in every arrangement."""

import math

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.routing import RoutingCounts, measure_routing
from modeling_sparse_moe_vlm.toolbox.routing.statistics import (
    FIGURES,
    GroupRouting,
    expert_load,
    routing_statistics,
)
from tests.support.models import make_config, make_inputs, make_model

BY_LAYER = [
    {"name": "text", "num_experts": 3, "modalities": ["text"], "layers": [0]},
    {"name": "image", "num_experts": 2, "modalities": ["image"], "layers": [0]},
    {"name": "joint", "num_experts": 3, "layers": [1]},
]


def make_row(wanted, dropped=None, num_tokens=None, entropy=1.0) -> GroupRouting:
    dropped = [0] * len(wanted) if dropped is None else dropped
    num_tokens = sum(wanted) if num_tokens is None else num_tokens
    return GroupRouting("layer_0", "joint", "image", num_tokens, tuple(wanted), tuple(dropped), entropy)


def make_counts(wanted, num_tokens, dropped=None, num_groups=1) -> RoutingCounts:
    """Returns counts `(layers, modalities, experts)`, with an entropy of 1 everywhere."""
    wanted, num_tokens = torch.tensor(wanted), torch.tensor(num_tokens)
    dropped = torch.zeros_like(wanted) if dropped is None else torch.tensor(dropped)
    entropy = num_tokens.float()[None, :, None].expand(len(wanted), -1, num_groups)
    return RoutingCounts(num_tokens, wanted, dropped, entropy)


# ---------------------------------------------------------------- the figures


def test_figures_of_a_row():
    row = make_row([6, 2, 0, 0], dropped=[3, 0, 0, 0], num_tokens=4)
    assert row.load == [0.75, 0.25, 0.0, 0.0]
    assert row.figures() == {
        "max_violation": pytest.approx(0.75 / 0.25 - 1),  # (max load - mean load) / mean load
        "entropy": 1.0,
        "effective_experts": pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))),
        "dead_experts": 2,
        "dropped_share": 3 / 8,
        "experts_per_token": 5 / 4,
    }


@pytest.mark.parametrize("number", [1, 4, 64])
def test_balanced_and_concentrated_load(number):
    even, single = make_row([10] * number), make_row([10 * number] + [0] * (number - 1))
    assert even.max_violation == pytest.approx(0.0)
    assert even.effective_experts == pytest.approx(number)
    assert single.max_violation == pytest.approx(number - 1)
    assert single.effective_experts == pytest.approx(1.0)
    assert single.dead_experts == number - 1


def test_rows_without_tokens_or_choices():
    absent, avoided = make_row([0, 0], num_tokens=0, entropy=math.nan), make_row([0, 0], num_tokens=50)
    assert math.isnan(absent.max_violation)
    assert math.isnan(absent.experts_per_token)
    assert absent.dead_experts == 0
    assert avoided.dead_experts == 2
    assert avoided.experts_per_token == 0
    assert not absent.is_collapsed
    assert not avoided.is_collapsed


@pytest.mark.parametrize(
    ("wanted", "num_tokens", "collapsed"),
    [
        ([100, 100, 100, 100], 400, False),
        ([100, 100, 0, 0], 200, False),  # half of the experts: unbalanced, but not a collapse
        ([385, 5, 5, 5], 400, True),
        ([200, 200, 0, 0], 200, True),  # two experts per token, always the same ones
        ([200, 100, 50, 50], 200, False),
        ([200, 200], 200, False),  # every token goes to all experts, so there is no choice
        ([31, 0, 0, 0], 31, False),  # too few tokens to judge
        ([32, 0, 0, 0], 32, True),
        ([0, 0, 0, 0], 0, False),
        ([20, 20, 0, 0, 0], 40, False),  # exactly a quarter of the experts beyond the first
        ([21, 19, 0, 0, 0], 40, True),  # less than a quarter
        ([40, 40, 39, 1, 0, 0], 60, False),  # the same beyond the two experts of a token
        ([42, 40, 38, 0, 0, 0], 60, True),
        ([20, 19, 0, 0, 0], 39, False),  # one choice too few to judge
    ],
)
def test_collapsed_routing(wanted, num_tokens, collapsed):
    assert make_row(wanted, num_tokens=num_tokens).is_collapsed == collapsed


# ---------------------------------------------------------------- by layer, group and modality


def test_a_row_for_every_group_that_serves_a_modality():
    config = make_config(expert_groups=BY_LAYER, num_experts=None).text_config
    counts = make_counts([[[1, 2, 3, 0, 0], [0, 0, 0, 4, 5]], [[6, 5, 4, 0, 0], [1, 1, 2, 0, 0]]], [3, 2], None, 3)
    rows = {(row.place, row.group, row.modality): row for row in routing_statistics(config, counts).rows}
    assert {place: row.wanted for place, row in rows.items()} == {
        ("layer_0", "text", "text"): (1, 2, 3),
        ("layer_0", "image", "image"): (4, 5),
        ("layer_1", "joint", "text"): (6, 5, 4),
        ("layer_1", "joint", "image"): (1, 1, 2),
    }
    assert all(row.entropy == 1.0 for row in rows.values())
    assert rows["layer_0", "image", "image"].num_tokens == 2


def test_layers_of_a_pool_are_one_place():
    config = make_config(expert_groups="joint", num_hidden_layers=3, expert_pool=[5, None, 5]).text_config
    wanted = [[[4, 0, 0, 0], [0] * 4], [[1, 1, 1, 1], [0] * 4], [[0, 0, 4, 0], [0] * 4]]
    rows = [row for row in routing_statistics(config, make_counts(wanted, [2, 0])).rows if row.modality == "text"]
    assert [(row.place, row.wanted, row.num_tokens) for row in rows] == [
        ("pool_5", (4, 0, 4, 0), 4),
        ("layer_1", (1, 1, 1, 1), 2),
    ]


def test_metrics_and_summary():
    config = make_config(expert_groups="joint").text_config
    counts = make_counts(
        [[[4, 0, 0, 0], [0] * 4], [[1, 1, 1, 1], [0] * 4]], [2, 0], [[[2, 0, 0, 0], [0] * 4], [[0] * 4] * 2]
    )
    statistics = routing_statistics(config, counts)
    metrics = statistics.metrics()
    assert set(metrics) == {f"layer_{layer}/joint/text/{figure}" for layer in (0, 1) for figure in FIGURES}
    assert metrics["layer_0/joint/text/max_violation"] == 3.0
    assert metrics["layer_1/joint/text/max_violation"] == 0.0
    assert statistics.summary() == {
        "joint/text/max_violation": 3.0,  # the worst layer
        "joint/text/entropy": 1.0,
        "joint/text/effective_experts": 1.0,  # the worst layer
        "joint/text/dead_experts": 3,  # in total
        "joint/text/dropped_share": 0.25,
        "joint/text/experts_per_token": 1.5,
    }


def test_table_has_a_line_per_row():
    model = make_model(expert_groups=BY_LAYER, num_experts=None)
    statistics = routing_statistics(model.config.text_config, measure_routing(model, [make_inputs()]))
    title, *lines = str(statistics).splitlines()
    assert title.split() == ["place", "group", "modality", "tokens", *FIGURES]
    assert [line.split()[:4] for line in lines] == [
        ["layer_0", "text", "text", "20"],
        ["layer_0", "image", "image", "8"],
        ["layer_1", "joint", "text", "20"],
        ["layer_1", "joint", "image", "8"],
    ]


# ---------------------------------------------------------------- the alarm


def test_alarm_if_one_modality_collapses_while_the_total_looks_balanced():
    """A quarter of the tokens are image tokens, all on expert 0, which no text uses. The total is balanced."""
    config = make_config(expert_groups="joint", num_experts_per_tok=1, norm_topk_prob=False).text_config
    collapsed, fine = [[0, 50, 50, 50], [50, 0, 0, 0]], [[40, 40, 35, 35], [12, 12, 13, 13]]
    total = make_row([sum(column) for column in zip(*collapsed, strict=True)])
    assert total.max_violation == 0
    assert total.effective_experts == pytest.approx(4.0)
    alarms = routing_statistics(config, make_counts([fine, collapsed], [150, 50])).alarms()
    assert list(alarms) == [("layer_1", "joint", "image")]
    (message,) = alarms.values()
    assert (
        "layer 1, group 'joint', image tokens use effectively 1.0 of 4 experts (max violation 3.00, 3 dead)" in message
    )
    assert "all modalities together use 4.0 (max violation 0.00)" in message
    assert "router_bias_update_rate" in message
    assert routing_statistics(config, make_counts([fine, fine], [150, 50])).alarms() == {}


def test_alarm_names_a_pool():
    config = make_config(expert_groups="joint", expert_pool=[0, 0]).text_config
    used_by_turns = [[[50, 50, 0, 0], [0] * 4], [[0, 0, 50, 50], [0] * 4]]
    assert routing_statistics(config, make_counts(used_by_turns, [50, 0])).alarms() == {}
    config.expert_pool = None
    assert len(routing_statistics(config, make_counts(used_by_turns, [50, 0])).alarms()) == 2
    config.expert_pool = [0, 0]
    alarms = routing_statistics(config, make_counts([used_by_turns[0]] * 2, [50, 0])).alarms()
    assert list(alarms) == [("pool_0", "joint", "text")]
    assert "in pool 0" in alarms["pool_0", "joint", "text"]


# ---------------------------------------------------------------- the load of the experts


def test_every_choice_is_counted_once(arrangement):
    model, inputs = make_model(expert_groups=arrangement), make_inputs()
    load = expert_load(model, [inputs, make_inputs(seed=1)])
    assert set(load) == {"text", "image"}
    for shares in load.values():
        assert shares.shape == (2, 4)
        torch.testing.assert_close(shares.nansum(dim=1), torch.ones(2))


def test_shares_of_the_chosen_experts():
    model, inputs = make_model(), make_inputs(batch_size=1)
    logits = model(**inputs, output_router_logits=True).router_logits
    is_image = inputs["mm_token_type_ids"].flatten() == 1
    for layer, shares in enumerate(expert_load(model, [inputs])["image"]):
        chosen = logits[layer][is_image].topk(2).indices.flatten()
        torch.testing.assert_close(shares, torch.bincount(chosen, minlength=4) / len(chosen))


def test_layers_with_other_experts_leave_gaps():
    model = make_model(expert_groups=BY_LAYER, num_experts=None)
    load = expert_load(model, [make_inputs()])
    gaps = {modality: shares.isnan().int().tolist() for modality, shares in load.items()}
    assert gaps == {"text": [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]], "image": [[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]}
    for shares in load.values():
        torch.testing.assert_close(shares.nansum(dim=1), torch.ones(2))


def test_no_load_for_dense_models():
    assert expert_load(make_model(mlp_only_layers=[0, 1]), [make_inputs()]) == {}


def test_no_share_for_modalities_without_tokens():
    load = expert_load(make_model(), [make_inputs(images_per_row=0)])
    assert load["image"].tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize(
    "missing", [["attention_mask"], ["mm_token_type_ids"], ["attention_mask", "mm_token_type_ids"]]
)
def test_optional_inputs(missing):
    model, inputs = make_model(), make_inputs()
    whole = expert_load(model, [inputs])
    load = expert_load(model, [{name: value for name, value in inputs.items() if name not in missing}])
    for modality, shares in whole.items():
        torch.testing.assert_close(load[modality], shares)


def test_padding_and_labels_are_ignored():
    model, inputs = make_model(), make_inputs()
    padded = {
        name: value if name == "pixel_values" else torch.nn.functional.pad(value, (0, 5))
        for name, value in inputs.items()
    }
    padded["labels"] = padded["input_ids"]
    for modality, shares in expert_load(model, [inputs]).items():
        torch.testing.assert_close(expert_load(model, [padded])[modality], shares)
