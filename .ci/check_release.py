"""Checks that a tag fits the package: `python .ci/check_release.py v1.2.3`. Called by the release workflow."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def mistakes_of(tag: str) -> list[str]:
    """What must be corrected before this tag can be released."""
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "modeling_sparse_moe_vlm/__init__.py").read_text(), re.M)[1]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    mistakes = []
    if tag != f"v{version}":
        mistakes.append(f"The tag is {tag}, but `__version__` of the package is {version}.")
    if cited != version:
        mistakes.append(f"CITATION.cff has the version {cited}, but the package is {version}.")
    if not re.search(rf"^## \[{re.escape(version)}\] – \d{{4}}-\d{{2}}-\d{{2}}$", changelog, re.M):
        mistakes.append(f"CHANGELOG.md needs a heading `## [{version}] – YYYY-MM-DD`.")
    return mistakes


if __name__ == "__main__":
    if mistakes := mistakes_of(sys.argv[1]):
        sys.exit("\n".join(mistakes))
