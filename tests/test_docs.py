"""The pages of the documentation: their blocks run as pasted, in order, and the targets of their links exist."""

import ast
import os
import re
import shutil
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from modeling_sparse_moe_vlm.toolbox.commands.main import VERBS, main
from tests.support import stand_ins
from tests.support.pages import RUN, blocks_of, run_page
from tests.support.processes import ROOT

pytestmark = pytest.mark.newest

DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
WITH_BLOCKS = [page for page in PAGES if any(block.reason is None for block in blocks_of(page.read_text()))]
# Blocks that show something and are not run.
SHOWN = ("text", "json", "yaml", "toml", "jinja")
TOOLBOX = ROOT / "modeling_sparse_moe_vlm/toolbox"
PACKAGES = ["", *sorted(f".toolbox.{path.parent.name}" for path in TOOLBOX.glob("*/__init__.py"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="session")
def furnished(tmp_path_factory) -> Path:
    """The folder of files that the pages use. The workers of pytest-xdist make it once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "furnished"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            made = folder.with_name("furnished-in-part")
            made.mkdir()
            before = os.getcwd()
            os.chdir(made)
            try:
                stand_ins.furnish(made)
            finally:
                os.chdir(before)
            made.rename(folder)
    return folder


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name_of)
def test_blocks_run_as_pasted(page, furnished, tmp_path, monkeypatch):
    folder = tmp_path / "page"
    shutil.copytree(furnished, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.manual_seed(0)
    run_page(page.read_text(), folder)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_are_run_or_say_why_not(page):
    text = page.read_text()
    blocks = blocks_of(text)
    assert text.count("```") == 2 * len(blocks)  # indented blocks and markers elsewhere would be missed
    assert {block.language for block in blocks} <= {*RUN, *SHOWN}
    assert text.count("<!-- not run") == sum(block.reason is not None for block in blocks)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_files(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(((?!http)[^)\s]*)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors_of(target), link
    for path in re.findall(r"`((?:tests|scripts|configuration|docs|modeling_sparse_moe_vlm)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def anchors_of(page: Path) -> set[str]:
    """Returns the anchors of the headings of a page, as MkDocs and GitHub make them from plain titles."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"- (?:[\w ]+: )?([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(package):
    module = import_module(f"modeling_sparse_moe_vlm{package}")
    entries = re.findall(r"^::: (\S+)$", "".join(map(Path.read_text, (DOCS / "api").rglob("*.md"))), re.MULTILINE)
    assert len(entries) == len(set(entries))
    described = []
    for entry in entries:
        parent, _, name = entry.rpartition(".")
        described.append(getattr(import_module(parent), name))
    for name in getattr(module, "__all__", []):
        assert any(getattr(module, name) is one for one in described), name


def test_sizes_of_the_presets(capsys):
    main(["info", "tiny", "small", "large"])
    assert capsys.readouterr().out.strip() in (DOCS / "benchmarks.md").read_text()


def messages_of(path: Path) -> list[str]:
    """Returns all strings in a source file, with an ellipsis for each formatted value."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
    return texts


def test_quoted_messages_are_in_the_source():
    page = (DOCS / "troubleshooting.md").read_text()
    quoted = [quote.strip() for quote in re.findall(r"^\| ``(.+?)`` \|", page, flags=re.MULTILINE)]
    assert len(quoted) == page.count("\n| ") - 2 * page.count("| message |")  # every row except headers and separators
    texts = [text for path in (ROOT / "modeling_sparse_moe_vlm").rglob("*.py") for text in messages_of(path)]
    for quote in quoted:
        pattern = re.compile(".*".join(map(re.escape, quote.split("…"))), re.DOTALL)
        assert any(pattern.search(text) for text in texts), quote


def test_every_verb_and_every_extra_is_listed():
    page = (DOCS / "installation.md").read_text()
    assert re.findall(r"^\| `([\w-]+)` \|", page, flags=re.MULTILINE) == list(VERBS)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"^\| `sparse-moe-vlm\[([\w-]+)\]`", page, flags=re.MULTILINE)) == set(extras)


def test_the_first_page_leads_to_every_other_one():
    linked = set(re.findall(r"\]\(([\w/]+\.md)\)", (DOCS / "index.md").read_text()))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"index.md"} | {"api/index.md"}
