"""Each check accepts its range, ends included. For any other value, its error says what the field accepts."""

import pytest

from modeling_sparse_moe_vlm.checks import (
    check_boolean,
    check_choice,
    check_integer,
    check_layers,
    check_number,
    check_sequence,
)

pytestmark = pytest.mark.newest


@pytest.mark.parametrize(
    ("check", "right", "wrong", "message"),
    [
        (lambda value: check_integer("f", value), (1, 10**9), (0, -1, 1.0, True, "1", None), "integer of at least 1"),
        (lambda value: check_integer("f", value, at_least=0, below=3), (0, 2), (-1, 3, False), "integer from 0 to 2"),
        (lambda value: check_number("f", value), (0, 0.5, 7), (-1e-9, float("nan"), "0", True), "number of at least 0"),
        (lambda value: check_number("f", value, at_most=1), (0, 1, 1.0), (1.01, -1), "number from 0 to 1"),
        (lambda value: check_boolean("f", value), (True, False), (0, 1, "true", None), "True or False"),
        (lambda value: check_choice("f", value, ("a", "b")), ("a", "b"), ("c", None, ["a"], ""), "one of a, b"),
        (lambda value: check_sequence("f", value, str), ([], ["a"], ("a",)), ("a", [1], None, {"a": 1}), "list of str"),
        (lambda value: check_layers("f", value, 4), ([], [0, 3], (1,)), (3, ["0"], None), "list of int"),
        (lambda value: check_layers("f", value, 4), ([3],), ([4], [-1]), "layers 0 to 3"),
    ],
)
def test_ranges(check, right, wrong, message):
    for value in right:
        check(value)
    for value in wrong:
        with pytest.raises(ValueError, match=f"`f`.*{message}"):
            check(value)
