"""Fixtures of all tests."""

import pytest


@pytest.fixture(params=["hybrid", "joint", "isolated"])
def arrangement(request) -> str:
    return request.param
