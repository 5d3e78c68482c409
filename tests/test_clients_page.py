"""The table of clients in the documentation names tests that exist, and the clients that the tests need are extras."""

import ast
import re
import tomllib
from collections import Counter

import pytest

from tests.support.pages import blocks_of
from tests.support.processes import ROOT

pytestmark = pytest.mark.newest

PAGE = (ROOT / "docs/clients.md").read_text()
ROWS = [
    [cell.strip() for cell in row.strip("|").split("|")]
    for row in re.findall(r"^\|.*tests/.*\|$", PAGE, flags=re.MULTILINE)
]
TESTS = sorted((ROOT / "tests/clients").glob("test_*.py"))


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_rows_name_tests_that_exist(row):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row[-1])
    assert named, row
    assert row[-1].count("`") == 2 * len(named), row
    for path, name in named:
        functions = [node for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)]
        tests = {function.name for function in functions if function.name.startswith("test_")}
        assert name in tests if name else tests, (path, name)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_rows_lead_to_lines_that_can_be_pasted(row):
    ((page, anchor),) = re.findall(r"\]\(([\w.]*)(?:#([\w-]+))?\)", row[0])
    text = (ROOT / "docs" / page).read_text() if page else PAGE
    if anchor:
        sections = dict(re.findall(r"^#+ (.+)\n((?:(?!^#+ ).*\n?)*)", text, flags=re.MULTILINE))
        by_anchor = {
            re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower())): text for title, text in sections.items()
        }
        text = by_anchor[anchor]
    assert any(block.language in ("python", "bash") for block in blocks_of(text)), row[0]


def test_every_file_of_tests_is_in_the_table():
    table = "\n".join(row[-1] for row in ROWS)
    assert TESTS
    for path in TESTS:
        assert path.relative_to(ROOT).as_posix() in table, path.name


def test_every_row_is_another_client():
    assert Counter(row[0] for row in ROWS).most_common(1)[0][1] == 1


def test_tests_skip_without_the_clients_of_the_extra():
    """Each client that a test skips without is among the extras."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {
        re.split(r"[\[<>=]", name)[0].replace("-", "_")
        for extra in ("clients", "lmms-eval", "dev")
        for name in extras[extra]
    }
    names |= set(
        re.search(r"\[(.+)\]", next(name for name in extras["dev"] if name.startswith("sparse-moe-vlm[")))[1].split(",")
    )
    for path in TESTS:
        for module in re.findall(r'importorskip\("(\w+)', path.read_text()):
            assert module in names, (path.name, module)
