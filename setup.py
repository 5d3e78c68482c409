"""
Copies what people edit at the root of the repository into the wheel, and makes the README's links absolute for package
indexes. Everything else is in pyproject.toml.
"""

import re
import shutil
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ["configuration", "model_card.md", "LICENSE"]


class BuildWithShippedFiles(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable install reads them where they are
            shutil.rmtree(self._target("configuration"), ignore_errors=True)  # left by an earlier build
            for source in self._sources():
                target = self._target(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def get_source_files(self) -> list[str]:
        """What a source distribution holds."""
        return [*super().get_source_files(), *self._sources()]

    def _sources(self) -> list[str]:
        paths = [path for name in SHIPPED for path in [Path(name), *Path(name).rglob("*")]]
        return sorted(path.as_posix() for path in paths if path.is_file())

    def _target(self, source: str) -> Path:
        return Path(self.build_lib, "modeling_sparse_moe_vlm", source)


def readme_for_package_indexes() -> str:
    """The README with absolute links, since package indexes show it without the repository's files."""
    source = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Source"]
    raw = source.replace("github.com", "raw.githubusercontent.com")

    def absolute(link: re.Match) -> str:
        root = f"{raw}/main" if link["image"] else f"{source}/blob/main"
        return f"{link['image']}[{link['text']}]({root}/{link['path']})"

    link = r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>(?!https?:|#)[^)]+)\)"
    return re.sub(link, absolute, Path("README.md").read_text(encoding="utf-8"))


setup(
    cmdclass={"build_py": BuildWithShippedFiles},
    long_description=readme_for_package_indexes(),
    long_description_content_type="text/markdown",
)
