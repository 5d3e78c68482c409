"""The pages of the documentation: their Python blocks run as pasted, in order, and their links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.support import in_tree_models

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
# A block may be marked as not run, with the reason.
BLOCK = re.compile(r"(<!-- not run: (?P<reason>[^>]+) -->\n)?^```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
# By name on the Hub, a small random model of the same class.
SMALL = {"HuggingFaceTB/SmolVLM-256M-Instruct": "smolvlm", "Qwen/Qwen3-VL-2B-Instruct": "qwen3_vl"}


@pytest.fixture
def small_models(monkeypatch):
    """Loads small models of the same classes in the place of those on the Hub."""
    from_pretrained = AutoModelForImageTextToText.from_pretrained

    def load(name, *args, **kwargs):
        if name in SMALL:
            return in_tree_models.make_model(SMALL[name])
        return from_pretrained(name, *args, **kwargs)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", load)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run_as_pasted(page, tmp_path, monkeypatch, small_models):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    for number, block in enumerate(BLOCK.finditer(page.read_text())):
        if block["reason"] is None:
            try:
                exec(compile(block["code"], f"{page.name}, block {number}", "exec"), names)
            except Exception as error:
                pytest.fail(f"{page.name}, block {number}: {error!r}\n{block['code']}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_files(page):
    text = page.read_text()
    for link in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:tests|scripts|configuration)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
