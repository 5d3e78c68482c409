"""Answers, which are assembled from the recorded attention and routing of their tokens."""

import numpy as np
import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.app.answers import NO_ATTENTION, NO_EXPERTS, NO_IMAGE, explained, image_heat
from modeling_sparse_moe_vlm.toolbox.app.generation import Generation
from modeling_sparse_moe_vlm.toolbox.app.image_tokens import TokenGrid
from modeling_sparse_moe_vlm.toolbox.app.recording import Recording

WORDS = [("a", [0]), ("cat", [2, 3])]
# Two images: of 1 × 2 tokens, and of 2 × 2.
GRIDS = [TokenGrid(np.array([[0, 1]])), TokenGrid(np.array([[3, 4], [5, 6]]))]


def make_generation() -> Generation:
    """Returns a record of 7 prompt tokens and 4 new ones, the second without text. Layer 3 has a window of 7."""
    rows = torch.arange(7.0)
    attention = [
        {0: torch.cat([step + rows, torch.zeros(step)]), 3: torch.cat([rows[step:], torch.zeros(step)])}
        for step in range(4)
    ]
    record = Recording(attention, [10 + torch.arange(7), 20 + torch.arange(7)], [0, 3], [[("joint", 30)]] * 2)
    return Generation(torch.arange(4), record, [0.1, 0.9, 0.2, 0.4], [0.3, 0.9, 0.5, 0.7])


def test_figures():
    answer = explained("a cat", WORDS, make_generation(), GRIDS, 7)
    assert (answer.text, answer.words) == ("a cat", ["a", "cat"])
    assert answer.alpha == pytest.approx([0.1, 0.3])
    assert answer.count_free_alpha == pytest.approx([0.3, 0.6])
    # The mean of steps 0, 2 and 3 by position: step + position in layer 0, the position in the window in layer 3.
    first = [5 / 3 + position for position in range(7)]
    last = [0, 1 / 3, 4 / 3, 3, 4, 5, 6]
    mean = (np.array(first) + last) / 2
    total = mean[[0, 1, 3, 4, 5, 6]].sum()
    np.testing.assert_allclose(answer.heat[0], mean[[[0, 1]]] / total)
    np.testing.assert_allclose(answer.heat[1], mean[[[3, 4], [5, 6]]] / total)
    assert [cells.tolist() for cells in answer.experts] == [
        [[[10, 11]], [[20, 21]]],
        [[[13, 14], [15, 16]], [[23, 24], [25, 26]]],
    ]
    assert (answer.layers, answer.groups) == ([0, 3], [[("joint", 30)]] * 2)
    assert answer.alpha_note == answer.heat_note == answer.experts_note == ""


def test_notes():
    generation = make_generation()
    generation.alpha, generation.alpha_note = [], "no α"
    answer = explained("a cat", WORDS, generation, [], 7)
    assert (answer.alpha_note, answer.heat_note, answer.experts_note) == ("no α", NO_IMAGE, NO_IMAGE)
    answer = explained("a cat", WORDS, generation, "no grid", 7)
    assert (answer.heat, answer.heat_note, answer.experts_note) == ([], "no grid", "no grid")
    generation.recording = Recording()
    answer = explained("a cat", WORDS, generation, GRIDS, 7)
    assert (answer.heat, answer.heat_note) == ([], NO_ATTENTION)
    assert (answer.experts, answer.experts_note) == ([], NO_EXPERTS)
    answer = explained("", [], generation, GRIDS, 7)
    assert answer.alpha_note == answer.heat_note == answer.experts_note == "The answer is empty."


def test_attention_of_a_step_that_is_not_known():
    record = make_generation().recording
    record.attention[2] = {}
    assert record.attention_to_prompt([0, 1], 7) is not None
    assert record.attention_to_prompt([0, 2], 7) is None
    assert record.attention_to_prompt([0, 4], 7) is None


def test_no_attention_to_images():
    assert [cells.tolist() for cells in image_heat(np.zeros(7), GRIDS)] == [[[0, 0]], [[0, 0], [0, 0]]]
