"""A cache of values that are computed from the weights of adapters, reused between decoding steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch


class StepMemory(threading.local):
    """
    A cache of values computed from weights, for decoding steps. A call counts as a decoding step if gradients are
    disabled and it has few tokens, and as many as the previous call. In all other calls, the values are computed again:
    they cost little compared with the products of many tokens, and writes through `.data`, as in PEFT's hotswapping,
    cannot be detected.

    Every thread has its own cache, because calls of other threads are not steps of this thread's generation. Copies and
    pickles are empty.
    """

    def __init__(self) -> None:
        self._is_step = False
        self._num_tokens = 0
        self._kept: dict[Hashable, tuple[Any, Any]] = {}

    def __reduce__(self) -> tuple[type[StepMemory], tuple[()]]:
        return type(self), ()

    def begin(self, num_tokens: int, most: int) -> None:
        """Marks the start of a call with `num_tokens` tokens. It can be a decoding step if it has fewer than `most`."""
        if torch.compiler.is_compiling():
            return
        self._is_step = num_tokens < most and not torch.is_grad_enabled()
        if not self._is_step or num_tokens != self._num_tokens:
            self._kept.clear()
        self._num_tokens = num_tokens

    def end(self) -> None:
        """Marks the end of a call. Outside of calls, values are always computed again."""
        if not torch.compiler.is_compiling():
            self._is_step = False

    def get(self, key: Hashable, weights: Sequence[torch.Tensor], settings: Iterable[Any], make: Callable[[], Any]):
        """
        Returns the value of an earlier decoding step if the weights and settings have not changed since, or else the
        result of `make`.
        """
        if torch.compiler.is_compiling() or not self._is_step or any(weight.is_inference() for weight in weights):
            return make()
        state = [*settings]
        for weight in weights:
            state += weight._version, weight.data_ptr(), weight.dtype
        kept = self._kept.get(key)
        if kept is None or kept[0] != state:
            kept = self._kept[key] = state, make()
        return kept[1]
