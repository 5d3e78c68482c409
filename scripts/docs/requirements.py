"""Prints the requirements of the `docs` extra, one per line: to build the site without installing the package."""

import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

if __name__ == "__main__":
    print(*PROJECT["optional-dependencies"]["docs"], sep="\n")
