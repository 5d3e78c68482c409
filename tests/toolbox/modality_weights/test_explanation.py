"""Explains an answer: each value computed by hand for a model with given outputs, and a real model without training."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from modeling_sparse_moe_vlm.toolbox.modality_weights import explanation as module
from modeling_sparse_moe_vlm.toolbox.modality_weights.explanation import Explanation, draw_explanation, explain
from tests.support.processors import make_image, make_processor, make_speaking_model

IMAGE, SPECIAL, END = 3, 50, 2
PROMPT = [1, 8, IMAGE, IMAGE, IMAGE, IMAGE, 9]
WORDS = {11: "a", 12: "b", 13: "c"}
LAYERS, HEADS = 2, 3


class Processor:
    """Knows three words. All other tokens are special tokens."""

    def apply_chat_template(self, messages, **options):
        assert options == {
            "add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"
        }  # fmt: skip
        self.messages = messages
        inputs = {"input_ids": torch.tensor([PROMPT]), "pixel_values": torch.zeros(1, 3, 4, 4)}
        return SimpleNamespace(to=lambda device: inputs)

    def decode(self, tokens, skip_special_tokens):
        (token,) = tokens
        assert skip_special_tokens
        return WORDS.get(int(token), "")


class Model:
    """Returns a fixed answer, and random weights and attentions. Its routers do not choose the largest logits."""

    device = "cpu"

    def __init__(self, answer: list[int]):
        generator = torch.Generator().manual_seed(0)
        self.sequences = torch.tensor([PROMPT + answer])
        length = self.sequences.shape[1]
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.model = SimpleNamespace(get_mm_token_type_ids=lambda tokens: (tokens == IMAGE).long())
        # The first step is the prefill.
        self.steps = {
            name: [
                [torch.rand(1, HEADS, 1 if step else len(PROMPT), 2, generator=generator) for _ in range(LAYERS)]
                for step in range(len(answer))
            ]
            for name in ("modality_weights", "count_free_modality_weights")
        }
        self.attentions = [torch.rand(1, HEADS, length, length, generator=generator) for _ in range(LAYERS)]
        self.router_logits = [torch.rand(length, 5, generator=generator) for _ in range(LAYERS)]
        self.router_indices = [logits.argsort(dim=-1)[:, 1:3] for logits in self.router_logits]

    def set_attn_implementation(self, name):
        self.config._attn_implementation = name

    def generate(self, input_ids, pixel_values, **options):
        assert self.config._attn_implementation == "sdpa"
        assert options["output_modality_weights"]
        assert options["return_dict_in_generate"]
        assert not options["do_sample"]
        assert input_ids.tolist() == [PROMPT]
        return SimpleNamespace(sequences=self.sequences, **self.steps)

    def __call__(self, input_ids, pixel_values, **options):
        assert self.config._attn_implementation == "eager"
        assert options == {"output_attentions": True, "output_router_logits": True}
        assert torch.equal(input_ids, self.sequences)
        return SimpleNamespace(
            attentions=self.attentions, router_logits=self.router_logits, router_indices=self.router_indices
        )


def test_with_tiles_the_thumbnail_is_explained():
    """The image tokens are those of 3 tiles and, at place 5 of the prompt, that of the thumbnail."""
    model, processor = Model([11]), Processor()
    processor.image_seq_length = 1
    explanation = explain(model, processor, make_image(0), "Why?")
    assert explanation.looked.tolist() == [[1.0]]
    assert explanation.experts.tolist() == [[[chosen[5, 0].item()]] for chosen in model.router_indices]


@pytest.mark.parametrize(
    ("answer", "steps"),
    [([11, 12, 13], [0, 1, 2]), ([12, END], [0]), ([SPECIAL, 11, SPECIAL, 13, END], [1, 3])],
    ids=["words", "words and the end", "special tokens between"],
)
def test_every_value_belongs_to_its_word(answer, steps):
    model, processor = Model(answer), Processor()
    explanation = explain(model, processor, make_image(0), "Why?")
    (message,) = processor.messages
    assert message["role"] == "user"
    assert message["content"][0] == {"type": "image", "image": make_image(0)}
    assert message["content"][1] == {"type": "text", "text": "Why?"}

    assert explanation.words == [WORDS[answer[step]] for step in steps]
    for name, ours in (
        ("modality_weights", explanation.alpha),
        ("count_free_modality_weights", explanation.count_free_alpha),
    ):
        # The share of images, for the last query of the step, by layer and head.
        expected = [
            sum(weights[0, head, -1, 1].item() for weights in model.steps[name][step] for head in range(HEADS)) / 6
            for step in steps
        ]
        torch.testing.assert_close(ours, torch.tensor(expected))

    looked = torch.zeros(4)
    for matrix in model.attentions:
        for head in range(HEADS):
            for step in steps:
                query = len(PROMPT) - 1 + step  # the previous token, which predicts it
                looked += matrix[0, head, query, 2:6]
    torch.testing.assert_close(explanation.looked, (looked / looked.sum()).view(2, 2))

    expected = [[chosen[2 + token, 0].item() for token in range(4)] for chosen in model.router_indices]
    assert explanation.experts.tolist() == torch.tensor(expected).view(LAYERS, 2, 2).tolist()
    assert model.config._attn_implementation == "sdpa"


def test_an_empty_answer():
    with pytest.raises(ValueError, match=r"the answer to 'Why\?' is empty"):
        explain(Model([SPECIAL, END]), Processor(), make_image(0), "Why?")


def test_an_error_restores_the_attention_implementation(monkeypatch):
    model = Model([11])
    model.router_logits = None
    monkeypatch.setattr(Model, "__call__", lambda self, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain(model, Processor(), make_image(0), "Why?")
    assert model.config._attn_implementation == "sdpa"


def test_the_drawing_shows_the_values(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: drawn.append((figure, path)))
    explanation = Explanation(
        words=["no", " $", "!"],
        alpha=torch.tensor([0.25, 0.5, 0.75]),
        count_free_alpha=torch.tensor([0.1, 0.2, 0.3]),
        looked=torch.tensor([[0.1, 0.2], [0.3, 0.4]]),
        experts=torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]]),
    )
    draw_explanation(explanation, make_image(0, width=20, height=24), "Why?", tmp_path / "file.png")
    ((figure, path),) = drawn
    assert path == tmp_path / "file.png"
    assert figure.get_suptitle() == "Why?  –  no $!"
    shown, scale, bars, *chosen = figure.axes
    image, attention = shown.images
    assert image.get_array().shape == (24, 20)
    assert scale.get_xlabel() == "share of the attention to the image"
    assert attention.get_clim() == pytest.approx((0, 0.4))
    assert attention.get_array().tolist() == explanation.looked.tolist()
    assert tuple(attention.get_extent()) == tuple(image.get_extent()) == (0, 20, 24, 0)

    assert [bar.get_height() for bar in bars.patches[:3]] == [0.25, 0.5, 0.75]
    assert [bar.get_height() for bar in bars.patches[3:]] == [0.75, 0.5, 0.25]
    assert [bar.get_y() for bar in bars.patches[3:]] == [0.25, 0.5, 0.75], "β on top of α"
    assert [bars.patches[0].get_label(), bars.containers[0].get_label()] == ["_nolegend_", "α: share on the image"]
    assert bars.containers[1].get_label() == "β: share on the text"
    (points,) = bars.lines
    assert points.get_xdata().tolist() == [0, 1, 2]
    torch.testing.assert_close(torch.tensor(points.get_ydata()), explanation.count_free_alpha)
    assert [label.get_text() for label in bars.get_xticklabels()] == ["no", " $", "!"]
    assert bars.get_ylim() == (0, 1)

    # One map per layer, with the number of the expert in the middle of each token, and its colour in the key.
    assert [axes.get_title() for axes in chosen] == ["sparse layer 0", "sparse layer 1"]
    key = figure.subfigs[2].legends[0]
    key = {text.get_text(): patch.get_facecolor() for text, patch in zip(key.get_texts(), key.get_patches())}
    assert list(key) == [f"expert {expert}" for expert in range(8)]
    assert len(set(key.values())) == 8
    for axes, experts in zip(chosen, explanation.experts, strict=True):
        middles = {(5, 6): experts[0, 0], (15, 6): experts[0, 1], (5, 18): experts[1, 0], (15, 18): experts[1, 1]}
        assert {text.get_position(): int(text.get_text()) for text in axes.texts} == middles
        _, colours = axes.images
        assert [[tuple(cell) for cell in row] for row in colours.get_array().tolist()] == [
            [key[f"expert {expert}"] for expert in row] for row in experts.tolist()
        ]


def test_many_layers_are_sampled_and_many_tokens_have_no_numbers(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: drawn.append(figure))
    explanation = Explanation(
        words=["yes"],
        alpha=torch.tensor([0.25]),
        count_free_alpha=torch.tensor([0.1]),
        looked=torch.full((7, 7), 1 / 49),
        experts=torch.arange(11 * 49).view(11, 7, 7) % 30,
    )
    draw_explanation(explanation, make_image(0), "Why?", tmp_path / "file.png")
    chosen = drawn[0].axes[3:]
    assert [axes.get_title() for axes in chosen] == [f"sparse layer {layer}" for layer in (0, 2, 4, 6, 8, 10)]
    assert not any(axes.texts for axes in chosen)
    assert not drawn[0].subfigs[2].legends, "30 experts have no colours of their own"


# ---------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def explained():
    model, processor, image = make_speaking_model().eval(), make_processor(), make_image(0)
    before = model.config._attn_implementation
    explanation = explain(model, processor, image, "What is this?")
    assert model.config._attn_implementation == before
    return model, explanation, image


def test_shapes_and_ranges(explained):
    model, explanation, _ = explained
    assert len(explanation.words) == len(explanation.alpha) == len(explanation.count_free_alpha) > 0
    assert ((explanation.alpha > 0) & (explanation.alpha < 1)).all()
    assert explanation.looked.shape == (2, 2)
    torch.testing.assert_close(explanation.looked.sum(), torch.tensor(1.0))
    text = model.config.text_config
    assert explanation.experts.shape == (text.num_hidden_layers, 2, 2)
    assert ((explanation.experts >= 0) & (explanation.experts < text.num_experts)).all()


def test_it_depends_only_on_the_image(explained):
    model, explanation, image = explained
    again = explain(model, make_processor(), image=image, question="What is this?")
    torch.testing.assert_close(again.alpha, explanation.alpha)
    other = explain(model, make_processor(), make_image(1), "What is this?")
    assert not torch.allclose(other.looked, explanation.looked)


def test_the_image_is_drawn(explained, tmp_path):
    _, explanation, image = explained
    draw_explanation(explanation, image=image, question="What is this?", path=tmp_path / "explanation.png")
    assert Image.open(tmp_path / "explanation.png").width > 500
