"""The experts configuration of a request, and errors for requests that cannot start exactly."""

import re

import pytest

from modeling_sparse_moe_vlm.expert_groups import ExpertGroup
from modeling_sparse_moe_vlm.experts_config import SparseMoeVlmExpertsConfig
from modeling_sparse_moe_vlm.toolbox.upcycling.arrangement import Start, dense_carriers, experts_fields
from modeling_sparse_moe_vlm.toolbox.upcycling.errors import UpcyclingError

pytestmark = pytest.mark.newest

BASE = {
    "widths": {0: 48, 1: 48, 3: 48},
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "hidden_act": "gelu",
    "modalities": ("text", "image"),
}
# Layers of two widths.
BY_LAYER = {"widths": {0: 48, 1: 24, 3: 48}}
BOTH = ["text", "image"]


def group(name: str, num_experts: int, width: int, modalities=BOTH, always_on: bool = False, layers=None) -> dict:
    return {
        "name": name,
        "num_experts": num_experts,
        "modalities": list(modalities),
        "intermediate_size": width,
        "always_on": always_on,
        "layers": layers,
    }


# ---------------------------------------------------------------- the configuration of a request


def test_every_field_of_the_default_request():
    start, fields = experts_fields(**BASE)
    assert start == Start("residual", granularity=1, drop_ratio=0.0, pool_start=None)
    assert fields == {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "hidden_act": "gelu",
        "modalities": ["text", "image"],
        "mlp_only_layers": [2],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "expert_groups": [
            group("joint", 8, 48),
            group("text", 1, 48, ["text"], always_on=True),
            group("image", 1, 48, ["image"], always_on=True),
        ],
    }
    assert SparseMoeVlmExpertsConfig(**fields).sparse_layers == [0, 1, 3]


def test_further_fields_are_passed_on():
    _, fields = experts_fields(**BASE, router="sigmoid", initializer_range=0.3, expert_pool=[1, 1, None, None])
    assert (fields["router"], fields["initializer_range"]) == ("sigmoid", 0.3)
    assert fields["expert_pool"] == [1, 1, None, None]


@pytest.mark.parametrize(
    ("request_", "start", "groups"),
    [
        ({"expert_groups": "joint", "num_experts": 3}, Start("copy"), [group("joint", 3, 48)]),
        (
            {"expert_groups": "isolated", "num_experts": 6},
            Start("copy"),
            [group("text", 3, 48, ["text"]), group("image", 3, 48, ["image"])],
        ),
        (
            {"expert_groups": "joint", "granularity": 2},
            Start("split", granularity=2),
            [group("joint", 8, 24)],
        ),
        (
            {"expert_groups": "joint", "start": "split", "num_experts_per_tok": 4},
            Start("split", granularity=4),
            [group("joint", 8, 12)],
        ),
        ({"expert_groups": "joint", "granularity": 1}, Start("copy"), [group("joint", 8, 48)]),
        (
            {"expert_groups": "joint", "start": "split", "granularity": 3, "num_experts": 6, "num_experts_per_tok": 6},
            Start("split", granularity=3),
            [group("joint", 6, 16)],
        ),
        ({"expert_groups": "joint", "start": "drop"}, Start("drop", drop_ratio=0.5), [group("joint", 8, 48)]),
        (
            {"expert_groups": "joint", "start": "drop", "drop_ratio": 0.25},
            Start("drop", drop_ratio=0.25),
            [group("joint", 8, 48)],
        ),
        (
            {"granularity": 4, "num_experts": 16},
            Start("residual"),
            [
                group("joint", 16, 12),
                group("text", 1, 48, ["text"], always_on=True),
                group("image", 1, 48, ["image"], always_on=True),
            ],
        ),
        (
            {"moe_intermediate_size": 100},
            Start("residual"),
            [
                group("joint", 8, 100),
                group("text", 1, 48, ["text"], always_on=True),
                group("image", 1, 48, ["image"], always_on=True),
            ],
        ),
        (
            {"start": "split"},
            Start("split", granularity=2),
            [
                group("joint", 8, 24),
                group("text", 1, 24, ["text"], always_on=True),
                group("image", 1, 24, ["image"], always_on=True),
            ],
        ),
        # A list: residual if always-on experts can contain the dense block, otherwise copies.
        (
            {"expert_groups": [{"name": "a", "num_experts": 3}, {"name": "b", "num_experts": 2, "always_on": True}]},
            Start("residual"),
            [group("a", 3, 48), group("b", 2, 48, always_on=True)],
        ),
        (
            {
                "expert_groups": [
                    {"name": "a", "num_experts": 3},
                    {"name": "b", "num_experts": 2, "always_on": True, "intermediate_size": 23},
                ]
            },
            Start("copy"),
            [group("a", 3, 48), group("b", 2, 23, always_on=True)],
        ),
        (
            {
                "expert_groups": [
                    {"name": "a", "num_experts": 3, "intermediate_size": 5},
                    {"name": "b", "num_experts": 2, "always_on": True, "intermediate_size": 24},
                ]
            },
            Start("residual"),
            [group("a", 3, 5), group("b", 2, 24, always_on=True)],
        ),
        (
            {"expert_groups": [{"name": "a", "num_experts": 3}]},
            Start("copy"),
            [group("a", 3, 48)],
        ),
        (
            {"expert_groups": [{"name": "a", "num_experts": 4}], "granularity": 2},
            Start("split", granularity=2),
            [group("a", 4, 24)],
        ),
        (
            {
                "expert_groups": [
                    {"name": "a", "num_experts": 3},
                    {"name": "b", "num_experts": 1, "always_on": True, "modalities": ["image"]},
                ]
            },
            Start("copy"),
            [group("a", 3, 48), group("b", 1, 48, ["image"], always_on=True)],
        ),
    ],
)
def test_start_and_groups_of_a_request(request_, start, groups):
    found, fields = experts_fields(**BASE, **request_)
    assert found == start
    assert fields["expert_groups"] == groups
    assert fields["num_experts"] == sum(g["num_experts"] for g in groups if not g["always_on"])
    assert fields["moe_intermediate_size"] == request_.get(
        "moe_intermediate_size", 48 // request_.get("granularity", start.granularity)
    )


def test_language_model_has_text_experts_only():
    start, fields = experts_fields(**BASE | {"modalities": ["text"]})
    assert start == Start("residual")
    assert [g["name"] for g in fields["expert_groups"]] == ["joint", "text"]


def test_groups_that_follow_widths_are_made_one_by_width():
    _, fields = experts_fields(**BASE | BY_LAYER, expert_groups="isolated", num_experts=4)
    assert fields["expert_groups"] == [
        group("text_48", 2, 48, ["text"], layers=[0, 3]),
        group("text_24", 2, 24, ["text"], layers=[1]),
        group("image_48", 2, 48, ["image"], layers=[0, 3]),
        group("image_24", 2, 24, ["image"], layers=[1]),
    ]
    assert fields["num_experts"] == 4
    assert fields["moe_intermediate_size"] == 48


def test_widths_by_layer_of_finer_experts():
    start, fields = experts_fields(**BASE | BY_LAYER, granularity=4, num_experts=8)
    assert start == Start("residual")
    assert fields["expert_groups"] == [
        group("joint_12", 8, 12, layers=[0, 3]),
        group("joint_6", 8, 6, layers=[1]),
        group("text_48", 1, 48, ["text"], always_on=True, layers=[0, 3]),
        group("text_24", 1, 24, ["text"], always_on=True, layers=[1]),
        group("image_48", 1, 48, ["image"], always_on=True, layers=[0, 3]),
        group("image_24", 1, 24, ["image"], always_on=True, layers=[1]),
    ]


def test_groups_of_one_width_stay_whole():
    """Routed experts with their own width, and a group whose layers all have the same width."""
    _, fields = experts_fields(
        **BASE | BY_LAYER,
        expert_groups=[
            {"name": "routed", "num_experts": 4},
            {"name": "narrow", "num_experts": 1, "layers": [1], "always_on": True},
            {"name": "wide", "num_experts": 1, "layers": [3, 0, 2], "always_on": True},
        ],
        moe_intermediate_size=10,
    )
    assert fields["expert_groups"] == [
        group("routed", 4, 10),
        group("narrow", 1, 24, always_on=True, layers=[1]),
        group("wide", 1, 48, always_on=True, layers=[3, 0, 2]),
    ]


def test_the_request_is_not_changed():
    groups = [{"name": "a", "num_experts": 3}]
    widths = {3: 48, 0: 48}
    experts_fields(**BASE | {"widths": widths}, expert_groups=groups)
    assert groups == [{"name": "a", "num_experts": 3}]
    assert list(widths) == [3, 0]


def test_whether_a_start_is_exact():
    assert Start("copy").is_exact
    assert Start("drop", drop_ratio=0.0).is_exact
    assert not Start("drop", drop_ratio=0.1).is_exact
    assert not Start("copy", pool_start="mean").is_exact


# ---------------------------------------------------------------- the experts that contain the dense block


def carriers(*groups: tuple[str, int, int, str], modalities: str = "ti", width: int = 8) -> list[str] | None:
    always_on = [ExpertGroup(name, n, tuple(served), size, always_on=True) for name, n, size, served in groups]
    return dense_carriers(always_on, list(modalities), width)


def test_the_dense_block_is_contained_once_per_modality():
    assert carriers(("a", 1, 8, "ti")) == ["a"]
    assert carriers(("a", 1, 8, "t"), ("b", 1, 8, "i")) == ["a", "b"]
    assert carriers(("b", 1, 8, "i"), ("a", 1, 8, "t")) == ["a", "b"]
    assert carriers(("a", 1, 8, "t"), ("b", 1, 8, "i"), ("c", 1, 8, "ti")) == ["a", "b"]
    assert carriers(("c", 1, 8, "ti"), ("a", 1, 8, "t"), ("b", 1, 8, "i")) == ["c"]
    assert carriers(("a", 1, 8, "t"), ("c", 1, 8, "ti")) == ["c"]
    assert carriers(("c", 1, 8, "iv"), ("a", 1, 8, "t"), ("b", 1, 8, "ti"), modalities="tiv") == ["a", "c"]


def test_the_dense_block_needs_enough_width_and_every_modality_once():
    assert carriers(("a", 1, 7, "ti")) is None
    assert carriers(("a", 2, 4, "ti")) == ["a"]
    assert carriers(("a", 2, 5, "ti")) == ["a"]
    assert carriers(("a", 1, 8, "t")) is None
    assert carriers(("a", 1, 8, "ti"), ("b", 1, 8, "iv"), modalities="tiv") is None
    routed = ExpertGroup("a", 1, ("t", "i"), 8)
    assert dense_carriers([routed], ["t", "i"], 8) is None


# ---------------------------------------------------------------- errors

ALWAYS_ON = [{"name": "a", "num_experts": 3}, {"name": "b", "num_experts": 1, "always_on": True}]
REFUSED = {
    "no layers": ({"widths": {}}, "no layer would become sparse"),
    "layer beyond the model": ({"widths": {4: 48}}, "`layers` must be an integer from 0 to 3, got 4."),
    "width of nothing": ({"widths": {0: 0}}, "`widths[0]` must be an integer of at least 1, got 0."),
    "unknown start": ({"start": "magic"}, "`start` must be one of copy, split, residual, drop, got 'magic'."),
    "unknown arrangement": ({"expert_groups": "mixed"}, "`expert_groups` must be one of hybrid, joint, isolated"),
    "unknown field": (
        {"num_expert": 4},
        "`num_expert` is not a field of the experts' configuration: did you mean `num_experts`?",
    ),
    "foreign field": ({"learning": 4}, "`learning` is not a field of the experts' configuration, which has ["),
    "layers by step": (
        {"decoder_sparse_step": 2},
        "`decoder_sparse_step` is derived from the layers that are upcycled",
    ),
    "layers by list": ({"mlp_only_layers": [1]}, "`mlp_only_layers` is derived from the layers that are upcycled"),
    "granularity of 0": ({"granularity": 0}, "`granularity` must be an integer of at least 1, got 0."),
    "granularity of 2.0": ({"granularity": 2.0}, "`granularity` must be an integer of at least 1, got 2.0."),
    "top-k of 0": ({"num_experts_per_tok": 0}, "`num_experts_per_tok` must be an integer of at least 1, got 0."),
    "top-k that is not a number": (
        {"start": "split", "num_experts_per_tok": "2"},
        "`num_experts_per_tok` must be an integer of at least 1, got '2'.",
    ),
    "ratio beyond 1": (
        {"start": "drop", "drop_ratio": 1.5},
        "`drop_ratio` must be a number from 0 to 1, got 1.5.",
    ),
    "ratio of copies": (
        {"start": "copy", "drop_ratio": 0.5},
        '`drop_ratio` is for `start="drop"`, but the start is "copy": leave it out.',
    ),
    "unknown pool start": ({"pool_start": "last"}, "`pool_start` must be one of first, mean, got 'last'."),
    "fine copies": (
        {"start": "copy", "granularity": 2},
        '`start="copy"` makes experts as wide as the dense block, so it cannot be combined with `granularity` 2: use '
        '`start="split"`, or `start="residual"`.',
    ),
    "fine drop": ({"start": "drop", "granularity": 2}, '`start="drop"` makes experts as wide as the dense block'),
    "two widths": (
        {"granularity": 2, "moe_intermediate_size": 24},
        "`granularity` and `moe_intermediate_size` both set the width of routed experts: give one of them.",
    ),
    "odd parts": (
        {"granularity": 5, "widths": {0: 40, 3: 48}},
        "`granularity` 5 does not divide the width 48 of layer 3's dense block: choose a divisor of it.",
    ),
    "odd parts of a split": (
        {"start": "split", "granularity": 5},
        "`granularity` 5 does not divide the width 48 of layer 0's dense block",
    ),
    "width of copies": (
        {"expert_groups": "joint", "moe_intermediate_size": 24},
        '`moe_intermediate_size` is 24, but with `start="copy"` experts of layer 0 are 48 wide: leave it out, set '
        '`granularity`, or use `start="residual"`.',
    ),
    "width of parts": (
        {"start": "split", "moe_intermediate_size": 48},
        '`moe_intermediate_size` is 48, but with `start="split"` experts of layer 0 are 24 wide',
    ),
    "width of a group of copies": (
        {"start": "copy", "expert_groups": [{"name": "a", "num_experts": 3, "intermediate_size": 24}]},
        '`start="copy"` needs experts of width 48 in layer 0, whose dense block is 48 wide, but '
        "`expert_groups['a'].intermediate_size` is 24: leave it out, or use `start=\"residual\"`.",
    ),
    "width of a group in one of the layers": (
        {
            "widths": {0: 48, 1: 24, 3: 48},
            "start": "copy",
            "expert_groups": [{"name": "a", "num_experts": 3, "intermediate_size": 48}],
        },
        '`start="copy"` needs experts of width 24 in layer 1, whose dense block is 24 wide',
    ),
    "unnormalised copies": (
        {"expert_groups": "joint", "norm_topk_prob": False},
        '`start="copy"` needs weights of the chosen experts that sum to 1, otherwise they would scale the output of '
        'the dense block: leave `norm_topk_prob` True, or use `start="residual"`.',
    ),
    "unnormalised parts": ({"start": "split", "norm_topk_prob": False}, '`start="split"` needs weights of the chosen'),
    "unnormalised drop": ({"start": "drop", "norm_topk_prob": False}, '`start="drop"` needs weights of the chosen'),
    "norm of another type": (
        {"expert_groups": "joint", "norm_topk_prob": "no"},
        "`norm_topk_prob` must be True or False, got 'no'.",
    ),
    "top-p parts": (
        {"start": "split", "router": "top_p"},
        '`router="top_p"` may choose only some parts of a dense block, so it cannot be combined with `start="split"`: '
        'use another router, `start="copy"` or `start="residual"`.',
    ),
    "capacity of copies": (
        {"expert_groups": "joint", "expert_capacity_factor": 1.5},
        '`expert_capacity_factor` drops tokens, so `start="copy"` would not be exact: leave it out, or use '
        '`start="residual"`.',
    ),
    "capacity of drop": ({"start": "drop", "expert_capacity_factor": 9.0}, "`expert_capacity_factor` drops tokens"),
    "incomplete copies": (
        {"expert_groups": "joint", "start": "split", "num_experts": 7},
        "`start=\"split\"` cuts each copy of the dense block into 2 experts, but group 'joint' has 7: choose a number "
        "of experts that is a multiple of `granularity`, or another `granularity`.",
    ),
    "incomplete copies of a modality": (
        {"expert_groups": "isolated", "start": "split", "num_experts": 6},
        "but group 'text' has 3",
    ),
    "incomplete choice": (
        {"expert_groups": "joint", "granularity": 2, "num_experts_per_tok": 3},
        "`start=\"split\"` needs all 2 parts of a dense block for a token, but a token of modality 'text' goes to 3 "
        "experts: choose `num_experts_per_tok` (or `num_experts_per_tok_by_modality`) as a multiple of `granularity`, "
        "or another `granularity`.",
    ),
    "incomplete choice of a modality": (
        {"expert_groups": "joint", "granularity": 2, "num_experts_per_tok_by_modality": {"image": 1}},
        "but a token of modality 'image' goes to 1 experts",
    ),
    "no always-on experts": (
        {"expert_groups": "joint", "start": "residual"},
        "`start=\"residual\"` needs an always-on expert for every modality, but layer 0 has none for 'text': use "
        '`expert_groups="hybrid"`, add a group with `"always_on": True`, or use `start="copy"`.',
    ),
    "no always-on expert of a modality": (
        {
            "start": "residual",
            "expert_groups": [ALWAYS_ON[0], ALWAYS_ON[1] | {"modalities": ["text"]}],
        },
        "but layer 0 has none for 'image'",
    ),
    "no always-on expert in a layer": (
        {"start": "residual", "expert_groups": [ALWAYS_ON[0], ALWAYS_ON[1] | {"layers": [0, 1]}]},
        "but layer 3 has none for 'text'",
    ),
    "narrow always-on experts": (
        {"start": "residual", "expert_groups": [ALWAYS_ON[0], ALWAYS_ON[1] | {"intermediate_size": 47}]},
        '`start="residual"` makes an always-on expert of the dense block, which is 48 wide in layer 0, but the '
        "always-on experts for 'text' have the widths {'b': 47}: leave their `intermediate_size` out, or use "
        '`start="copy"`.',
    ),
    "always-on experts twice": (
        {
            "modalities": ["text", "image", "video"],
            "start": "residual",
            "expert_groups": [
                ALWAYS_ON[0],
                ALWAYS_ON[1] | {"modalities": ["text", "image"]},
                ALWAYS_ON[1] | {"name": "c", "modalities": ["image", "video"]},
            ],
        },
        '`start="residual"` needs always-on groups with a width of at least 48, exactly one for each modality, but no '
        "selection of ['b', 'c'] in layer 0 provides that: change their `modalities`.",
    ),
    "pools of copies": (
        {"expert_groups": "joint", "expert_pool": [5, 5, None, 5]},
        '`expert_pool` makes layers [0, 1, 3] share the experts of pool 5, and `start="copy"` can make them the dense '
        'block of only one of these layers: use `start="residual"` with an always-on expert for every modality, which '
        'is exact, or accept different outputs with `pool_start="first"` or `"mean"`.',
    ),
    "pools of drop": ({"start": "drop", "expert_pool": [5, 5, None, 5]}, '`start="drop"` can make them'),
    "pool start of residual": (
        {"pool_start": "mean", "expert_pool": [5, 5, None, 5]},
        "`pool_start` has no effect here, because routed experts start at zero: leave it out.",
    ),
    "pool start without pools": (
        {"expert_groups": "joint", "pool_start": "first", "expert_pool": [5, 6, None, None]},
        "`pool_start` has no effect here, because no layers share their experts: leave it out.",
    ),
    "pools of two widths": (
        {**BY_LAYER, "expert_groups": "joint", "pool_start": "first", "expert_pool": [5, 5, None, 5]},
        "`expert_pool` makes layers [0, 1, 3] share pool 5, but their dense blocks have different widths "
        "{0: 48, 1: 24, 3: 48}: pool layers of one width.",
    ),
    "residual pools of two widths": (
        {**BY_LAYER, "expert_pool": [5, 5, None, 6]},
        "{0: 48, 1: 24}: pool layers of one width, or set `moe_intermediate_size`.",
    ),
    "pools of different groups": (
        {
            "start": "copy",
            "pool_start": "first",
            "expert_pool": [5, 5, None, None],
            "expert_groups": [
                {"name": "a", "num_experts": 4, "layers": [0]},
                {"name": "b", "num_experts": 4, "layers": [1, 3]},
            ],
        },
        "`expert_pool` makes layers [0, 1] share pool 5, but `expert_groups` give them different routed groups",
    ),
    "pool of a dense layer": ({"expert_pool": [5, 5, 5, None]}, "`expert_pool[2]` is 5, but layer 2 is dense"),
    "pools of another model": ({"expert_pool": [5, 5]}, "`expert_pool` must be a list with a pool or None for each"),
    "too many chosen": ({"num_experts": 2, "num_experts_per_tok": 3}, "`num_experts_per_tok` is 3 for modality 'text'"),
    "number of experts of a list": (
        {"expert_groups": ALWAYS_ON, "num_experts": 8},
        "`num_experts` is 8, but `expert_groups` have 3 routed experts",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_requests_that_cannot_start_are_refused(name):
    request, message = REFUSED[name]
    with pytest.raises(UpcyclingError, match=re.escape(message)):
        experts_fields(**BASE | request)


ACCEPTED = {
    "copy with top-k 1": {"expert_groups": "joint", "num_experts_per_tok": 1},
    "residual without normalised weights": {"norm_topk_prob": False},
    "residual with capacity": {"expert_capacity_factor": 1.0},
    "residual with pools": {"expert_pool": [5, 5, None, 5]},
    "copies with pools of one layer": {"expert_groups": "joint", "expert_pool": [5, 6, None, 7]},
    "pools of one width each": {
        **BY_LAYER,
        "expert_groups": "joint",
        "pool_start": "mean",
        "expert_pool": [5, 6, None, 5],
    },
    "residual pools of two widths with experts of one": {
        **BY_LAYER,
        "moe_intermediate_size": 12,
        "expert_pool": [5, 5, None, 5],
    },
    "copies as wide as they are": {"expert_groups": "joint", "moe_intermediate_size": 48},
    "parts as wide as they are": {"start": "split", "moe_intermediate_size": 24},
    "copy with top-p": {"start": "copy", "router": "top_p"},
    "number of experts of a list": {"expert_groups": ALWAYS_ON, "num_experts": 3},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_requests_that_can_start_are_accepted(name):
    _, fields = experts_fields(**BASE | ACCEPTED[name])
    assert SparseMoeVlmExpertsConfig(**fields).expert_groups == fields["expert_groups"]
