"""Packages that only some functions need, and that extras of this package install."""

from __future__ import annotations

from importlib.util import find_spec

from ..checks import check


def check_installed(package: str, extra: str, what: str) -> None:
    """
    Checks that an optional package is installed, before it is imported.

    Args:
        package (`str`):
            Name of the package.
        extra (`str`):
            The extra of this package that installs it.
        what (`str`):
            What needs it, which starts the message of the error.

    Raises:
        ValueError: If the package is not installed. The message says how to install it.
    """
    check(find_spec(package) is not None, f"{what} needs {package}: pip install 'sparse-moe-vlm[{extra}]'.")
