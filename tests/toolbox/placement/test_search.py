"""The search for a placement, with hand-made parts and exact maps."""

import pytest

from modeling_sparse_moe_vlm.toolbox.placement.packing import Bin, Item, partition, spread
from modeling_sparse_moe_vlm.toolbox.placement.parts import Part, device_map_of, device_of
from modeling_sparse_moe_vlm.toolbox.placement.search import (
    assign,
    assign_with,
    missing_bytes,
    offload_order,
    pack,
    place_offloaded,
)


def experts(layer: int, size: int, name: str = "", is_apart: bool = False, **load: float) -> Part:
    place = f"layers.{layer}.experts"
    return Part(
        f"{place}{name}", size, is_experts=True, layer=f"layers.{layer}", place=place, is_apart=is_apart, load=load
    )


def model(*stacks: Part, attention: int = 10) -> list[Part]:
    """Returns an embedding, layers with attention and these experts, a norm, and a head tied to the embedding."""
    parts = [Part("embed", 40)]
    for layer in dict.fromkeys(stack.layer for stack in stacks):
        parts.append(Part(f"{layer}.attention", attention, layer=layer))
        parts += [stack for stack in stacks if stack.layer == layer]
    return [*parts, Part("norm", 5, is_last=True), Part("head", 0, is_last=True, tied_to="embed")]


# ------------------------------------------------------------------------------------------------ offloaded parts


def test_order_of_offloading():
    parts = model(experts(0, 100, text=0.5), experts(1, 400, text=0.6), experts(2, 100, text=0.1, image=0.1))
    assert [part.name for part in offload_order(parts)] == [
        "layers.1.experts",  # 0.6 of 400 bytes
        "layers.2.experts",  # 0.2 of 100 bytes, of both modalities together
        "layers.0.experts",
        "layers.0.attention",
        "layers.1.attention",
        "layers.2.attention",
        "norm",
        "embed",
    ]


def test_equal_loads_are_offloaded_in_the_order_of_the_layers():
    parts = model(*(experts(layer, 3, all=1 / 3 + layer * 1e-12) for layer in (2, 0, 1)))
    assert [part.name for part in offload_order(parts)][:3] == [f"layers.{n}.experts" for n in (2, 0, 1)]


def test_experts_without_bytes_are_not_offloaded():
    assert "layers.0.experts" not in [part.name for part in offload_order(model(experts(0, 0, all=1.0)))]


def test_the_most_used_offloaded_parts_are_on_the_cpu():
    cold = [experts(0, 30, all=0.1), experts(1, 20, all=0.2), experts(2, 30, all=0.3)]
    budgets = {0: 1000, "cpu": 50, "disk": 1000}
    names = [f"layers.{n}.experts" for n in range(3)]
    assert place_offloaded(cold, budgets) == dict(zip(names, ["disk", "cpu", "cpu"], strict=True))
    # A smaller part may still fit if a larger one did not.
    budgets["cpu"] = 40
    assert place_offloaded(cold, budgets) == dict(zip(names, ["disk", "disk", "cpu"], strict=True))
    assert place_offloaded(cold[::-1], budgets) == dict(zip(names, ["cpu", "disk", "disk"], strict=True))
    budgets["disk"] = 49
    assert place_offloaded(cold, budgets) is None
    assert place_offloaded(cold, {0: 1000}) is None
    assert place_offloaded([], {0: 1000}) == {}
    assert place_offloaded(cold, {"cpu": 1000, "disk": 80}) == dict.fromkeys(names, "disk"), "the CPU is the fast one"


LOADS = [0.05, 0.4, 0.1, 0.25, 0.2]


def test_three_tiers():
    """The most used experts stay, the next ones go to the CPU, and the least used to the disk."""
    parts = model(*(experts(layer, 100, text=load, image=load) for layer, load in enumerate(LOADS)))
    # 95 bytes for other parts, two stacks, and room to run one more.
    devices = assign(parts, {0: 395, "cpu": 200, "disk": 1000})
    assert devices == {
        "embed": 0,
        "layers.0.attention": 0,
        "layers.0.experts": "disk",
        "layers.1.attention": 0,
        "layers.1.experts": 0,
        "layers.2.attention": 0,
        "layers.2.experts": "cpu",
        "layers.3.attention": 0,
        "layers.3.experts": 0,
        "layers.4.attention": 0,
        "layers.4.experts": "cpu",
        "norm": 0,
        "head": 0,
    }
    assert device_map_of(parts, devices) == {
        "embed": 0,
        "layers.0.attention": 0,
        "layers.0.experts": "disk",
        "layers.1": 0,
        "layers.2.attention": 0,
        "layers.2.experts": "cpu",
        "layers.3": 0,
        "layers.4.attention": 0,
        "layers.4.experts": "cpu",
        "norm": 0,
        "head": 0,
    }
    assert assign(parts, {0: 395, "cpu": 200, "disk": 99}) is None


def test_as_few_parts_as_possible_are_offloaded():
    parts = model(*(experts(layer, 100, text=load) for layer, load in enumerate(LOADS)))

    def offloaded(budget: int, keeps_room: bool = True) -> list[str]:
        devices = assign(parts, {0: budget, "disk": 1000}, keeps_room=keeps_room)
        return [name for name, device in devices.items() if device == "disk"]

    coldest = [f"layers.{layer}.experts" for layer in (0, 2, 4, 3, 1)]
    assert offloaded(595) == []
    # Offloaded parts need room for the largest of them.
    assert set(offloaded(594)) == set(coldest[:2])
    assert set(offloaded(495)) == set(coldest[:2])
    assert set(offloaded(494)) == set(coldest[:3])
    assert set(offloaded(594, keeps_room=False)) == set(coldest[:1])
    assert set(offloaded(495, keeps_room=False)) == set(coldest[:1])
    assert set(offloaded(494, keeps_room=False)) == set(coldest[:2])
    assert set(offloaded(195)) == set(coldest)
    # Without room for the experts, layers are offloaded as well, and finally everything.
    assert set(offloaded(194)) > set(coldest)
    assert set(offloaded(40, keeps_room=False)) >= {*coldest, *(f"layers.{n}.attention" for n in range(5))}


def test_missing_bytes():
    parts = model(*(experts(layer, 1000, text=load) for layer, load in enumerate(LOADS)))
    # Three layers of 1,010 bytes and the norm on one of two devices.
    assert assign(parts, {0: 1500 + 1534, 1: 1500 + 1534}, keeps_room=False) is None
    assert assign(parts, {0: 1500 + 1535, 1: 1500 + 1535}, keeps_room=False) is not None
    missing = missing_bytes(parts, {0: 1500, 1: 1500})
    assert 1535 <= missing <= 1537
    assert missing_bytes(parts, {0: 1500, "cpu": 1500}) > missing, "the CPU does not grow"


# ------------------------------------------------------------------------------------------------ the other parts


def test_consecutive_layers_are_spread_evenly():
    parts = model(*(experts(layer, 90, all=0.25) for layer in range(4)), attention=10)
    devices = assign_with(parts, [], {1: 1000, 0: 1000}, keeps_room=True)
    assert [devices[part.name] for part in parts] == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1]
    # Not evenly if there is no room for it.
    devices = assign_with(parts, [], {0: 140, 1: 1000}, keeps_room=True)
    assert [devices[part.name] for part in parts] == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0]
    assert assign_with(parts, [], {0: 139, 1: 304}, keeps_room=True) is None


def test_attention_of_offloaded_experts_is_on_the_device_that_runs_them():
    parts = model(*(experts(layer, 90, all=0.25) for layer in range(4)), attention=10)
    devices = assign_with(parts, [parts[6]], {0: 1000, 1: 1000, "cpu": 100}, keeps_room=True)
    assert parts[6].name == "layers.2.experts"
    assert devices["layers.2.attention"] == 0
    assert devices["layers.2.experts"] == "cpu"
    assert [devices[f"layers.{layer}.experts"] for layer in (0, 1, 3)] == [0, 1, 1]
    # The first device keeps room for the stack.
    assert assign_with(parts, [parts[6]], {0: 140, 1: 1000, "cpu": 100}, keeps_room=True) is not None
    assert assign_with(parts, [parts[6]], {0: 139, 1: 1000, "cpu": 100}, keeps_room=True) is None
    assert assign_with(parts, [parts[6]], {0: 50, 1: 1000, "cpu": 100}, keeps_room=False) is not None
    assert assign_with(parts, [parts[6]], {0: 49, 1: 1000, "cpu": 100}, keeps_room=False) is None


def test_every_modality_is_balanced():
    """All groups have the same size: balanced only by bytes, those of images could all be on one device."""
    stacks = [
        experts(layer, 100, f".{group}", is_apart=True, text=text / 2, image=image / 2)
        for layer in range(2)
        for group, text, image in (("a", 0.9, 0.1), ("b", 0.1, 0.9), ("c", 0.0, 0.0), ("d", 0.0, 0.0))
    ]
    devices = assign(model(*stacks), {0: 1000, 1: 1000})
    for device in (0, 1):
        own = [stack for stack in stacks if devices[stack.name] == device]
        assert sum(stack.bytes for stack in own) == 400
        assert sum(stack.load["text"] for stack in own) == pytest.approx(0.5)
        assert sum(stack.load["image"] for stack in own) == pytest.approx(0.5)
    for layer in range(2):
        assert {devices[f"layers.{layer}.experts.{name}"] for name in "ab"} == {0, 1}


def test_modalities_without_choices_have_no_weight():
    stacks = [experts(layer, 100, text=0.5, image=0.0) for layer in range(2)]
    assert set(assign(model(*stacks), {0: 160, 1: 160}).values()) == {0, 1}


def test_tied_parts_are_on_the_same_device():
    parts = [Part("head", 10, tied_to="embed"), Part("embed", 100), *model(experts(0, 50, all=1.0))[1:3]]
    devices = assign(parts, {0: 120, 1: 120})
    assert devices["head"] == devices["embed"] == 0


def test_parts_before_the_layers_that_do_not_fit():
    bins = [Bin(39), Bin(1000)]
    assert not pack(model(experts(0, 10, all=1.0)), bins, set())
    assert bins[0].names == []


# ------------------------------------------------------------------------------------------------ packing


def item(name: str, size: int, *shares: float) -> Item:
    return Item([name], size, list(shares))


def test_runs_are_as_even_as_possible():
    items = [item(name, size, size / 20) for name, size in zip("abcdef", (5, 1, 4, 4, 2, 4), strict=True)]
    bins = [Bin(100), Bin(100), Bin(100)]
    assert partition(items, bins)
    assert [full.names for full in bins] == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert [full.bytes for full in bins] == [6, 8, 6]
    # By the largest share, which is the second one here.
    items = [item(name, 1, 0.25, share) for name, share in zip("abcd", (0.7, 0.1, 0.1, 0.1), strict=True)]
    bins = [Bin(100), Bin(100)]
    assert partition(items, bins)
    assert [full.names for full in bins] == [["a"], ["b", "c", "d"]]


def test_bins_are_unchanged_if_items_do_not_fit():
    bins = [Bin(3), Bin(3)]
    assert not partition([item("a", 2, 0.4), item("b", 2, 0.4), item("c", 2, 0.2)], bins)
    assert [full.names for full in bins] == [[], []]
    assert partition([item("a", 3, 0.5), item("b", 3, 0.5)], bins), "full to the last byte"
    assert [full.names for full in bins] == [["a"], ["b"]]


def test_families_are_spread():
    families = [
        [item(f"{family}{number}", 10, 0.125, load) for number, load in enumerate((0.5, 0.3, 0.1, 0.1))]
        for family in "ab"
    ]
    bins = [Bin(100), Bin(100)]
    assert spread(families, bins)
    assert [full.names for full in bins] == [["a0", "a3", "b1", "b2"], ["a1", "a2", "b0", "b3"]]
    assert not spread([[item("c", 61, 0.1, 0.1)]], bins)
    assert spread([[item("c", 60, 0.1, 0.1)]], bins)


# ------------------------------------------------------------------------------------------------ maps


def test_names_with_the_same_beginning():
    parts = [
        Part(f"layers.{layer}.{name}", 1, is_experts=name == "experts", layer=f"layers.{layer}")
        for layer in (1, 10)
        for name in ("attention", "experts")
    ]
    devices = {
        "layers.1.attention": 0,
        "layers.1.experts": "cpu",
        "layers.10.attention": 1,
        "layers.10.experts": 1,
    }
    device_map = device_map_of(parts, devices)
    assert device_map == {"layers.1.attention": 0, "layers.1.experts": "cpu", "layers.10": 1}
    assert device_of(device_map, "layers.10.experts.down_proj") == 1
    assert device_of(device_map, "layers.1.experts.down_proj") == "cpu"
    with pytest.raises(ValueError, match=r"no device for 'layers\.1\.norm\.weight'"):
        device_of(device_map, "layers.1.norm.weight")
    assert device_of(device_map | {"": "disk"}, "layers.1.norm.weight") == "disk"
