"""Runs threads at the same time: every thread waits for the others, layer by layer."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

TIMEOUT = 60  # seconds after which a waiting thread fails


def run_at_once(*functions: Callable[[], Any]) -> list[Any]:
    """Runs each function in its own thread, and returns their results. Raises the first of their exceptions."""
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []

    def run(number: int, function: Callable[[], Any]) -> None:
        try:
            results[number] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)
    return results


@contextmanager
def in_step(modules: list[nn.Module], num_threads: int = 2) -> Iterator[threading.Barrier]:
    """A context in which threads other than the main one run these modules together. Yields their barrier."""
    barrier = threading.Barrier(num_threads, timeout=TIMEOUT)

    def wait(module, args):
        if threading.current_thread() is not threading.main_thread():
            barrier.wait()

    hooks = [module.register_forward_pre_hook(wait) for module in modules]
    try:
        yield barrier
    finally:
        for hook in hooks:
            hook.remove()
