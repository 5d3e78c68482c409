"""The script that measures the memory of rows."""

import importlib.util
import json
import mmap

import pytest

from tests.scripts.conftest import SCRIPTS


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("data_memory", SCRIPTS / "data_memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_and_figures(script, tmp_path, monkeypatch):
    file = script.write_rows(tmp_path, 21)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 21
    assert {row["image"] for row in rows} == {f"{i}.png" for i in range(4)}
    for mode in script.MODES:
        memory = iter([100.0, 103.0, *(104.0 + i % 3 for i in range(10)), 0.0])
        monkeypatch.setattr(script, "private_memory", memory.__next__)
        assert script.measure(str(file), mode) == {"loaded": 3.0, "read": 6.0}
        assert next(memory) == 0.0  # read in ten parts


def test_private_memory_is_that_of_this_process(script):
    before = script.private_memory()
    # New pages of the system: a bytearray may be placed in memory that the process has freed before.
    with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.write(b"x" * len(block))
        assert 50 < script.private_memory() - before < 100
