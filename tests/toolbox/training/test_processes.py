"""Processes other than the first. The tests of the scripts cover saving with several processes."""

from types import SimpleNamespace

import datasets
import pytest
from transformers.utils import logging

from modeling_sparse_moe_vlm.toolbox.training.processes import silence_others


@pytest.fixture
def bars():
    yield lambda: (datasets.are_progress_bars_disabled(), not logging.is_progress_bar_enabled())
    datasets.enable_progress_bars()
    logging.enable_progress_bar()


@pytest.mark.parametrize("index", [0, 1])
def test_only_the_first_process_shows_progress(bars, index):
    datasets.enable_progress_bars()
    logging.enable_progress_bar()
    silence_others(SimpleNamespace(process_index=index))
    assert bars() == (index != 0, index != 0)
