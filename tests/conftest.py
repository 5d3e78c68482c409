"""Fixtures for all tests, and settings with which several workers of pytest-xdist share a machine."""

import os
import sys
import tempfile

import pytest

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Set before torch and Transformers are imported. Each worker has one thread and its own folder for remote code.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix=f"modules-{worker}-")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tests marked `numeric` run: cpu (default), cuda, cuda:1, …")


@pytest.hookimpl(wrapper=True)  # a wrapper comes before pytest-xdist, which reads the groups in the same hook
def pytest_collection_modifyitems(config, items):
    """
    Marks tests that take the device from `--device` as `numeric`. With `--dist loadgroup`, one worker runs all slow
    tests of a file, and all integration tests of a file, because they share programs that run once per worker.
    """
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if "device" in item.fixturenames and "device" not in values:
            item.add_marker(pytest.mark.numeric)
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if item.path.parent.name == "integration" or item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.xdist_group(item.path.stem))
    return (yield)


@pytest.fixture(autouse=True)
def restored_logging():
    """Restores the verbosity, which `Trainer` and benchmarks change, and lets `warning_once` repeat its messages."""
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.warning_once.cache_clear()
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Forgets what a test compiled: the sizes of earlier calls choose which sizes of the next ones are symbolic."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch"].compiler.reset()


@pytest.fixture(scope="session")
def device(request):
    """The device of `--device`. Float32 products have full precision on it, as on the CPU."""
    import torch

    if request.config.getoption("--device").startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.empty(0, device=request.config.getoption("--device")).device


@pytest.fixture(params=["hybrid", "joint", "isolated"])
def arrangement(request) -> str:
    return request.param
