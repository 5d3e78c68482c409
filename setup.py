"""Copies what people edit at the root of the repository into the wheel. Everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ["configuration", "model_card.md"]


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


setup(cmdclass={"build_py": BuildWithShippedFiles})
