"""Keeps compiled models from running their compiled code, which would not see that attention is intercepted.

`torch.compiler.set_stance` does that for the whole process: other threads would lose their compiled code, too, and two
threads that set and restore a stance in turns would leave the wrong one behind. So the stance that is set here depends
on the thread that asks:

- a thread that intercepts attention runs everything uncompiled;
- other threads keep the code that they have compiled as long as its guards hold, and run uncompiled where it would be
  compiled again: what is registered for the interception does not belong in their graphs;
- inside of an attention backend (flex attention is compiled by itself) all is as it was before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch._dynamo import eval_frame

_is_as_before: ContextVar[bool] = ContextVar("_is_as_before", default=False)


class StanceByThread:
    """
    Stands in for dynamo's `DynamoStance`.

    Args:
        intercepts (`Callable`):
            Whether attention is intercepted: in the thread that asks, with `here=True`, or else in any.
    """

    def __init__(self, intercepts: Callable[[bool], bool]):
        self.intercepts = intercepts
        self.before = eval_frame._stance

    @property
    def stance(self) -> str:
        before = self.before.stance
        # Somebody who has saved this stance may set it again later, when nothing is intercepted any more.
        if _is_as_before.get() or before == "force_eager" or not self.intercepts(False):
            return before
        return "force_eager" if self.intercepts(True) else "eager_on_recompile"

    @property
    def skip_guard_eval_unsafe(self) -> bool:
        return self.before.skip_guard_eval_unsafe

    @property
    def backend(self) -> str | Callable | None:
        return self.before.backend


def set_stance_by_thread(intercepts: Callable[[bool], bool]) -> None:
    """Sets it, unless it is set already."""
    if not isinstance(eval_frame._stance, StanceByThread):
        eval_frame._set_stance(StanceByThread(intercepts))  # type: ignore[arg-type]


def restore_stance() -> None:
    """Sets the stance from before, unless somebody has set another one meanwhile."""
    if isinstance(eval_frame._stance, StanceByThread):
        eval_frame._set_stance(eval_frame._stance.before)


@contextmanager
def stance_as_before() -> Iterator[None]:
    """Inside, this thread compiles as if nothing were intercepted."""
    token = _is_as_before.set(True)
    try:
        yield
    finally:
        _is_as_before.reset(token)
