"""The panels beside an answer."""

import base64
import re
from io import BytesIO

import numpy as np
from PIL import Image

from modeling_sparse_moe_vlm.toolbox.app.answers import Answer
from modeling_sparse_moe_vlm.toolbox.app.drawings import alpha_html, draw_experts, draw_heat
from modeling_sparse_moe_vlm.toolbox.app.panels import figures, note, panels, problem

IMAGES = [Image.new("RGB", (20, 10), "white"), Image.new("RGB", (10, 10), "red")]


def drawn(code: str) -> list[np.ndarray]:
    """Returns the drawings in the HTML."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', code)
    return [np.array(Image.open(BytesIO(base64.b64decode(data)))) for data in found]


def test_panels():
    answer = Answer(
        "a cat",
        ["a", "cat"],
        alpha=[0.1, 0.2],
        count_free_alpha=[0.3, 0.4],
        heat=[np.array([[0.2, 0.1]]), np.array([[0.7]])],
        experts=[np.array([[[0, 1]]]), np.array([[[1]]])],
        layers=[3],
        groups=[[("joint", 2)]],
    )
    alpha, heat, experts = panels(answer, IMAGES)
    assert alpha == alpha_html(["a", "cat"], [0.1, 0.2], [0.3, 0.4])
    for ours, image, cells in zip(drawn(heat), IMAGES, answer.heat, strict=True):
        assert (ours == np.array(draw_heat(image, cells, 0.7))).all(), "all images have one scale"
    for ours, image, cells in zip(drawn(experts), IMAGES, answer.experts, strict=True):
        assert (ours == np.array(draw_experts(image, cells, [3], [[("joint", 2)]]))).all()
    for code, description in ((heat, "heat over image"), (experts, "experts of image")):
        assert re.findall(r'alt="([^"]+)"', code) == [f"{description} 1", f"{description} 2"]
        assert re.findall("<figcaption>(.*?)</figcaption>", code) == ["image 1", "image 2"]


def test_notes_instead_of_panels():
    answer = Answer("", alpha_note="no α", heat_note="no <heat>", experts_note="no experts")
    assert panels(answer, IMAGES) == (note("no α"), note("no <heat>"), note("no experts"))
    assert note("no <heat>") == '<p class="note">no &lt;heat&gt;</p>'


def test_problems_are_one_line():
    assert problem("one\n  <b>two</b>") == '<p class="problem">one &lt;b&gt;two&lt;/b&gt;</p>'


def test_a_single_figure_has_no_number():
    code = figures([IMAGES[0]], "heat over image")
    assert "figcaption" not in code
    assert 'width="20" alt="heat over image 1"' in code
    assert (drawn(code)[0] == np.array(IMAGES[0])).all()
