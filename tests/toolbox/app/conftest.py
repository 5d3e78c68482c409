import asyncio

import pytest


@pytest.fixture(autouse=True)
def event_loops_are_closed(monkeypatch):
    """
    Closes the event loops that gradio makes for its locks and forgets. Otherwise, their warnings come from the garbage
    collector, in the middle of any other test.
    """
    loops = []

    def new_event_loop(create=asyncio.new_event_loop):
        loops.append(create())
        return loops[-1]

    monkeypatch.setattr(asyncio, "new_event_loop", new_event_loop)
    yield
    for loop in loops:
        if not loop.is_running():
            loop.close()
