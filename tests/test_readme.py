"""The README: its snippets run as pasted, in order, and the files that it names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_snippets_run_as_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configuration").symlink_to(ROOT / "configuration")
    names: dict = {}
    assert len(SNIPPETS) >= 8
    for number, snippet in enumerate(SNIPPETS):
        try:
            exec(compile(snippet, f"README snippet {number}", "exec"), names)
        except Exception as error:
            pytest.fail(f"README snippet {number}: {error!r}\n{snippet}")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|scripts|configuration)/[\w./]+)`", README))))
def test_named_files_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
