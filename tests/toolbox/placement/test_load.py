"""The load of experts modules: exact shares, and errors for invalid routing."""

import json
import math

import pytest
import torch
from transformers import Qwen3MoeConfig

from modeling_sparse_moe_vlm.toolbox.placement import plan_expert_placement
from modeling_sparse_moe_vlm.toolbox.placement.load import expert_counts, expert_loads
from tests.support.models import make_config

TEXT = make_config(num_experts=4, expert_groups="isolated").text_config
LAYERS = [f"language_model.layers.{layer}.mlp.experts" for layer in range(2)]
SIZES = {f"{layer}.{group}": 2 for layer in LAYERS for group in ("text", "image")}
NAN = math.nan
# As `expert_load` returns it: NaN if an expert does not serve the modality.
MEASURED = {
    "text": [[0.75, 0.25, NAN, NAN], [0.5, 0.5, NAN, NAN]],
    "image": [[NAN, NAN, 1.0, 0.0], [NAN, NAN, 0.5, 1.5]],
}
ROWS = [
    {"place": f"layer_{layer}", "group": group, "modality": group, "wanted": wanted}
    for layer, group, wanted in (
        (0, "text", [3, 1]),
        (0, "image", [4, 0]),
        (1, "text", [2, 2]),
        (1, "image", [2, 6]),
    )
]


def test_gaps_in_measured_routing_have_no_load():
    counts = expert_counts(SIZES, TEXT, MEASURED)
    assert counts == {
        f"{LAYERS[0]}.text": {"text": [0.75, 0.25], "image": [0.0, 0.0]},
        f"{LAYERS[0]}.image": {"text": [0.0, 0.0], "image": [1.0, 0.0]},
        f"{LAYERS[1]}.text": {"text": [0.5, 0.5], "image": [0.0, 0.0]},
        f"{LAYERS[1]}.image": {"text": [0.0, 0.0], "image": [0.5, 1.5]},
    }
    assert expert_loads(SIZES, TEXT, json.loads(json.dumps(MEASURED))) == {
        f"{LAYERS[0]}.text": {"text": 0.5, "image": 0.0},
        f"{LAYERS[0]}.image": {"text": 0.0, "image": pytest.approx(1 / 3)},
        f"{LAYERS[1]}.text": {"text": 0.5, "image": 0.0},
        f"{LAYERS[1]}.image": {"text": 0.0, "image": pytest.approx(2 / 3)},
    }


def test_rows():
    assert expert_counts(SIZES, TEXT, {"rows": ROWS}) == {
        f"{LAYERS[0]}.text": {"text": [3.0, 1.0]},
        f"{LAYERS[0]}.image": {"image": [4.0, 0.0]},
        f"{LAYERS[1]}.text": {"text": [2.0, 2.0]},
        f"{LAYERS[1]}.image": {"image": [2.0, 6.0]},
    }


def test_without_routing_all_experts_of_a_layer_have_the_same_load():
    sizes = {f"{LAYERS[0]}.text": 2, f"{LAYERS[0]}.image": 6, f"{LAYERS[1]}.text": 1}
    assert expert_loads(sizes, TEXT) == {
        f"{LAYERS[0]}.text": {"all": 0.125},
        f"{LAYERS[0]}.image": {"all": 0.375},
        f"{LAYERS[1]}.text": {"all": 0.5},
    }


def test_shards_and_pools():
    config = make_config(num_hidden_layers=3, expert_pool=[4, None, 4], expert_groups="joint").text_config
    sizes = {"expert_pools.4.shards.0": 3, "expert_pools.4.shards.1": 1, "layers.1.mlp.experts": 4}
    table = [[1, 2, 3, 4], [5, 6, 7, 8], [10, 20, 30, 40]]
    assert expert_counts(sizes, config, {"text": table}) == {
        "expert_pools.4.shards.0": {"text": [11.0, 22.0, 33.0]},
        "expert_pools.4.shards.1": {"text": [44.0]},
        "layers.1.mlp.experts": {"text": [5.0, 6.0, 7.0, 8.0]},
    }


def test_a_modality_without_choices_is_left_out():
    loads = expert_loads(SIZES, TEXT, {"text": [[1, 0, 0, 0], [1, 0, 0, 0]], "image": [[0] * 4] * 2})
    assert loads[f"{LAYERS[0]}.text"] == {"text": 0.5}


def with_count(count) -> dict:
    return {"text": [[1.0] * 4, [1.0, 1.0, count, 1.0]], "image": [[1.0] * 4] * 2}


@pytest.mark.parametrize("count", [-3, -0.5, math.inf, -math.inf, "many", None, True])
@pytest.mark.parametrize("form", ["table", "rows", "one table"])
def test_invalid_counts_are_refused(count, form):
    if form == "rows":
        rows = [*ROWS[:-1], ROWS[-1] | {"wanted": [2, count]}]
        routing, message = {"rows": rows}, f"has {count!r} for 'image' and expert 1 of 'layer_1': "
    elif form == "one table":
        routing, message = with_count(count)["text"], f"has {count!r} for 'all' and expert 2 of '{LAYERS[1]}': "
    else:
        routing, message = with_count(count), f"has {count!r} for 'text' and expert 2 of '{LAYERS[1]}': "
    with pytest.raises(ValueError, match="finite numbers of at least 0") as error:
        expert_loads(SIZES, TEXT, routing)
    assert message in str(error.value)


@pytest.mark.parametrize("count", [-3.0, math.inf])
def test_invalid_counts_in_tensors_are_refused(count):
    routing = {modality: torch.tensor(table) for modality, table in with_count(count).items()}
    with pytest.raises(ValueError, match=f"has {count!r} for 'text' and expert 2 of '{LAYERS[1]}': "):
        expert_loads(SIZES, TEXT, routing)


def test_an_unknown_modality():
    with pytest.raises(ValueError, match=r"the modality 'pictures', .*: \['text', 'image'\]"):
        expert_loads(SIZES, TEXT, {"text": [[1] * 4] * 2, "pictures": [[1] * 4] * 2})
    with pytest.raises(ValueError, match=r"the modality 'pictures', .*: \['text', 'image'\]"):
        expert_loads(SIZES, TEXT, {"rows": [*ROWS[:-1], ROWS[-1] | {"modality": "pictures"}]})
    # Other models do not name their modalities.
    config = Qwen3MoeConfig(num_hidden_layers=1, num_experts=2)
    loads = expert_loads({"model.layers.0.mlp.experts": 2}, config, {"pictures": [[1, 3]]})
    assert loads == {"model.layers.0.mlp.experts": {"pictures": 1.0}}


@pytest.mark.parametrize("routing", [{}, {"text": [[0] * 4] * 2}, [[0.0] * 4] * 2, {"image": [[NAN] * 4] * 2}])
def test_routing_without_choices_is_refused(routing):
    with pytest.raises(ValueError, match="`routing` is empty: no token chose any expert"):
        expert_loads(SIZES, TEXT, routing)
    with pytest.raises(ValueError, match="`routing` is empty"):
        plan_expert_placement(make_config(num_experts=4, expert_groups="isolated"), {0: "1GB"}, routing)


def test_rows_that_do_not_fit():
    for rows, message in (
        (ROWS[:-1], "has no row for 'layer_1' with group 'image'"),
        ([*ROWS, ROWS[0]], "has 'layer_0' with group 'text' twice for 'text'"),
        ([*ROWS[:-1], ROWS[-1] | {"wanted": [1]}], "has 1 experts for 'layer_1', unlike the model"),
        ([*ROWS, ROWS[0] | {"group": "sounds"}], "has 'layer_0' with group 'sounds', which the model does not have"),
        ([], "has no row for 'layer_0' with group 'text'"),
    ):
        with pytest.raises(ValueError, match=message):
            expert_loads(SIZES, TEXT, {"rows": rows})


def test_tables_that_do_not_fit():
    for table, message in (
        ([[1] * 4], "has 1 layers for 'text', but the model has 2 with experts"),
        ([[1] * 4, [1] * 3], f"has 3 experts for '{LAYERS[1]}', which has 4"),
        ([[1] * 4, [1] * 5], f"has 5 experts for '{LAYERS[1]}', which has 4"),
        ([1, 1], "counts by layer and expert"),
    ):
        with pytest.raises(ValueError, match=message):
            expert_loads(SIZES, TEXT, {"text": table})
    # Layers with fewer experts than others are padded.
    assert expert_loads(SIZES, TEXT, {"text": [[1, 0, 0, 1, 0], [1, 0, 0, 1, NAN]]})[f"{LAYERS[0]}.text"] == {
        "text": 0.25
    }
