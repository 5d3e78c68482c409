"""The routing report: what it measures, and what the page shows of it."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import MixtralConfig

from modeling_sparse_moe_vlm import SparseMoeVlmProcessor
from modeling_sparse_moe_vlm.toolbox.app.answers import NO_EXPERTS, Answer
from modeling_sparse_moe_vlm.toolbox.data import BadRowError, VisionLanguageCollator, load_rows
from modeling_sparse_moe_vlm.toolbox.model_size import ModelSize
from modeling_sparse_moe_vlm.toolbox.routing import RoutingCounts, measure_routing
from modeling_sparse_moe_vlm.toolbox.routing.layout import (
    RoutedGroup,
    RoutedLayer,
    RoutingLayout,
    statistics_by_layer,
)
from modeling_sparse_moe_vlm.toolbox.routing.passes import watch_passes
from modeling_sparse_moe_vlm.toolbox.routing.report import routing_report
from modeling_sparse_moe_vlm.toolbox.routing.report.charts import line_chart
from modeling_sparse_moe_vlm.toolbox.routing.report.colours import LOAD_SCALE, LOAD_STOPS, cell_style, gradient, scale
from modeling_sparse_moe_vlm.toolbox.routing.report.contents import (
    Difference,
    Example,
    RoutingReport,
    ShownRow,
    UnusualRow,
)
from modeling_sparse_moe_vlm.toolbox.routing.report.examples import shown_row, spread_evenly
from modeling_sparse_moe_vlm.toolbox.routing.report.measure import differences_of, most_divergent
from modeling_sparse_moe_vlm.toolbox.routing.report.page import (
    facts_of,
    grid_colours,
    load_table,
    pair_shares,
    pairs_of,
    top_pairs,
)
from tests import test_videos
from tests.support.in_tree_models import TEXT, make_llava
from tests.support.in_tree_moe import make_mixtral
from tests.support.processors import (
    VOCAB_SIZE,
    assistant,
    make_image,
    make_processor,
    make_speaking_model,
    make_tokenizer,
    speak_printably,
    user,
)

BOTH = ("text", "image")
EVIL = "<script>alert('α')</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Collects the elements of a page, its texts, and what it refers to."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self.scripts, self.open = [], [], [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.texts).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def of(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def make_report(layout=None, coactivation=None, **fields) -> RoutingReport:
    """Returns a report of two layers with three experts, worked out by hand."""
    layout = layout or RoutingLayout(
        BOTH, tuple(RoutedLayer(number, (RoutedGroup("joint", 3, BOTH),)) for number in (1, 5))
    )
    counts = RoutingCounts(
        tokens=torch.tensor([10, 4]),
        wanted=torch.tensor([[[14, 6, 0], [2, 4, 2]], [[10, 10, 0], [8, 0, 0]]]),
        dropped=torch.tensor([[[5, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]),
        entropy=torch.tensor([[[5.493061], [1.0]], [[1.0], [1.0]]]),
    )
    pairs = torch.tensor([[16, 8, 1], [8, 10, 1], [1, 1, 2]])
    defaults = {
        "model": "my/model",
        "model_class": "MyModel",
        "size": ModelSize(2_500_000, {"text": 1_000_000, "image": 1_500_000}),
        "data": "rows.jsonl",
        "num_rows": 1200,
        "layout": layout,
        "counts": counts,
        "statistics": statistics_by_layer(layout, counts, ["joint"]),
        "coactivation": [pairs, pairs * 2] if coactivation is None else coactivation,
        "experts_per_token": [2, 2],
        "divergences": np.array([[0.1, 0.5], [0.3, np.nan], [0.2, 0.1]]),
    }
    return RoutingReport(**defaults | fields)


# ------------------------------------------------------------------------------------------------ measuring


def test_rows_that_differ_most():
    assert most_divergent(np.array([0.1, 0.4, np.nan, 0.4, 0.0, 0.2]), 4) == [1, 3, 5, 0]
    assert most_divergent(np.array([0.1, 0.4, np.nan, 0.4, 0.0, 0.2]), 2) == [1, 3]
    assert most_divergent(np.array([0.0, np.nan]), 2) == []


def test_what_differs():
    groups = (RoutedGroup("text", 1, ("text",)), RoutedGroup("image", 2, ("image",)))
    layout = RoutingLayout(BOTH, (RoutedLayer(3, groups), RoutedLayer(7, groups)))
    shares = np.array([[np.nan, np.nan, np.nan], [0.0, 0.9, 0.1]])
    mean = np.array([[0.5, 0.25, 0.25], [0.3, 0.5, 0.2]])
    assert differences_of(layout, shares, mean, 2) == [
        Difference(7, "image", 0, 0.9, 0.5),
        Difference(7, "text", 0, 0.0, 0.3),
    ]
    assert [item.expert for item in differences_of(layout, shares, mean, 10)] == [0, 0, 1]
    assert differences_of(layout, mean, mean, 2) == []


def test_examples_are_spread_evenly():
    assert spread_evenly([2, 3, 5, 8, 9], 3) == [2, 5, 9]
    assert spread_evenly([2, 3, 5, 8, 9], 2) == [2, 9]
    assert spread_evenly([2, 3, 5], 1) == [2]
    assert spread_evenly([2, 3], 4) == [2, 3]
    assert spread_evenly([2, 3], 0) == spread_evenly([], 4) == []


def test_rows_are_shown_with_their_name():
    image = make_image()
    row = {"messages": [user(image, "Why?", " Now?"), {"role": "assistant", "content": "yes"}]}
    shown = shown_row(row | {"source": "train.jsonl", "row": 12}, 3)
    assert (shown.name, shown.messages) == ("train.jsonl, row 12", [("user", "Why?\n Now?"), ("assistant", "yes")])
    assert [item.size for item in shown.images] == [image.size]
    assert shown_row(row, 3).name == "row 3"


def make_rows(number: int = 7) -> list[dict]:
    """Returns rows of different lengths, of which every third has no image."""
    return [
        {
            "messages": [
                user("Can you see the cat? " * (i % 2 + 1)) if i % 3 == 2 else user(make_image(i), "the mat"),
                assistant("yes"),
            ]
        }
        for i in range(number)
    ]


def test_of_a_model():
    model, processor, rows = speak_printably(make_speaking_model(expert_groups="joint")), make_processor(), make_rows()
    model.train()
    report = routing_report(model, processor, rows, batch_size=3, num_examples=2, num_unusual=2, max_new_tokens=3)
    assert model.training
    model.eval()
    counts = measure_routing(model, [VisionLanguageCollator(processor)([row]) for row in rows])
    assert torch.equal(report.counts.tokens, counts.tokens)
    assert torch.equal(report.counts.wanted, counts.wanted)
    torch.testing.assert_close(report.counts.entropy, counts.entropy)
    assert report.statistics == statistics_by_layer(report.layout, report.counts, ["joint"])

    assert (report.num_rows, report.data, report.model_class) == (7, "rows", "SparseMoeVlmForConditionalGeneration")
    assert report.size.total == model.num_parameters()
    assert report.notes == []
    k = model.config.text_config.num_experts_per_tok
    assert report.experts_per_token == [k, k]
    for pairs, wanted in zip(report.coactivation, counts.wanted, strict=True):
        assert torch.equal(pairs.diagonal(), wanted.sum(dim=0))
        assert int(pairs.sum()) == k * k * int(counts.tokens.sum())

    # Rows 0 to 6 have images, except 2 and 5.
    assert np.isnan(report.divergences[:, 1]).tolist() == [False, False, True, False, False, True, False]
    assert [example.row.name for example in report.examples] == ["row 0", "row 6"]
    by_text = [row.divergence for row in report.unusual if row.modality == "text"]
    assert by_text == sorted(report.divergences[:, 0], reverse=True)[:2]
    for unusual in report.unusual:
        number = int(unusual.row.name.removeprefix("row "))
        modality_id = BOTH.index(unusual.modality)
        assert unusual.divergence == report.divergences[number, modality_id]
        own = measure_routing(model, [VisionLanguageCollator(processor)([rows[number]])])
        assert unusual.num_tokens == own.tokens[modality_id]
        for item in unusual.differences:
            wanted = own.wanted[item.layer, modality_id]
            assert item.share == pytest.approx(float(wanted[item.expert] / wanted.sum()))

    answer = report.examples[0].answer
    assert len(answer.words) == len(answer.alpha) > 0
    assert answer.experts[0].shape == (2, 2, 2)
    assert answer.heat[0].sum() == pytest.approx(1.0)
    assert model.config.text_config._attn_implementation == "sdpa"
    page = Page(report.to_html())
    assert page.open == []
    assert page.text.count("model’s answer") == 2


def test_videos_are_not_drawn():
    """α and the heat map are about images, so that the report does not say that all attention is on the text."""
    model, processor = test_videos.make_model(), test_videos.make_processor()
    video = {"type": "video", "video": [make_image(i) for i in range(2)]}
    messages = [{"role": "user", "content": [video, {"type": "text", "text": "What happens?"}]}, assistant("yes")]
    report = routing_report(model, processor, [{"messages": messages}], max_new_tokens=3)
    (example,) = report.examples
    notes = {example.answer.alpha_note, example.answer.heat_note, example.answer.experts_note}
    assert notes == {"The row has a video and no image. Videos are not drawn."}


def test_of_a_language_model_of_transformers():
    """Whatever it does not have is said in one line each."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    rows = [{"messages": [user(text), assistant("yes")]} for text in ("Why?", "Where is the cat? On the mat?")]
    report = routing_report(make_mixtral(vocab_size=VOCAB_SIZE).eval(), tokenizer, rows, model_name="mixtral")
    assert report.layout.modalities == ("text",)
    texts = [f"<|im_start|>{row['messages'][0]['content'][0]['text']}<|im_start|>yes" for row in rows]
    assert report.counts.tokens.tolist() == [sum(len(tokenizer(text).input_ids) for text in texts)]
    assert report.counts.wanted.sum(dim=-1).tolist() == [[2 * int(report.counts.tokens)]] * 2
    assert report.experts_per_token == [2, 2]
    assert report.examples == []
    text = Page(report.to_html()).text
    assert "No row has images, so there are no image tokens to draw and no attention to images." in text
    assert "mixtral (MixtralForCausalLM)" in text


class PlainProcessor(SparseMoeVlmProcessor):
    """Returns no modality ids, which a LLaVA does not accept."""

    def apply_chat_template(self, *args, **kwargs):
        inputs = super().apply_chat_template(*args, **kwargs)
        inputs.pop("mm_token_type_ids", None)
        return inputs


def test_images_of_a_mixture_of_experts_of_transformers():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
    model = speak_printably(make_llava(MixtralConfig(**TEXT | sizes)).eval())
    processor = make_processor()
    processor.__class__ = PlainProcessor
    report = routing_report(model, processor, make_rows(3), num_examples=1, max_new_tokens=3)
    assert report.layout.modalities == BOTH
    assert report.counts.tokens[1] == 8  # two images of four tokens
    assert report.counts.wanted[:, 1].sum(dim=-1).tolist() == [16, 16]
    (example,) = report.examples
    answer = example.answer
    assert (answer.alpha_note, answer.heat_note, answer.experts_note) == ("", "", "")
    assert len(answer.alpha) == len(answer.words) > 0
    assert answer.heat[0].sum() == pytest.approx(1.0)
    assert answer.groups == [[("experts", 4)]] * 2
    # The same experts as in a pass over this row.
    found = []
    handles = watch_passes(model, found.append)
    with torch.no_grad():
        model(**processor.apply_chat_template(
            [make_rows(1)[0]["messages"]], tokenize=True, return_dict=True, return_tensors="pt"
        ))  # fmt: skip
    for handle in handles:
        handle.remove()
    expected = [layer.chosen[found[0].ids == 1, 0].view(2, 2).tolist() for layer in found[0].layers]
    assert answer.experts[0].tolist() == expected


def test_rows_that_broke_after_they_were_loaded(tmp_path):
    """With `on_bad_row="skip"`, they are left out and the others keep their names."""
    for i in range(3):
        make_image(i).save(tmp_path / f"{i}.png")
    rows = [json.dumps({"image": f"{i}.png", "question": "Why?", "answer": "yes"}) for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    for policy in ("skip", "error"):
        loaded = load_rows(tmp_path / "rows.jsonl", on_bad_row=policy)
        (tmp_path / "1.png").write_bytes(b"no image")
        if policy == "skip":
            report = routing_report(make_speaking_model(), make_processor(), loaded, batch_size=1, max_new_tokens=1)
            assert report.num_rows == 2
            names = [example.row.name.rpartition(", ")[2] for example in report.examples]
            assert names == ["row 0", "row 2"]
            make_image(1).save(tmp_path / "1.png")
        else:
            with pytest.raises(BadRowError, match=r"rows\.jsonl, row 1"):
                routing_report(make_speaking_model(), make_processor(), loaded)


def test_mistakes():
    with pytest.raises(ValueError, match="llava has no routed experts"):
        routing_report(make_llava(), make_processor(), make_rows(), model_name="llava")
    with pytest.raises(ValueError, match="there are no rows"):
        routing_report(make_speaking_model(), make_processor(), [])
    row = make_rows(3)[2] | {"images": [make_image()], "source": "train.jsonl", "row": 4}
    with pytest.raises(ValueError, match=r"train\.jsonl, row 4 has 1 images in `images`, but 0 placeholders"):
        routing_report(make_speaking_model(), make_processor(), [row])


# ------------------------------------------------------------------------------------------------ the page


def test_facts():
    assert dict(facts_of(make_report())) == {
        "Model": "my/model (MyModel)",
        "Parameters": "2.5 M in total",
        "Active parameters": "1.0 M per text token, 1.5 M per image token",
        "Data": "rows.jsonl, 1,200 rows",
        "Tokens": "10 text, 4 image",
        "Sparse layers": "2 (1, 5)",
        "Routed experts per layer": "joint: 3",
        "Experts per token": "2",
    }
    other = dict(facts_of(make_report(size=ModelSize(10, {}), num_rows=1, experts_per_token=[1, 2])))
    assert other["Active parameters"] == "not known for this architecture"
    assert other["Data"] == "rows.jsonl, 1 row"
    assert other["Experts per token"] == "1 or 2"


def test_loads():
    load = load_table(make_report(), "text")
    (table,) = load["tables"]
    assert (load["modality"], table["group"], table["width"], table["numbered"]) == ("text", "joint", 3, True)
    first, second = table["rows"]
    assert (first["layer"], second["layer"]) == ("1", "5")
    assert [cell["text"] for cell in first["cells"]] == ["2.10", "0.90", "0.00"]
    assert [cell["dead"] for cell in first["cells"]] == [False, False, True]
    assert first["cells"][0]["title"] == "expert 0: 14 choices, 70.0 %"
    # max violation 3 · 0.7 − 1; entropy 0.5493 / ln 3; effective experts exp(0.611); dropped 5 of 20.
    assert first["figures"] == ["1.10", "0.50", "1.8", "1", "25.0 %"]
    assert load_table(make_report(), "image")["tables"][0]["rows"][1]["figures"][:2] == ["2.00", "0.23"]


def test_layers_with_fewer_experts_leave_cells_blank():
    layers = (RoutedLayer(1, (RoutedGroup("joint", 3, BOTH),)), RoutedLayer(5, (RoutedGroup("joint", 2, BOTH),)))
    (table,) = load_table(make_report(RoutingLayout(BOTH, layers)), "text")["tables"]
    assert [row["missing"] for row in table["rows"]] == [0, 1]


def test_pairs():
    pairs = torch.tensor([[16, 8, 1], [8, 10, 1], [1, 1, 2]])
    shares = pair_shares(pairs)
    assert np.isnan(shares.diagonal()).all()
    assert (shares[0, 1], shares[1, 0], shares[2, 0]) == (0.5, 0.8, 0.5)
    assert int(pairs[0, 0]) == 16  # the counts are not changed
    assert np.isnan(pair_shares(torch.tensor([[0, 0], [0, 3]]))[0]).all()
    # Of the 10 pairs of tokens, 8 are of the first two experts: 2.4 times the mean of 10 / 3.
    assert top_pairs(pairs, 2) == [(0, 1, 8, 8 / 18, pytest.approx(2.4)), (0, 2, 1, 1 / 17, pytest.approx(0.3))]
    assert len(top_pairs(pairs, 9)) == 3
    assert top_pairs(torch.tensor([[4, 0], [0, 2]]), 3) == []

    first, second = pairs_of(make_report(experts_per_token=[1, 2]))
    assert (first["single"], second["single"]) == (True, False)
    assert [[cell["text"] for cell in row["cells"]] for row in second["rows"]] == [
        ["", "50", "6"], ["80", "", "10"], ["50", "50", ""],
    ]  # fmt: skip
    assert second["top"][0] == ["0 + 1", "16", "44.4 %", "2.40 ×"]


def test_a_large_matrix_is_an_image():
    layout = RoutingLayout(BOTH, (RoutedLayer(1, (RoutedGroup("joint", 13, BOTH),)),))
    pairs = torch.full((13, 13), 3)
    pairs[4, 4] = 6
    (layer,) = pairs_of(make_report(layout, [pairs], experts_per_token=[2], statistics=make_report().statistics))
    assert layer["rows"] is None
    kind, data = layer["image"].split(",")
    assert kind == "data:image/png;base64"
    image = np.array(Image.open(BytesIO(base64.b64decode(data))))
    assert image.shape == (13, 13, 4)
    assert image[0, 0, 3] == 0
    assert image[0, 1].tolist() == [0, 68, 27, 255]  # all of its tokens
    assert image[4, 1].tolist() != image[0, 1].tolist()


def test_where_no_experts_are_chosen_together():
    single = "Each token chooses a single expert in"
    every = Page(make_report(experts_per_token=[1, 1]).to_html()).text
    assert f"{single} every layer (top-k is 1), so no experts are chosen together." in every
    some = Page(make_report(experts_per_token=[1, 2]).to_html()).text
    assert f"{single} layer 1 (top-k is 1), so no experts are chosen together there." in some
    assert single not in Page(make_report().to_html()).text


def evil_report() -> RoutingReport:
    row = ShownRow(EVIL, [("user", EVIL + "x" * 1600), (EVIL, "yes")], [make_image(), make_image(1)])
    answer = Answer(
        EVIL, [EVIL], [0.25], [0.5],
        heat=[np.full((2, 2), 0.125)] * 2,
        experts=[np.array([[[0, 1], [2, 3]]] * 2)] * 2,
        layers=[1, 5],
        groups=[[("joint", 3)]] * 2,
    )  # fmt: skip
    without = Answer("yes", ["yes"], alpha_note="No α.", heat_note="No heat.", experts_note=NO_EXPERTS)
    return make_report(
        model=EVIL,
        data=EVIL,
        unusual=[UnusualRow(row, "image", 0.51234, 4, [Difference(5, EVIL, 2, 0.875, 0.25)])],
        examples=[Example(row, answer), Example(row, without)],
        notes=[EVIL],
    )


def test_texts_are_escaped():
    source = evil_report().to_html()
    page = Page(source)
    assert page.open == []
    assert page.tags.count("script") == 1
    assert "alert" not in page.scripts[0]
    assert EVIL not in source
    assert page.text.count(EVIL) >= 8
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "100 more characters" not in page.text
    assert f"… {len(EVIL) + 100} more characters" in page.text


def test_the_page_refers_to_nothing_else():
    source = evil_report().to_html()
    page = Page(source)
    assert set(page.tags).isdisjoint({"link", "iframe", "object", "base", "form"})
    assert page.of("href") == []
    assert page.of("src")
    assert all(value.startswith("data:image/") for value in page.of("src"))
    assert "url(" not in source
    assert "@import" not in source
    assert "http:" not in html.unescape(source)
    assert "https:" not in html.unescape(source)
    (policy,) = (value for value in page.of("content") if value.startswith("default-src 'none'"))
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert policy.endswith(f"script-src 'sha256-{digest}'")
    assert "prefers-color-scheme: dark" in source


def test_examples():
    page = Page(evil_report().to_html())
    # Two images, with two layers each, and both layers of the pairs.
    assert page.of("data-of-layer") == ["1", "5", "1", "5", "1", "5"]
    assert page.of("data-layer") == ["1", "5"] * 2
    assert "Mean α 0.250 , count-free 0.500" in page.text
    assert f"{NO_EXPERTS} No heat. No α." in page.text
    captions = page.text[page.text.index("model’s answer") :]
    of_an_image = "image {} experts, layer 1 experts, layer 5 attention to the image"
    assert f"{of_an_image.format(1)} {of_an_image.format(2)}" in captions


def test_rows_that_differ():
    text = Page(evil_report().to_html()).text
    assert f"{EVIL}: divergence 0.512, 4 image tokens" in text
    assert "(median divergence of all rows: 0.300)" in text  # 0.1 and 0.5
    assert "(median divergence of all rows: 0.200)" in text
    assert "5 2 87.5 % 25.0 %" in text
    assert "All rows are routed alike." in text  # no text tokens are listed


def test_modalities_without_tokens_are_not_drawn():
    counts = make_report().counts
    counts = RoutingCounts(torch.tensor([10, 0]), counts.wanted, counts.dropped, counts.entropy)
    report = make_report(counts=counts)
    assert report.seen_modalities == ["text"]
    assert "Image tokens" not in Page(report.to_html()).text


def test_alarms_are_shown():
    layout = RoutingLayout(("text",), (RoutedLayer(0, (RoutedGroup("joint", 3, ("text",)),)),))
    counts = RoutingCounts(
        torch.tensor([100]), torch.tensor([[[100, 0, 0]]]), torch.zeros(1, 1, 3).long(), torch.zeros(1, 1, 1)
    )
    report = make_report(
        layout, [torch.eye(3).long()], counts=counts, statistics=statistics_by_layer(layout, counts, ["joint"]),
        experts_per_token=[1], divergences=np.zeros((2, 1)),
    )  # fmt: skip
    assert (
        "Routing has collapsed: in layer 0, group 'joint', text tokens use effectively 1.0"
        in Page(report.to_html()).text
    )


# ------------------------------------------------------------------------------------------------ drawing


def test_colours():
    colours = scale(np.array([0.0, 1.0, 1.5, 9.0]), LOAD_STOPS, LOAD_SCALE).tolist()
    assert colours == [[33, 94, 156], [247, 247, 247], [246, 206, 188], [165, 20, 38]]
    assert cell_style(1.0, LOAD_STOPS, LOAD_SCALE) == "background:rgb(247,247,247);color:#111"
    assert cell_style(0.0, LOAD_STOPS, LOAD_SCALE) == "background:rgb(33,94,156);color:#fff"
    assert cell_style(float("nan"), LOAD_STOPS, LOAD_SCALE) == ""
    assert gradient((1.0, 2.0, 5.0), ((1, 2, 3), (4, 5, 6), (7, 8, 9))) == (
        "background:linear-gradient(to right,rgb(1,2,3) 0%,rgb(4,5,6) 25%,rgb(7,8,9) 100%)"
    )


def test_experts_of_one_group_differ_in_hue():
    colours = grid_colours(["joint"], [("joint", 8)])
    assert [label for _, label in colours] == [str(expert) for expert in range(8)]
    assert len({colour for colour, _ in colours}) == 8
    two = grid_colours(["text", "image"], [("image", 2)])
    assert two == grid_colours(["text", "image"], [("text", 2), ("image", 2)])[2:]
    assert two != grid_colours(["text", "image"], [("text", 2)])


def circles(chart: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart)]


def test_line_charts():
    chart = line_chart([0, 2, 7], {"text": [0.0, 0.5, 1.0], "<image>": [1.0, float("nan"), 0.25]}, "entropy", 1.0)
    Page(chart)
    # The plot is 158 high, from 12 to 170, and 366 wide, from 54 to 420.
    assert circles(chart) == [(54, 170), (237, 91), (420, 12), (54, 12), (420, 130.5)]
    assert re.findall(r'text-anchor="end">([\d.]+)<', chart) == ["0", "0.25", "0.5", "0.75", "1"]
    assert "&lt;image&gt;, layer 7: 0.250" in chart
    assert circles(line_chart([3], {"text": [0.5]}, "entropy", 1.0)) == [(237, 91)]


@pytest.mark.parametrize(
    ("highest", "labels"),
    [
        (0.8, ["0", "0.2", "0.4", "0.6", "0.8"]),
        (1.0, ["0", "0.25", "0.5", "0.75", "1"]),
        (3.2, ["0", "1", "2", "3", "4"]),
        (11.0, ["0", "2.5", "5", "7.5", "10", "12.5"]),
        (0.0, ["0", "0.25"]),
    ],
)
def test_axes_have_round_labels(highest, labels):
    chart = line_chart([0, 1], {"text": [0.0, highest]}, "violation")
    assert re.findall(r'text-anchor="end">([\d.]+)<', chart) == labels


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)")
def test_a_browser_shows_one_layer_at_a_time(tmp_path):
    """The policy of the page allows its script, which hides the other layers."""
    (tmp_path / "report.html").write_text(evil_report().to_html(), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [CHROMIUM, *options, "--dump-dom", (tmp_path / "report.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    parts = re.findall(r'data-of-layer="(\d)"( hidden="")?', shown)
    assert parts == [("1", ""), ("5", ' hidden=""')] * 3
    assert re.findall(r'data-layer="(\d)" aria-pressed="(\w+)"', shown) == [("1", "true"), ("5", "false")] * 2
