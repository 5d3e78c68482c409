"""Explanation of an answer, on a model without training."""

import pytest
import torch
from PIL import Image

from modeling_sparse_moe_vlm.toolbox.modality_weights.explanation import draw_explanation, explain
from tests.support.processors import make_picture, make_processor, make_speaking_model


@pytest.fixture(scope="module")
def explained():
    model, processor, picture = make_speaking_model().eval(), make_processor(), make_picture(0)
    before = model.config._attn_implementation
    explanation = explain(model, processor, picture, "What is this?")
    assert model.config._attn_implementation == before
    return model, explanation, picture


def test_it_adds_up(explained):
    model, explanation, _ = explained
    assert len(explanation.words) == len(explanation.alpha) == len(explanation.count_free_alpha) > 0
    assert ((explanation.alpha > 0) & (explanation.alpha < 1)).all()
    assert explanation.looked.shape == (2, 2)
    torch.testing.assert_close(explanation.looked.sum(), torch.tensor(1.0))
    text = model.config.text_config
    assert explanation.experts.shape == (text.num_hidden_layers, 2, 2)
    assert ((explanation.experts >= 0) & (explanation.experts < text.num_experts)).all()


def test_it_depends_on_the_picture_alone(explained):
    model, explanation, picture = explained
    again = explain(model, make_processor(), picture, "What is this?")
    torch.testing.assert_close(again.alpha, explanation.alpha)
    other = explain(model, make_processor(), make_picture(1), "What is this?")
    assert not torch.allclose(other.looked, explanation.looked)


def test_the_picture_is_drawn(explained, tmp_path):
    _, explanation, picture = explained
    draw_explanation(explanation, picture, "What is this?", tmp_path / "explanation.png")
    assert Image.open(tmp_path / "explanation.png").width > 500
