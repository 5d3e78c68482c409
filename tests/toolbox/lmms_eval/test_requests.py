"""Batches, generation arguments and stop strings of the requests of lmms-eval."""

import warnings

import pytest

from modeling_sparse_moe_vlm.toolbox.lmms_eval.requests import batches, cut, generation_options

pytestmark = pytest.mark.newest


def test_batches_share_their_arguments_and_start_with_the_longest_texts():
    greedy, sampled = {"do_sample": False, "until": ["a"]}, {"do_sample": True}
    texts = ["bb", "b", "bbbb", "bbb", "b", "bb"]
    arguments = [greedy, greedy, sampled, greedy, sampled, dict(reversed(greedy.items()))]
    requests = [(text, None, given, 0, "task", "test") for text, given in zip(texts, arguments)]
    assert list(batches(requests, 3)) == [[3, 0, 5], [1], [2, 4]]
    assert list(batches(requests, 1)) == [[3], [0], [5], [1], [2], [4]]
    assert list(batches([], 2)) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_new_tokens": 7, "do_sample": False}),
        (
            {"until": ["\n"], "max_new_tokens": 3, "num_beams": 2},
            {"max_new_tokens": 3, "num_beams": 2, "do_sample": False},
        ),
        ({"temperature": 0, "top_p": 0.5, "top_k": 3, "do_sample": True}, {"max_new_tokens": 7, "do_sample": False}),
        ({"temperature": 0.5, "do_sample": False}, {"max_new_tokens": 7, "do_sample": False}),
        ({"temperature": None, "top_p": None, "max_new_tokens": None}, {"max_new_tokens": 7, "do_sample": False}),
        (
            {"temperature": 0.5, "top_p": 0.9},
            {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "do_sample": True},
        ),
        ({"do_sample": True, "top_k": 3}, {"max_new_tokens": 7, "top_k": 3, "do_sample": True}),
    ],
)
def test_generation_arguments(given, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generation_options(given, 7) == expected


def test_unknown_generation_arguments_warn():
    with pytest.warns(UserWarning, match=r"\['image_aspect_ratio', 'q'\].*no effect"):
        options = generation_options({"q": 1, "image_aspect_ratio": "original", "seed": None}, 7)
    assert options == {"max_new_tokens": 7, "do_sample": False}


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (None, "one\n\ntwo. Q: three"),
        ([], "one\n\ntwo. Q: three"),
        (["\n\n", ""], "one\n\ntwo. Q: three"),
        ("Q:", "one\n\ntwo. "),
        (["three", "two", "Q:"], "one\n\n"),
        (["\n"], "one"),
    ],
)
def test_answers_end_before_the_first_stop_string(stops, expected):
    assert cut("one\n\ntwo. Q: three", stops) == expected
