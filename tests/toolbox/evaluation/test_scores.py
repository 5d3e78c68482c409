"""Exact match: which answers count as equal, and the percentage."""

import pytest

from modeling_sparse_moe_vlm.toolbox.evaluation import exact_match
from modeling_sparse_moe_vlm.toolbox.evaluation.metrics.exact_match.exact_match import is_right


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("cat", "cat", True),
        ("Cat.", "cat", True),
        ("cat", "CAT.", True),
        (" cat\n", "cat", True),
        (" cat .\n", "cat", True),
        ("cat..", "cat", False),
        ("cat!", "cat", False),
        (".cat", "cat", False),
        ("a cat", "acat", False),
        ("cats", "cat", False),
        ("3.0", "3", False),
        ("", "", True),
        (".", "", True),
        ("", "cat", False),
    ],
)
def test_right_answers(answer, reference, expected):
    assert is_right(answer, reference) is expected
    assert is_right(reference, answer) is expected
    assert exact_match([answer], [reference]) == (100.0 if expected else 0.0)


def test_percentage():
    assert exact_match(["Cat.", " dog", "3"], ["cat", "dog", "2"]) == pytest.approx(200 / 3)
    assert exact_match(["a", "b", "c", "d"], ["a", "x", "x", "x"]) == 25
    assert exact_match(["a", "b"], ["b", "a"]) == 0


@pytest.mark.parametrize(("predictions", "references"), [(["a"], ["a", "b"]), (["a", "b"], ["a"]), ([], [])])
def test_numbers_that_do_not_fit(predictions, references):
    with pytest.raises(ValueError, match=f"got {len(predictions)} predictions for {len(references)} references"):
        exact_match(predictions, references)
