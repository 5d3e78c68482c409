"""Runs a function of ours in place of the attention of chosen modules, through `ALL_ATTENTION_FUNCTIONS`.

It is registered under the name of the backend that the modules use, as Transformers lets a file override a backend for
itself, and passes every other module on to that backend. A name of its own would be less safe: masks, kernels and some
models (Gemma 4) look at the name of the backend, so that with another one the model might do something else.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...checks import check

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

# By name of the backend: sets of modules, and what runs in place of their attention.
_interceptions: dict[str, tuple[tuple[Set[nn.Module], AttentionFunction], ...]] = {}
# What was registered under these names before; nothing for eager attention.
_backends: dict[str, AttentionFunction | None] = {}
# Meanwhile nothing is compiled: compiled code would see neither the change nor its end.
_uncompiled = ExitStack()
_lock = threading.Lock()


@contextmanager
def intercept_attention(modules: Set[nn.Module], name: str, attend: AttentionFunction) -> Iterator[None]:
    """
    While in this context, runs `attend` in place of the attention function of the modules. Compiled models run
    uncompiled.

    Args:
        modules (`Set[nn.Module]`):
            Modules that may be given to the attention function.
        name (`str`):
            The backend that they use: `"eager"`, or one of `ALL_ATTENTION_FUNCTIONS`.
        attend (`Callable`):
            Called as `attend(attention_function, module, query, key, value, attention_mask, **kwargs)`.

    Raises:
        ValueError: If there is no such backend, or a module is in such a context already.
    """
    check(
        name == "eager" or name in ALL_ATTENTION_FUNCTIONS,
        f"`{name}` is not in `ALL_ATTENTION_FUNCTIONS`: choose another backend, such as "
        '`model.set_attn_implementation("sdpa")`.',
    )
    with _lock:
        others = _interceptions.get(name, ())
        check(
            not any(modules & taken for taken, _ in others),
            "the attention of this model is read out or steered already: leave that context first.",
        )
        if not _interceptions:
            _uncompiled.enter_context(torch.compiler.set_stance("force_eager"))
        if not others:
            _register(name)
        _interceptions[name] = (*others, (modules, attend))
    try:
        yield
    finally:
        with _lock:
            _interceptions[name] = tuple(each for each in _interceptions[name] if each[0] is not modules)
            if not _interceptions[name]:
                del _interceptions[name]
                _restore(name)
            if not _interceptions:
                _uncompiled.close()


def _register(name: str) -> None:
    backend = _backends[name] = ALL_ATTENTION_FUNCTIONS.get(name)

    @torch.compiler.set_stance("default")  # flex attention is compiled by itself
    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        own = backend or _eager_attention(type(module))
        for modules, attend in _interceptions.get(name, ()):
            if module in modules:
                return attend(own, module, *args, **kwargs)
        return own(module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = attention


def _restore(name: str) -> None:
    backend = _backends.pop(name)
    del ALL_ATTENTION_FUNCTIONS[name]
    if backend is not ALL_ATTENTION_FUNCTIONS.get(name):  # it had overridden another one
        ALL_ATTENTION_FUNCTIONS[name] = backend


def _eager_attention(module_class: type[nn.Module]) -> AttentionFunction:
    """Eager attention has no entry: every modeling file has its own, which its attention's `forward` names."""
    forward = inspect.unwrap(module_class.forward)
    for name in forward.__code__.co_names:
        if name.endswith("eager_attention_forward"):
            return forward.__globals__[name]
    raise ValueError(
        f"the eager attention function of {module_class.__name__} is not to be found: choose another backend, such as "
        '`model.set_attn_implementation("sdpa")`.'
    )
