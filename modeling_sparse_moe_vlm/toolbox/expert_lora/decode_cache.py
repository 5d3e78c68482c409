"""What is made of an adapter's weights, kept between the steps of generation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch


class StepMemory(threading.local):
    """
    Keeps what is made of weights as long as calls have few tokens, and as many as the call before, as the steps of
    generation do. In other calls all is made again, since nothing tells of weights that were written through `.data`,
    as PEFT's hotswapping does, and it costs little beside the products of many tokens.

    Every thread has its own, since another thread's calls say nothing about the steps of this one. Copies and pickles
    are empty.
    """

    def __init__(self) -> None:
        self._is_step = False
        self._num_tokens = 0
        self._kept: dict[Hashable, tuple[Any, Any]] = {}

    def __reduce__(self) -> tuple[type[StepMemory], tuple[()]]:
        return type(self), ()

    def begin(self, num_tokens: int, most: int) -> None:
        """A call with so many tokens begins; one of fewer than `most` may be a step."""
        if torch.compiler.is_compiling():
            return
        self._is_step = num_tokens < most and not torch.is_grad_enabled()
        if not self._is_step or num_tokens != self._num_tokens:
            self._kept.clear()
        self._num_tokens = num_tokens

    def end(self) -> None:
        """What is asked for outside of calls is made again."""
        if not torch.compiler.is_compiling():
            self._is_step = False

    def get(self, key: Hashable, weights: Sequence[torch.Tensor], settings: Iterable[Any], make: Callable[[], Any]):
        """What `make` returned at an earlier step, if these weights and settings are still the same; or returns now."""
        if torch.compiler.is_compiling() or not self._is_step or any(weight.is_inference() for weight in weights):
            return make()
        state = [*settings]
        for weight in weights:
            state += weight._version, weight.data_ptr(), weight.dtype
        kept = self._kept.get(key)
        if kept is None or kept[0] != state:
            kept = self._kept[key] = state, make()
        return kept[1]
