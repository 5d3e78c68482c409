"""Docstrings and links on the site of the documentation: MkDocs builds the pages of a small package."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import griffe
import pytest

from scripts.docs.hf_docstrings import ARGUMENT, HuggingFaceDocstrings, to_google
from tests.support.processes import ROOT

SOURCES = {
    "__init__.py": '"""A package."""\n\nfrom .tools.spin import spin\n',
    "wheels.py": '''"""Wheels."""


class Wheel:
    """A wheel. See [`.tools.brakes`], [`~tools.spin.spin`] and [`~transformers.PreTrainedModel.save_pretrained`]."""

    def turn(self, times: int | None = None) -> int:
        """
        Turns the [`Wheel`], as [`spin`] and [`Wheel.stop`] do.

        Args:
            times (`int` or `float`, *optional*, defaults to 8):
                How often, one or
                more.
            names, kinds (`dict[str, list[int]]`, *optional*):
                Names and kinds.
            **kwargs (`Any`): The rest.

        Returns:
            `tuple[int, float]`: turns and [`Unknown`],
            and more.

        ```python
        >>> Wheel().turn()  # [`Wheel`]
        ```
        """

    def stop(self):
        """Stops."""
''',
    "tools/__init__.py": '"""Tools."""\n\nfrom .spin import spin\n',
    "tools/spin.py": '"""Spinning."""\n\n\ndef spin():\n    """Spins a [`Wheel`]."""\n',
    "tools/brakes.py": '"""Brakes."""\n',
}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, source in SOURCES.items():
        path = tmp_path / "bikes" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    return tmp_path


@pytest.fixture
def package(folder) -> griffe.Module:
    return griffe.load(
        "bikes",
        search_paths=[folder],
        extensions=griffe.load_extensions(HuggingFaceDocstrings),
        docstring_parser="google",
        docstring_options={"returns_multiple_items": False, "returns_named_value": False, "warnings": False},
        allow_inspection=False,
    )


def test_arguments_have_types_and_defaults(package):
    sections = {section.kind.value: section for section in package["wheels.Wheel.turn"].docstring.parsed}
    times, names, rest = sections["parameters"].value
    assert (times.name, str(times.annotation), times.default) == ("times", "int | float", "8")
    assert times.description.strip() == "How often, one or\nmore."
    assert (names.name, str(names.annotation), names.default) == ("names, kinds", "dict[str, list[int]]", "None")
    assert (rest.name, str(rest.annotation), rest.default) == ("**kwargs", "Any", None)
    (returned,) = sections["returns"].value
    assert str(returned.annotation) == "tuple[int, float]"
    assert returned.description == "turns and [`Unknown`][Unknown],\nand more."


@pytest.mark.parametrize(
    ("line", "expected", "defaults"),
    [
        ("x (`int`):", "x (int):", {}),
        ("x (`str` or `os.PathLike`, *optional*):", "x (str | os.PathLike):", {"x": "None"}),
        ("x (`int`, `str` or `None`, defaults to `'a, b'`):", "x (int | str | None):", {"x": "'a, b'"}),
        ("x (`dict` or iterable of such, *optional*):", "x (dict or iterable of such):", {"x": "None"}),
        ("x (`Tensor` of shape `(n, m)`):", "x (Tensor of shape (n, m)):", {}),
        ("x (`Iterable[str or int]`):", "x (Iterable[str | int]):", {}),
        ("x (`Tensor`, *optional*, returned with `a=1`):", "x (Tensor): Returned with `a=1`.", {"x": "None"}),
        ("x (`int`): in one line", "x (int): in one line", {}),
        ("`Tensor`: logits", "Tensor: logits", {}),
        ("`Tensor`, *optional*: logits", "Tensor | None: logits", {}),
        ("`Tensor` or `None`: logits", "Tensor | None: logits", {}),
        ("`Tensor` of shape `(n,)`, in float32.", "`Tensor` of shape `(n,)`, in float32.", {}),
        ("If (`x`) holds: y", "If (`x`) holds: y", {}),
        ("```python\n>>> f(x)\n```", "```pycon\n>>> f(x)\n```", {}),
        ("```python\nx (`int`):\n```", "```python\nx (`int`):\n```", {}),
    ],
)
def test_lines_of_docstrings(line, expected, defaults):
    assert to_google(line) == (expected, defaults)


def test_cross_references_become_links(package):
    page = "https://huggingface.co/docs/transformers/main_classes/model"
    assert package["wheels.Wheel"].docstring.value == (
        "A wheel. See [`brakes`][bikes.tools.brakes], [`spin`][bikes.tools.spin.spin] and "
        f"[`save_pretrained`]({page}#transformers.PreTrainedModel.save_pretrained)."
    )
    text = package["wheels.Wheel.turn"].docstring.value
    assert text.startswith(
        "Turns the [`Wheel`][bikes.wheels.Wheel], as [`spin`][bikes.tools.spin.spin] "
        "and [`Wheel.stop`][bikes.wheels.Wheel.stop] do."
    )
    assert "# [`Wheel`]\n" in text  # code stays as it is
    assert package["tools.spin"].members["spin"].docstring.value == "Spins a [`Wheel`][bikes.wheels.Wheel]."


@pytest.mark.parametrize("path", sorted((ROOT / "modeling_sparse_moe_vlm").rglob("*.py")), ids=lambda path: path.stem)
def test_documented_arguments_exist(path):
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and (docstring := ast.get_docstring(function)):
            found = function.args
            exist = {argument.arg for argument in [*found.posonlyargs, *found.args, *found.kwonlyargs]}
            exist |= {argument.arg for argument in (found.vararg, found.kwarg) if argument}
            section = re.split(r"\n\n(?=\w)", docstring.partition("Args:\n")[2])[0]
            lines = [line.removeprefix("    ") for line in section.split("\n")]
            documented = [match["names"] for line in lines if (match := ARGUMENT.match(line)) and not match["indent"]]
            assert {name.lstrip("*") for names in documented for name in names.split(", ")} <= exist, function.name


def build(folder: Path, page: str) -> subprocess.CompletedProcess:
    """Builds a site of one page about the package, with the settings of the project's site."""
    settings = (ROOT / "mkdocs.yml").read_text()
    settings = re.sub(r"^nav:.*", "nav: [index.md]\n", settings, flags=re.MULTILINE | re.DOTALL)
    (folder / "mkdocs.yml").write_text(settings.replace("scripts/docs/", f"{ROOT}/scripts/docs/"))
    (folder / "docs").mkdir(exist_ok=True)
    (folder / "docs/index.md").write_text(page)
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=folder,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


def test_broken_links_are_errors(folder):
    wheels = folder / "bikes/wheels.py"
    page = "# Bikes\n\n::: bikes.wheels.Wheel\n\n::: bikes.tools.brakes\n\n::: bikes.tools.spin.spin\n"
    wrong = build(folder, page + "\n[a](nowhere.md) [b](#nowhere) [c](../nowhere.py)\n")
    assert wrong.returncode == 1
    assert "cross-reference target 'Unknown'" in wrong.stderr
    assert "a link 'nowhere.md', but the target is not found" in wrong.stderr
    assert "a link '#nowhere', but there is no such anchor" in wrong.stderr
    assert "../nowhere.py, which does not exist" in wrong.stderr

    wheels.write_text(wheels.read_text().replace("[`Unknown`]", "more"))
    right = build(folder, page + "\n[pages](index.md) [wheels](../bikes/wheels.py#L1) [tools](../bikes/tools)\n")
    assert right.returncode == 0, right.stderr
    html = (folder / "build/site/index.html").read_text()
    repository = "https://github.com/sparse-moe-vlm/sparse-moe-vlm"
    assert f'href="{repository}/blob/main/bikes/wheels.py#L1"' in html
    assert f'href="{repository}/tree/main/bikes/tools"' in html
    assert 'href="#bikes.tools.spin.spin"' in html
