"""Adapters that are switched while another thread's call runs: PEFT has one set of active adapters per model."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper


class Switches:
    """How often each thread has switched, disabled or merged the adapters of a layer."""

    def __init__(self) -> None:
        self._by_thread: Counter[int] = Counter()

    def count(self) -> None:
        self._by_thread[threading.get_ident()] += 1

    def of_other_threads(self) -> dict[int, int]:
        return {thread: count for thread, count in self._by_thread.items() if thread != threading.get_ident()}

    @contextmanager
    def forbidden(self) -> Iterator[None]:
        """
        Context of a call, whose answer must not be that of several adapters.

        Raises:
            RuntimeError: If another thread switched meanwhile.
        """
        if torch.compiler.is_compiling():
            yield
            return
        before = self.of_other_threads()
        yield
        if self.of_other_threads() != before:
            raise RuntimeError(
                "another thread has switched, disabled or merged adapters of the model while this call ran, so that "
                "its answer would be a mixture. Pass `adapter_names=[…]`, a name for each row, to choose in each call, "
                "or switch while no call runs."
            )


class SwitchingLayer(ParamWrapper):
    """The part of [`~adapted_layer.FactoredExpertsLayer`] that counts switches."""

    switches: Switches

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        before = list(self.active_adapters)
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if list(self.active_adapters) != before and hasattr(self, "switches"):  # not while PEFT's constructor runs
            self.switches.count()

    def enable_adapters(self, enabled: bool) -> None:
        before = self.disable_adapters
        super().enable_adapters(enabled)
        if self.disable_adapters != before:
            self.switches.count()


def switches_of(model: Any) -> Switches | None:
    """Those of the first layer of experts: PEFT switches all layers of a model together."""
    return next((module.switches for module in model.modules() if hasattr(module, "switches")), None)
