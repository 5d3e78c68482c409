"""Fixtures of all tests, and what lets several workers of pytest-xdist share a machine."""

import os
import tempfile

import pytest

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Before torch and Transformers are imported: a thread each, and a folder of their own for code of checkpoints.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix=f"modules-{worker}-")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """With `--dist loadgroup`, one worker runs everything that starts several processes: not two at a time."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if item.path.parent.name == "integration" or item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(autouse=True)
def restored_logging():
    """`Trainer` and the benchmarks set how much the library logs, and messages once logged are not logged again."""
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.warning_once.cache_clear()
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture(params=["hybrid", "joint", "isolated"])
def arrangement(request) -> str:
    return request.param
