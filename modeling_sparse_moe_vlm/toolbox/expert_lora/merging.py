"""Merging of adapters into stacks of experts, with support for DoRA and checks that the stack is available."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper

from .. import expert_seam
from .dora import check_dora
from .processes import is_spread
from .switches import Switches


class MergingLayer(ParamWrapper):
    """
    The part of [`~toolbox.expert_lora.adapted_layer.FactoredExpertsLayer`] that merges adapters.

    Attributes:
        stack_name (`str`):
            Name of the stack in the model.
        rescale (`Callable`):
            Function that returns the factor by which DoRA rescales each output, of shape `(E, out)`, from the name of
            an adapter and the stack.
        merged_rescale (`dict[str, torch.Tensor]`):
            These factors at the time of merging, for each merged adapter with DoRA.
    """

    stack_name: str
    merged_rescale: dict[str, torch.Tensor]
    switches: Switches
    rescale: Callable[..., torch.Tensor]

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns what merging adds to the stack, in the orientation of the stack."""
        delta = super().get_delta_weight(adapter_name, *args, **kwargs)
        if not self.use_dora.get(adapter_name):
            return delta
        stack = self.get_param().detach()
        return self._as_columns(self.rescale(adapter_name, stack)) * (stack + delta) - stack

    def _as_columns(self, rescale: torch.Tensor) -> torch.Tensor:
        return rescale[:, :, None] if self._did_swap_in_out_features else rescale[:, None, :]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        if self.get_param().is_meta or expert_seam.is_read_only(self.get_base_layer()):
            raise ValueError(
                f"{self.stack_name!r} is offloaded, so no adapter can be merged into it: load the model without "
                "offloading, then load the adapter and merge it."
            )
        if is_spread(self.get_param()):
            raise ValueError(
                f"several processes share {self.stack_name!r}, so no adapter can be merged into it: save the adapter, "
                "and merge it in one process."
            )
        check_dora(self, names)
        for name in names:
            if self.use_dora.get(name):
                self.merged_rescale[name] = self.rescale(name, self.get_param().detach())
        super().merge(safe_merge, adapter_names)
        self.switches.count()
        expert_seam.stacks_have_changed(self.get_base_layer())

    def unmerge(self) -> None:
        for name in list(self.merged_adapters):
            if name in self.merged_rescale:
                param = self.get_param()
                self.merged_adapters.remove(name)
                param.data /= self._as_columns(self.merged_rescale.pop(name))
                param.data -= ParamWrapper.get_delta_weight(self, name)
        if self.merged:
            super().unmerge()
        self.switches.count()
        expert_seam.stacks_have_changed(self.get_base_layer())
