"""Drawings, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from modeling_sparse_moe_vlm.toolbox.app.drawings import (
    alpha_html,
    draw_experts,
    draw_heat,
    expert_colour,
    fit,
    magma,
    percent,
)

WHITE = Image.new("RGB", (20, 10), "white")


def test_magma():
    colours = magma(np.array([[-1.0, 0.0, 0.0625], [0.5, 1.0, 2.0]]))
    assert colours.dtype == np.uint8
    assert colours.tolist() == [
        [[0, 0, 4], [0, 0, 4], [14, 8, 36]],
        [[181, 54, 122], [252, 253, 191], [252, 253, 191]],
    ]


@pytest.mark.parametrize(("share", "text"), [(0.0, "0 %"), (0.372256, "37.2 %"), (0.04, "4 %"), (0.000123, "0.0123 %")])
def test_percent(share, text):
    assert percent(share) == text


def test_colours_of_experts():
    ours = [expert_colour(0, number, 4) for number in range(4)]
    assert len({*ours, *(expert_colour(1, number, 4) for number in range(4))}) == 8
    assert all(red > green > blue for red, green, blue in ours), "the first group is orange"
    assert [sum(colour) for colour in ours] == sorted(sum(colour) for colour in ours), "later experts are lighter"
    blue = expert_colour(1, 0, 4)
    assert blue[2] > blue[1] > blue[0]
    assert expert_colour(6, 1, 4) == expert_colour(0, 1, 4), "the hues start over"


def test_fit():
    assert fit(WHITE, 100).size == (100, 50)
    assert fit(Image.new("L", (10, 20)), 10).size == (5, 10)
    assert fit(Image.new("L", (300, 1)), 30).size == (30, 1)
    checks = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8))
    assert set(np.unique(np.array(fit(checks, 30)))) == {0, 255}, "small images keep hard edges"


def test_heat():
    """The largest value has almost the brightest colour. The smallest one shows more of the image."""
    drawing = draw_heat(WHITE, np.array([[0.0, 0.3]]), side=200)
    assert drawing.size == (200, 136)
    pixels = np.array(drawing).astype(int)
    assert pixels[50, 50].tolist() == [165, 165, 166]  # 90/255 of the darkest colour over white
    assert pixels[50, 150].tolist() == [253, 253, 204]  # 205/255 of the brightest one
    assert (pixels[:100, :100] == pixels[50, 50]).all()
    assert (pixels[:100, 100:] == pixels[50, 150]).all()
    assert pixels[110, 0].tolist() == [0, 0, 4]
    assert pixels[110, -1].tolist() == [252, 253, 191]
    assert (pixels[118:] < 128).any(), "the scale has numbers"


def test_heat_of_several_images_has_one_scale():
    pixels = [np.array(draw_heat(WHITE, np.array([[0.1]]), highest, side=50))[10, 10] for highest in (None, 0.1, 0.2)]
    assert pixels[0].tolist() == pixels[1].tolist() != pixels[2].tolist()
    assert pixels[2].tolist() == [212, 138, 178]


def test_no_heat():
    pixels = np.array(draw_heat(WHITE, np.zeros((2, 2)), side=50))
    assert pixels[10, 10].tolist() == [165, 165, 166]


def test_experts():
    """Two layers are drawn beside each other. Their cells have the colours of their experts, over the image."""
    experts = np.array([[[0, 1]], [[2, 3]]])
    groups = [[("joint", 3)], [("joint", 2), ("image", 1)]]
    drawing = draw_experts(WHITE, experts, [0, 2], groups, side=100)
    assert drawing.size == (340, (50 + 8 + 22) + 2 * 26 + 8)
    pixels = np.array(drawing).astype(int)

    def over_white(colour):
        return [round(255 + 0.72 * (channel - 255)) for channel in colour]

    def assert_is(pixel, colour):
        assert np.abs(pixel - over_white(colour)).max() <= 1

    assert_is(pixels[22 + 5, 5], expert_colour(0, 0, 3))
    assert_is(pixels[22 + 5, 55], expert_colour(0, 1, 3))
    assert_is(pixels[22 + 5, 108 + 5], expert_colour(1, 0, 1))
    assert pixels[22 + 5, 108 + 55].tolist() == [255, 255, 255], "the sentinel stands for no expert"
    # The legend has the colours of both groups, with the largest number of experts of any layer.
    assert pixels[80 + 2, 71].tolist() == list(expert_colour(0, 0, 3))
    assert pixels[80 + 2, 71 + 48].tolist() == list(expert_colour(0, 2, 3))
    assert pixels[80 + 26 + 2, 71].tolist() == list(expert_colour(1, 0, 1))
    assert pixels[80 + 26 + 2, 71 + 24].tolist() == [255, 255, 255]


def test_the_image_below_experts_is_grey():
    """Colours of the same brightness give the same cells."""
    experts, groups = np.zeros((1, 1, 1), dtype=int), [[("joint", 1)]]
    colours = ((255, 0, 0), (76, 76, 76), (0, 0, 0))
    drawn = [np.array(draw_experts(Image.new("RGB", (20, 10), colour), experts, [0], groups)) for colour in colours]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[1][27, 5].astype(int) - drawn[2][27, 5]).tolist() == pytest.approx([0.28 * 76] * 3, abs=1)


def test_layers_beyond_the_columns_go_below():
    experts = np.zeros((3, 1, 1), dtype=int)
    drawing = draw_experts(WHITE, experts, [0, 1, 2], [[("joint", 1)]] * 3, side=200, columns=2)
    assert drawing.size == (2 * 208, 2 * 130 + 26 + 8)


def test_a_long_legend_is_cut():
    experts = np.zeros((1, 1, 1), dtype=int)
    drawing = draw_experts(WHITE, experts, [0], [[("joint", 64)]], side=100)
    assert drawing.width == 340


def test_alpha_html():
    code = alpha_html(["<b>", "cat"], [0.25, 0.754], [0.5, 0.6])
    assert code == (
        '<div class="alpha"><div class="words">'
        '<span class="word" style="background:rgba(234,108,16,0.25)" title="count-free α 0.500">'
        "<span>&lt;b&gt;</span><small>0.25</small></span>"
        '<span class="word" style="background:rgba(234,108,16,0.75)" title="count-free α 0.600">'
        "<span>cat</span><small>0.75</small></span></div>"
        '<div class="scale"><span>0 (text)</span><i></i><span>1 (images)</span></div>'
        "<p>Mean α <b>0.502</b>, count-free <b>0.550</b></p></div>"
    )
