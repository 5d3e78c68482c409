"""Prevents compiled models from running their compiled code while attention is intercepted.

Compiled code would not see the interception. `torch.compiler.set_stance` could disable it, but for the whole process:
other threads would lose their compiled code as well, and two threads that set and restore a stance in turns could leave
the wrong one behind. The stance that this module sets depends on the calling thread instead:

- A thread that intercepts attention runs everything uncompiled.
- Other threads keep their compiled code as long as its guards hold. They run uncompiled where code would be compiled
  again, because the function registered for the interception must not become part of their graphs.
- Inside an attention backend (flex attention compiles itself), the previous stance applies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch._dynamo import eval_frame

_is_as_before: ContextVar[bool] = ContextVar("_is_as_before", default=False)


class StanceByThread:
    """
    A replacement for dynamo's `DynamoStance` that depends on the calling thread.

    Args:
        intercepts (`Callable[[bool], bool]`):
            Function that returns whether attention is intercepted: in the calling thread if its argument is `True`, in
            any thread otherwise.
    """

    def __init__(self, intercepts: Callable[[bool], bool]):
        self.intercepts = intercepts
        self.before = eval_frame._stance

    @property
    def stance(self) -> str:
        before = self.before.stance
        # Other code may have saved this stance, and may set it again when nothing is intercepted any more.
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
    """Sets a stance that depends on the thread, unless one is set already."""
    if not isinstance(eval_frame._stance, StanceByThread):
        eval_frame._set_stance(StanceByThread(intercepts))  # type: ignore[arg-type]


def restore_stance() -> None:
    """Restores the previous stance, unless other code has set another one meanwhile."""
    if isinstance(eval_frame._stance, StanceByThread):
        eval_frame._set_stance(eval_frame._stance.before)


@contextmanager
def stance_as_before() -> Iterator[None]:
    """A context in which this thread compiles as if nothing were intercepted."""
    token = _is_as_before.set(True)
    try:
        yield
    finally:
        _is_as_before.reset(token)
