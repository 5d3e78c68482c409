"""Arrangements of experts, by name and group by group. `test_configuration` tests the errors of wrong groups."""

import pickle

import pytest

from modeling_sparse_moe_vlm.expert_groups import ARRANGEMENTS, ExpertGroup, resolve_groups

pytestmark = pytest.mark.newest

TWO = ["text", "image"]
THREE = ["text", "image", "video"]


def resolve(groups, modalities=TWO, num_experts=None):
    return resolve_groups(
        groups, modalities=modalities, num_experts=num_experts, intermediate_size=7, num_hidden_layers=4
    )


def summary(groups):
    return [(group["name"], group["num_experts"], group["modalities"], group["always_on"]) for group in groups]


@pytest.mark.parametrize(
    ("name", "modalities", "num_experts", "expected"),
    [
        ("joint", TWO, 6, [("joint", 6, TWO, False)]),
        ("joint", TWO, None, [("joint", 8, TWO, False)]),
        ("isolated", TWO, 6, [("text", 3, ["text"], False), ("image", 3, ["image"], False)]),
        ("isolated", THREE, 6, [(name, 2, [name], False) for name in THREE]),
        ("hybrid", TWO, 6, [("joint", 6, TWO, False), ("text", 1, ["text"], True), ("image", 1, ["image"], True)]),
        ("hybrid", THREE, 2, [("joint", 2, THREE, False), *((name, 1, [name], True) for name in THREE)]),
    ],
)
def test_named_arrangements(name, modalities, num_experts, expected):
    assert name in ARRANGEMENTS
    groups = resolve(name, modalities, num_experts)
    assert summary(groups) == expected
    assert all(group["intermediate_size"] == 7 and group["layers"] is None for group in groups)


def test_defaults_of_a_group_and_their_order():
    (group,) = resolve([{"num_experts": 2, "name": "a"}])
    assert list(group.items()) == [
        ("name", "a"),
        ("num_experts", 2),
        ("modalities", TWO),
        ("intermediate_size", 7),
        ("always_on", False),
        ("layers", None),
    ]


def test_resolved_groups_resolve_to_themselves():
    for name in ARRANGEMENTS:
        groups = resolve(name)
        assert resolve(groups) == groups


def test_lists_are_copies():
    modalities, layers = ["text", "image"], [0, 2]
    given = [
        {"name": "a", "num_experts": 2, "modalities": modalities, "layers": layers},
        {"name": "b", "num_experts": 2},
    ]
    first, second = resolve(given)
    first["layers"].append(3)
    first["modalities"].pop()
    second["modalities"].pop()
    assert (modalities, layers, TWO) == (["text", "image"], [0, 2], ["text", "image"])
    assert "modalities" not in given[1]


def test_groups_compare_by_value():
    group = ExpertGroup.from_dict(resolve([{"name": "a", "num_experts": 2, "layers": (0, 2)}])[0])
    assert group == ExpertGroup("a", 2, ("text", "image"), 7, layers=(0, 2))
    assert len({group, pickle.loads(pickle.dumps(group))}) == 1
    assert group.serves("image")
    assert not group.serves("video")
    with pytest.raises(AttributeError):
        group.num_experts = 3
