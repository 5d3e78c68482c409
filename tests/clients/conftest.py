"""Marks the tests of clients, which need the extra `clients` and start servers, as extensive."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items):
    # This hook gets the tests of all folders.
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.extensive)
