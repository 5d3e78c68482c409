"""Pictures of what a model does: drawn without complaint whatever it says, and right where the metric says so."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_sparse_moe_vlm.toolbox.demo.drawings import draw_answers, draw_expert_load

GREEN, RED = (0, 100, 0), (178, 34, 34)  # darkgreen, firebrick


def colours(path) -> set[tuple[int, ...]]:
    return {tuple(pixel) for pixel in np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).tolist()}


def row(answer: str) -> dict:
    return {"image": Image.new("RGB", (16, 16), "white"), "question": "What is this?", "answer": answer}


@pytest.mark.parametrize(
    ("answer", "shown", "hidden"), [("cat", GREEN, RED), (" Cat.", GREEN, RED), ("dog", RED, GREEN)]
)
def test_right_answers_are_those_of_the_metric(tmp_path, answer, shown, hidden):
    draw_answers([row("cat")], [answer], tmp_path / "answers.png")
    found = colours(tmp_path / "answers.png")
    assert shown in found
    assert hidden not in found


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("answer", ["🐈 and 猫", "$x_", "$\\frac{$", "", "\x00\ufffd"])
def test_any_answer_can_be_drawn(tmp_path, answer):
    draw_answers([row("cat 🐈")], [answer], tmp_path / "answers.png")
    assert RED in colours(tmp_path / "answers.png")


@pytest.mark.filterwarnings("error")
def test_experts_that_are_not_there_are_blank(tmp_path):
    nan = torch.nan
    draw_expert_load({"text": torch.tensor([[0.5, 0.5, 0.0]])}, tmp_path / "idle.png")
    draw_expert_load({"text": torch.tensor([[0.5, 0.5, nan]])}, tmp_path / "gap.png")
    idle, gap = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("idle.png", "gap.png"))
    darkest = (68, 1, 84)  # of the colour map: a load of 0
    # Both pictures have it in the scale; only the first has it in the map.
    assert (idle == darkest).all(axis=2).sum() > 5 * (gap == darkest).all(axis=2).sum()


def test_equal_shares_look_balanced_in_layers_of_any_size(tmp_path):
    nan = torch.nan
    draw_expert_load({"text": torch.tensor([[0.25] * 4, [0.5, 0.5, nan, nan]])}, tmp_path / "load.png")
    picture = np.asarray(Image.open(tmp_path / "load.png").convert("RGB"))
    brightest = (253, 231, 36)
    cells = (picture == brightest).all(axis=2)
    # The upper layer fills its line, the lower one half of it, in the same colour.
    lines = cells.sum(axis=1)
    assert {round(4 * number / lines.max()) for number in lines[lines > lines.max() / 4]} == {2, 4}


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="`load` is empty"):
        draw_expert_load({}, tmp_path / "load.png")
