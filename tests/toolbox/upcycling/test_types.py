"""Models of many types of Transformers are upcycled with the same logits and tokens, and load again."""

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.support.processes import ROOT
from tests.support.upcycling_census import (
    EXACT,
    KINDS,
    NOTES,
    ON_REQUEST,
    REFUSED,
    Entry,
    census,
    difference,
    table,
)

VISION_LANGUAGE = [
    "aya_vision",
    "cohere2_vision",
    "deepseek_vl",
    "emu3",
    "gemma3",
    "gemma4",
    "glm4v",
    "got_ocr2",
    "idefics",
    "idefics2",
    "idefics3",
    "internvl",
    "lfm2_vl",
    "lighton_ocr",
    "llava",
    "llava_onevision",
    "minicpmv4_6",
    "mistral3",
    "mllama",
    "molmo2",
    "ovis2",
    "paligemma",
    "pp_chart2table",
    "qwen2_5_vl",
    "qwen3_5",
    "qwen3_vl",
    "smolvlm",
    "t5gemma2",
]
TEXT = [
    "cohere2",
    "cpmant",
    "exaone",
    "falcon_h1",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "glm4",
    "granite",
    "lfm2",
    "llama",
    "mistral",
    "modernbert-decoder",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "stablelm",
]


# Dense layers of models with experts in other layers, whose own experts have various formats on disk.
MIXTURES = ["deepseek_v3", "glm4_moe", "lfm2_moe", "sarvam_moe"]


@pytest.mark.parametrize(
    ("model_type", "auto_class"),
    [(model_type, AutoModelForImageTextToText) for model_type in VISION_LANGUAGE]
    + [(model_type, AutoModelForCausalLM) for model_type in TEXT],
)
def test_upcycled_models_of_many_types(model_type, auto_class):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("This release of Transformers does not have the type yet.")
    assert difference(model_type, auto_class, expert_groups="joint", start="copy") < 1e-5
    assert difference(model_type, auto_class, start="residual") < 1e-6


@pytest.mark.parametrize("model_type", MIXTURES)
def test_dense_layers_of_mixtures(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("This release of Transformers does not have the type yet.")
    assert difference(model_type, AutoModelForCausalLM, [0], expert_groups="joint", start="copy") < 1e-5


def test_census():
    kinds = list(KINDS)
    entries = [*census(kinds[0], ["llava", "qwen3_vl_moe"]), *census(kinds[1], ["gpt2", "llama", "deepseek_v3"])]
    found = {entry.model_type: entry for entry in entries}
    assert {model_type: entry.outcome for model_type, entry in found.items()} == {
        "llava": EXACT,
        "qwen3_vl_moe": REFUSED,
        "gpt2": REFUSED,
        "llama": EXACT,
        "deepseek_v3": ON_REQUEST,
    }
    assert found["deepseek_v3"].reason == "`layers=[0]`"
    assert found["llama"].differences["residual"] < found["llama"].differences["copy"] < 1e-6
    page = table(entries)
    assert "2 types: 1 exact, 0 exact on request, 1 not." in page
    assert "3 types: 1 exact, 1 exact on request, 1 not." in page
    assert "| `qwen3_vl_moe` | no |  |  | Qwen3VLMoeForConditionalGeneration is already a mixture of experts" in page


def test_notes_are_in_the_table():
    entries = [
        Entry("Images and text", "shieldgemma2", EXACT, differences={"copy": 2e-7, "residual": 0.0}),
        Entry("Text", "hy_v4", ON_REQUEST, "`layers=[0]`", {"copy": 2e-7, "residual": 0.0}),
    ]
    lines = table(entries).splitlines()
    assert f"| `shieldgemma2` | exact | 2.0e-07 | 0.0e+00 | {NOTES['shieldgemma2']} |" in lines
    assert "| `hy_v4` | exact, on request | 2.0e-07 | 0.0e+00 | `layers=[0]` |" in lines
    page = (ROOT / "docs/upcycling_types.md").read_text()
    assert all(note in page for note in NOTES.values())
