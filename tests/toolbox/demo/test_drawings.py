"""Figures of answers and expert loads: drawn for any answer, and correct where the metric says so."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from modeling_sparse_moe_vlm.toolbox.demo import drawings
from modeling_sparse_moe_vlm.toolbox.demo.drawings import draw_answers, draw_expert_load, some_of_each

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
def test_missing_experts_are_blank(tmp_path):
    nan = torch.nan
    draw_expert_load({"text": torch.tensor([[0.5, 0.5, 0.0]])}, tmp_path / "idle.png")
    draw_expert_load({"text": torch.tensor([[0.5, 0.5, nan]])}, tmp_path / "gap.png")
    idle, gap = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("idle.png", "gap.png"))
    darkest = (68, 1, 84)  # of the colour map: a load of 0
    # Both images have it in the scale; only the first has it in the map.
    assert (idle == darkest).all(axis=2).sum() > 5 * (gap == darkest).all(axis=2).sum()


def test_equal_shares_look_balanced_in_layers_of_any_size(tmp_path):
    nan = torch.nan
    draw_expert_load({"text": torch.tensor([[0.25] * 4, [0.5, 0.5, nan, nan]])}, tmp_path / "load.png")
    image = np.asarray(Image.open(tmp_path / "load.png").convert("RGB"))
    brightest = (253, 231, 36)
    cells = (image == brightest).all(axis=2)
    # The upper layer fills its line, and the lower layer half of its line, in the same colour.
    lines = cells.sum(axis=1)
    filled = np.flatnonzero(lines > lines.max() / 4)
    middle = (filled[0] + filled[-1]) // 2
    assert round(lines[:middle].max() / lines[middle + 1 :].max()) == 2


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="`load` is empty"):
        draw_expert_load({}, tmp_path / "load.png")


# ------------------------------------------------------------------------------------------ contents of the figures


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that are drawn, with the paths that they would be saved to."""
    figures: list = []
    monkeypatch.setattr(drawings, "save_figure", lambda figure, path: figures.append((figure, path)))
    return figures


def test_answers_are_above_their_images(drawn, tmp_path):
    shades = (10, 20, 30)
    rows = [
        {"image": Image.new("RGB", (4, 4), (shade,) * 3), "question": f"Question {shade}?", "answer": f"answer {shade}"}
        for shade in shades
    ]
    rows[2]["question"] = "a question that does not fit into one line of the title"
    draw_answers(
        rows, ["Answer 10.", "", "wrong answer with more words than fit into one line"], tmp_path / "a.png", columns=2,
        title="One of three",
    )  # fmt: skip
    ((figure, path),) = drawn
    assert path == tmp_path / "a.png"
    assert tuple(figure.get_size_inches()) == pytest.approx((6.4, 8.8))
    assert figure.get_suptitle() == "One of three"
    *filled, empty = figure.axes
    assert [axes.get_title() for axes in filled] == [
        "Question 10?",
        "Question 20?",
        "a question that does not fit into\none line of the title",
    ]
    assert [axes.get_xlabel() for axes in filled] == [
        "model: Answer 10.\u00a0✓\nreference: answer 10",
        "model: (nothing)\u00a0✗\nreference: answer 20",
        "model: wrong answer with more\nwords than fit into one line\u00a0✗\nreference: answer 30",
    ]
    colours = ["darkgreen", "firebrick", "firebrick"]
    assert [axes.xaxis.label.get_color() for axes in filled] == colours
    for axes, colour in zip(filled, colours, strict=True):
        assert {(to_hex(side.get_edgecolor()), side.get_linewidth()) for side in axes.spines.values()} == {
            (to_hex(colour), 3)
        }
    for axes, shade in zip(filled, shades, strict=True):
        (image,) = axes.images
        assert (np.asarray(image.get_array()) == shade).all()
        assert image.get_interpolation() == "nearest"
    assert not empty.images
    assert [axes.axison for axes in figure.axes] == [True, True, True, False]
    assert [axes.get_subplotspec().get_geometry()[:2] for axes in figure.axes] == [(2, 2)] * 4


@pytest.mark.parametrize(
    ("num_right", "num_wrong", "number", "expected"),
    [(20, 20, 12, (8, 4)), (20, 2, 12, (10, 2)), (3, 20, 12, (3, 9)), (2, 1, 12, (2, 1)), (20, 0, 12, (12, 0))],
)
def test_failures_are_shown_beside_successes(num_right, num_wrong, number, expected):
    flags = [True] * num_right + [False] * num_wrong
    chosen = some_of_each(flags, number)
    assert len(set(chosen)) == len(chosen)
    assert (sum(flags[i] for i in chosen), sum(not flags[i] for i in chosen)) == expected
    assert chosen == some_of_each(flags, number)
    assert len(chosen) < 12 or chosen != some_of_each(flags, number, seed=1)


def test_four_images_are_in_a_line(drawn, tmp_path):
    draw_answers([row("cat")] * 4, ["cat"] * 4, tmp_path / "a.png")
    draw_answers([row("cat")] * 5, ["cat"] * 5, tmp_path / "a.png")
    assert [figure.axes[0].get_subplotspec().get_geometry()[:2] for figure, _ in drawn] == [(1, 4), (2, 4)]


def test_maps_show_the_load_times_the_number_of_experts(drawn, tmp_path):
    nan = torch.nan
    load = {
        "text": torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.75, 0.25, nan, nan]]),
        "image": torch.tensor([[nan, nan, 0.5, 0.5], [1.0, nan, nan, nan]]),
    }
    draw_expert_load(load, tmp_path / "load.png")
    ((figure, path),) = drawn
    assert path == tmp_path / "load.png"
    text, image, scale = figure.axes
    np.testing.assert_array_equal(np.ma.filled(text.images[0].get_array(), nan), [[2, 1, 1, 0], [1.5, 0.5, nan, nan]])
    np.testing.assert_array_equal(
        np.ma.filled(image.images[0].get_array(), nan), [[nan, nan, 1, 1], [1, nan, nan, nan]]
    )
    assert [axes.images[0].get_clim() for axes in (text, image)] == [(0, 2), (0, 2)], "one scale for both"
    assert [axes.get_title() for axes in (text, image)] == ["text tokens", "image tokens"]
    for axes in (text, image):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert", "sparse layer")
        assert list(axes.get_xticks()) == [0, 1, 2, 3]
        assert list(axes.get_yticks()) == [0, 1]
    numbers = {label.get_position(): (label.get_text(), label.get_color()) for label in text.texts}
    assert numbers == {
        (0, 0): ("2.00", "black"), (1, 0): ("1.00", "white"), (2, 0): ("1.00", "white"), (3, 0): ("0.00", "white"),
        (0, 1): ("1.50", "black"), (1, 1): ("0.50", "white"),
    }  # fmt: skip
    assert {label.get_position() for label in image.texts} == {(2, 0), (3, 0), (0, 1)}
    assert scale.get_ylabel() == "load relative to balanced"
    assert figure.get_suptitle() == "Load of the routed experts (1: balanced, blank: no expert)"
    assert tuple(figure.get_size_inches()) == pytest.approx((7.5, 2.6))


def test_the_scale_reaches_a_balanced_load(drawn, tmp_path):
    draw_expert_load({"text": torch.zeros(1, 8)}, tmp_path / "load.png")
    ((figure, _),) = drawn
    assert figure.axes[0].images[0].get_clim() == (0, 1)
    assert tuple(figure.get_size_inches()) == pytest.approx((5.5, 2.1))


def test_files_have_the_size_of_their_figure(tmp_path):
    draw_answers([row("cat")], ["cat"], tmp_path / "a.png", columns=1)
    assert Image.open(tmp_path / "a.png").size == (352, 484)
