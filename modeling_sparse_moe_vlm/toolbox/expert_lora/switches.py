"""
Detection of adapters that are switched while a call of another thread runs. PEFT has only one set of active adapters
for all threads.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper


class Switches:
    """Counts how often each thread has switched, disabled or merged the adapters of a layer."""

    def __init__(self) -> None:
        self._by_thread: Counter[int] = Counter()

    def count(self) -> None:
        self._by_thread[threading.get_ident()] += 1

    def of_other_threads(self) -> dict[int, int]:
        return {thread: count for thread, count in self._by_thread.items() if thread != threading.get_ident()}

    @contextmanager
    def forbidden(self) -> Iterator[None]:
        """
        Context of a call during which other threads must not switch adapters, because its result would mix them.

        Raises:
            RuntimeError: If another thread has switched, disabled or merged adapters during the call.
        """
        if torch.compiler.is_compiling():
            yield
            return
        before = self.of_other_threads()
        yield
        if self.of_other_threads() != before:
            raise RuntimeError(
                "another thread has switched, disabled or merged adapters of the model while this call ran, so that "
                "its result would mix adapters. To choose adapters for each call, pass `adapter_names=[…]` with one "
                "name per row, or switch adapters only while no call runs."
            )


class SwitchingLayer(ParamWrapper):
    """The part of [`~toolbox.expert_lora.adapted_layer.FactoredExpertsLayer`] that counts switches of adapters."""

    switches: Switches

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        before = list(self.active_adapters)
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if list(self.active_adapters) != before and hasattr(self, "switches"):  # missing in the constructor of PEFT
            self.switches.count()

    def enable_adapters(self, enabled: bool) -> None:
        before = self.disable_adapters
        super().enable_adapters(enabled)
        if self.disable_adapters != before:
            self.switches.count()


def switches_of(model: Any) -> Switches | None:
    """
    Returns the counts of the first layer of experts with adapters, or `None` without such a layer. They stand for all
    layers, because PEFT switches all layers of a model together.
    """
    return next((module.switches for module in model.modules() if hasattr(module, "switches")), None)
