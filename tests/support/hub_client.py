"""The unmodified client of the Hub in this process, with the server of `hub_server.py`."""

import time
from unittest.mock import Mock

import pytest
from huggingface_hub import constants

from tests.support.hub_server import TOKEN, running_hub


@pytest.fixture(params=["xet", "lfs"])
def transfer(request, monkeypatch) -> str:
    """How large files are uploaded."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


@pytest.fixture
def lfs(monkeypatch):
    """Large files are uploaded without Xet."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def hub(monkeypatch):
    """A running Hub, on which this process is logged in as `user`."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # keeps its address
    waits = Mock(wraps=time)
    waits.sleep = lambda seconds: None  # between repetitions
    monkeypatch.setattr("huggingface_hub.utils._http.time", waits)
    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        files = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        yield running
