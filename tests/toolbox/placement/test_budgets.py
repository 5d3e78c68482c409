"""Memory budgets: units, order of the devices, and errors."""

import pytest

from modeling_sparse_moe_vlm.toolbox.placement.budgets import fast_devices, read_budgets, readable_size


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (12, 12),
        (0, 0),
        (1.5e9, 1.5e9),
        (float("inf"), float("inf")),
        ("3KB", 3_000),
        ("3KiB", 3_072),
        ("2MB", 2_000_000),
        ("2MiB", 2_097_152),
        ("80GB", 80_000_000_000),
        ("80gb", 10_000_000_000),  # Accelerate reads a small b as bits
        ("1.5GiB", 1_610_612_736),
        ("2TB", 2_000_000_000_000),
        ("0.5TB", 500_000_000_000),
        ("2TiB", 2_199_023_255_552),
        ("0.5tib", 549_755_813_888),
    ],
)
def test_sizes(size, expected):
    assert read_budgets({0: size}) == {0: expected}


def test_devices_are_in_the_order_of_their_speed():
    budgets = read_budgets({"disk": 1, 3: 2, "cpu": 3, 1: 4, "mps": 5})
    assert list(budgets.items()) == [(3, 2), (1, 4), ("mps", 5), ("cpu", 3), ("disk", 1)]
    assert fast_devices(budgets) == [3, 1, "mps"]
    assert fast_devices(read_budgets({"disk": 1, "cpu": 3})) == ["cpu"]
    assert fast_devices(read_budgets({"disk": 1})) == ["disk"]


@pytest.mark.parametrize(
    "size", ["much", "muchTB", "-1GB", "-1TB", "5", "nanGB", "infTB", None, -1, -1.0, float("nan")]
)
def test_invalid_sizes_are_refused(size):
    with pytest.raises(ValueError, match=r"^`max_memory\['cpu'\]` is "):
        read_budgets({0: "1GB", "cpu": size})


@pytest.mark.parametrize("device", ["gpu", -1, True, "0", 1.0, None])
def test_invalid_devices_are_refused(device):
    with pytest.raises(ValueError, match=r"`max_memory` names \[.*\]: devices are numbers of accelerators"):
        read_budgets({0: "1GB"} | {device: "1GB"} if device is not True else {device: "1GB"})


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1_000, "1.00 kB"),
        (1_000_000, "1.00 MB"),
        (999_000_000, "999.00 MB"),
        (1.5e9, "1.50 GB"),
        (2e12, "2000.00 GB"),
    ],
)
def test_readable_sizes(size, expected):
    assert readable_size(size) == expected
