"""Replaces the attention function of chosen modules by another function, through `ALL_ATTENTION_FUNCTIONS`.

The function is registered under the name of the backend that the modules use, the same way in which a modeling file of
Transformers can override a backend. For all other modules and threads it calls that backend. A new name would be less
safe: masks, kernels and some models (Gemma 4) depend on the name of the backend and might behave differently.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...checks import check
from .compiler_stance import restore_stance, set_stance_by_thread, stance_as_before

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(eq=False)
class Interception:
    """A replacement for the attention function of some modules, in the thread that entered the context."""

    modules: Set[nn.Module]
    name: str
    attend: AttentionFunction

    def is_here(self) -> bool:
        """Whether it applies to this thread: the thread entered the context, or runs in a copy of its context."""
        return self in _here.get() and self in _open


# The active interceptions of all threads, and those of this thread. The latter may include some that have ended.
_open: tuple[Interception, ...] = ()
_here: ContextVar[tuple[Interception, ...]] = ContextVar("_here", default=())
# The functions registered before (`None` for eager attention) and now, by name of the backend.
_registered: dict[str, tuple[AttentionFunction | None, AttentionFunction]] = {}
_lock = threading.Lock()


@contextmanager
def intercept_attention(modules: Set[nn.Module], name: str, attend: AttentionFunction) -> Iterator[Interception]:
    """
    A context in which `attend` replaces the attention function of the modules, in this thread only. Compiled models run
    uncompiled in this context.

    Args:
        modules (`Set[nn.Module]`):
            Modules whose attention is replaced. It may include modules without attention.
        name (`str`):
            Backend that the modules use: `"eager"`, or a name in `ALL_ATTENTION_FUNCTIONS`.
        attend (`Callable`):
            Replacement. Called as `attend(attention_function, module, query, key, value, attention_mask, **kwargs)`.

    Yields:
        [`Interception`]: The active replacement.

    Raises:
        ValueError: If there is no such backend, or if the attention of one of the modules is already replaced in this
            thread.
    """
    global _open
    check(
        name == "eager" or name in ALL_ATTENTION_FUNCTIONS,
        f"`{name}` is not in `ALL_ATTENTION_FUNCTIONS`: choose another backend, such as "
        '`model.set_attn_implementation("sdpa")`.',
    )
    check(
        not any(other.modules & modules for other in _here.get() if other.is_here()),
        "the attention of this model is read out or steered already: leave that context first.",
    )
    interception = Interception(modules, name, attend)
    with _lock:
        set_stance_by_thread(_intercepts)
        if name not in _registered:
            _register(name)
        _open = (*_open, interception)
    _here.set((*(other for other in _here.get() if other.is_here()), interception))
    try:
        yield interception
    finally:
        # Contexts need not end in the order in which they began, so the variable is not reset.
        _here.set(tuple(other for other in _here.get() if other is not interception))
        with _lock:
            _open = tuple(other for other in _open if other is not interception)
            if not any(other.name == name for other in _open):
                _restore(name)
            if not _open:
                restore_stance()


def _intercepts(here: bool) -> bool:
    return any(interception.is_here() for interception in _here.get()) if here else bool(_open)


def _register(name: str) -> None:
    backend = ALL_ATTENTION_FUNCTIONS.get(name)

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        own = backend or _eager_attention(type(module))
        if torch.compiler.is_compiling():  # in a thread that started to compile before
            return own(module, *args, **kwargs)
        with stance_as_before():
            for interception in _here.get():
                if module in interception.modules and interception.is_here():
                    return interception.attend(own, module, *args, **kwargs)
            return own(module, *args, **kwargs)

    _registered[name] = backend, attention
    ALL_ATTENTION_FUNCTIONS[name] = attention


def _restore(name: str) -> None:
    backend, attention = _registered.pop(name)
    if ALL_ATTENTION_FUNCTIONS[name] is not attention:
        return  # other code has overridden it meanwhile, and may call it
    if backend is ALL_ATTENTION_FUNCTIONS._global_mapping.get(name):
        del ALL_ATTENTION_FUNCTIONS[name]
    else:
        ALL_ATTENTION_FUNCTIONS[name] = backend


def _eager_attention(module_class: type[nn.Module]) -> AttentionFunction:
    """
    Returns the eager attention function of a module. It is not registered: every modeling file has its own, which the
    `forward` of its attention module calls by name.
    """
    forward = inspect.unwrap(module_class.forward)
    for name in forward.__code__.co_names:
        if name.endswith("eager_attention_forward"):
            return forward.__globals__[name]
    raise ValueError(
        f"the eager attention function of {module_class.__name__} was not found: choose another backend, such as "
        '`model.set_attn_implementation("sdpa")`.'
    )
