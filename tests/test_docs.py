"""The pages of the documentation: their Python blocks run as pasted, in order, and their links lead somewhere."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.support import in_tree_models

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
PACKAGES = [
    "",
    *(f".toolbox.{path.parent.name}" for path in ROOT.glob("modeling_sparse_moe_vlm/toolbox/*/__init__.py")),
]
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


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"- (?:[\w ]+: )?([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    docs = ROOT / "docs"
    assert sorted(listed) == sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(package):
    module = import_module(f"modeling_sparse_moe_vlm{package}")
    entries = re.findall(r"^::: (\S+)$", "".join(map(Path.read_text, (ROOT / "docs/api").rglob("*.md"))), re.MULTILINE)
    assert len(entries) == len(set(entries))
    described = []
    for entry in entries:
        parent, _, name = entry.rpartition(".")
        described.append(getattr(import_module(parent), name))
    missing = [
        name for name in getattr(module, "__all__", []) if not any(getattr(module, name) is x for x in described)
    ]
    assert missing == []
