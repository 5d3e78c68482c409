"""
PEFT's LoRA layer for the parameters of an experts module, in a variant that runs factored.

This module relies on internals of PEFT: `ParamWrapper`, its name and the layout of its weights, and
`LoraConfig._register_custom_module`. The layers are nested, one for each adapted parameter: `down(gate_up(experts))`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from .. import expert_seam
from .adapted_stack import AdaptedStack
from .adapters_by_row import run_by_row
from .decode_cache import StepMemory
from .dora import adapted_norm, check_dora, initial_magnitude
from .factored_weight import LowRankUpdate
from .merging import MergingLayer
from .processes import check_is_alike, share_of
from .switches import Switches, SwitchingLayer

# `grouped_mm` needs rows whose size is a multiple of this number of bytes.
ROW_BYTES = 16


class FactoredExpertsLayer(MergingLayer, SwitchingLayer):
    """
    A `ParamWrapper` that multiplies with W + scaling·B·A without computing the sum: x·W + (x·A)·B for each expert.
    Adapters are saved, loaded and merged as by PEFT. In addition to PEFT's features, it supports dropout, DoRA and a
    different adapter for each row of the batch.

    The adapter of a stack of E experts consists of `lora_A.weight` of shape `(E·r, in)`, where the expert is the slow
    index, and `lora_B.weight` of shape `(out, r·E)`, where the expert is the fast index. With DoRA, it also has
    magnitudes of shape `(E, out)`.

    Args:
        base_layer (`nn.Module`):
            Experts module, or the layer of another stack of the same module.
        adapter_name (`str`):
            Name of the first adapter.
        parameter_name (`str`):
            Name of the stack.
        config (`LoraConfig`):
            Configuration of the adapter.
        kwargs:
            Additional arguments of `ParamWrapper`.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **kwargs: Any
    ):
        super().__init__(base_layer, adapter_name, parameter_name=parameter_name, config=_plain(config), **kwargs)
        self.stack_name = kwargs.get("target_name", parameter_name)
        self._prepare()
        self._extend(adapter_name, config)

    @classmethod
    def take_over(cls, layer: ParamWrapper, stack_name: str) -> None:
        """Turns a layer of PEFT into a layer of this class. `stack_name` is the name of the stack in the model."""
        layer.__class__ = cls
        layer.stack_name = stack_name
        layer._prepare()

    def _prepare(self) -> None:
        # Mask of the outputs that an adapter may change, by adapter. An adapter without a mask may change all outputs.
        self.output_masks: dict[str, torch.Tensor] = {}
        # The part of the stack that this process has; `None` if it has the whole stack.
        self.share = share_of(self.get_param(), self._did_swap_in_out_features)
        self._memory = StepMemory()
        self.merged_rescale: dict[str, torch.Tensor] = {}
        self.switches = Switches()
        expert_seam.prepare(self.get_base_layer())

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=_plain(config), **kwargs)
        if hasattr(self, "_memory"):  # missing while the constructor of PEFT runs
            self._extend(adapter_name, config)

    def _move_adapter_to_device_of_base_layer(self, *args: Any, **kwargs: Any) -> None:
        # Offloaded weights are on the meta device. PEFT would move the adapter there, and its values would be lost.
        with align_module_device(self.get_base_layer()):
            super()._move_adapter_to_device_of_base_layer(*args, **kwargs)

    def _extend(self, adapter_name: str, config: LoraConfig) -> None:
        """Adds the features that PEFT's layer does not support to an adapter."""
        if config.lora_dropout:
            self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        if config.use_dora:
            self.use_dora[adapter_name] = True
            with align_module_device(self.get_base_layer()):
                magnitude = initial_magnitude(self.out_first(self.get_param()), self.lora_A[adapter_name].weight.dtype)
            self.lora_magnitude_vector[adapter_name] = magnitude
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        settle = getattr(config, "settle", None)
        if settle is not None:
            settle(self, adapter_name)

    def out_first(self, stack: torch.Tensor) -> torch.Tensor:
        """Returns a stack, given in the orientation of the parameter, with shape `(E, out, in)`."""
        return stack if self._did_swap_in_out_features else stack.transpose(1, 2)

    def keep_zero_outputs(self, adapter_name: str) -> None:
        """Restricts a loaded adapter of only the gate or only the up projection to its half of the outputs."""
        weight = self.lora_B[adapter_name].weight
        if weight.is_meta or self.parameter_name != "gate_up_proj" or adapter_name in self.output_masks:
            return
        used = weight.detach().any(dim=1)
        for projection in ("gate", "up"):
            mask = self.output_mask(projection)
            if used.any() and not (used & ~mask.to(used.device)).any():
                self.output_masks[adapter_name] = mask

    def output_mask(self, projection: str) -> torch.Tensor:
        """Returns a bool mask of shape `(out,)` of the outputs of `"gate"` or `"up"` in the fused stack of both."""
        size = self.lora_B[next(iter(self.lora_B))].weight.shape[0]
        index = torch.arange(size)
        is_gate = index < size // 2 if self.get_base_layer().is_concatenated else index % 2 == 0
        return is_gate if projection == "gate" else ~is_gate

    def factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns the factors of an adapter, in their own dtype.

        Args:
            adapter_name (`str`):
                Name of the adapter.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: A of shape `(E, r, in)` and Bᵀ of shape `(E, r, out)`. They are views
            of the weights, except for Bᵀ of an adapter with an output mask.
        """
        lora_a, lora_b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        b = lora_b.view(lora_b.shape[0], -1, self.num_experts).permute(2, 1, 0)
        if adapter_name in self.output_masks:
            b = b * self.output_masks[adapter_name].to(b)
        return lora_a.view(self.num_experts, -1, lora_a.shape[-1]), b

    def update(self, adapter_name: str) -> LowRankUpdate:
        """Returns the update of the stack by an adapter, in the orientation of the stack and in its dtype."""
        dtype = self.get_base_layer()._parameters[self.parameter_name].dtype
        a, b = self.factors(adapter_name)
        if a.is_meta:
            raise ValueError(
                f"the adapter {adapter_name!r} of {self.stack_name!r} has no values: PEFT puts adapters of offloaded "
                "weights on the meta device. Call `page_experts` before `get_peft_model`, or load a trained adapter "
                "with `load_expert_lora`."
            )
        if self.share is not None and not self.share.is_whole:
            check_is_alike(self.lora_A[adapter_name].weight, self.stack_name, adapter_name)
            a, b = self.share.of(a, b)
        if dtype.is_floating_point and dtype.itemsize > 1:
            a, b = a.to(dtype), b.to(dtype)
        b, scaling = b.contiguous(), self.scaling[adapter_name]
        if not torch.is_grad_enabled():
            b, scaling = b * scaling, 1.0  # once, instead of in every product
        padding = -a.shape[1] % (ROW_BYTES // a.element_size())
        if padding:
            a, b = (F.pad(factor, (0, 0, 0, padding)) for factor in (a, b))
        dropout = self.lora_dropout[adapter_name]
        update = LowRankUpdate(a, b, scaling, dropout if isinstance(dropout, nn.Dropout) else None)
        return update.transpose() if self._did_swap_in_out_features else update

    def rescale(self, adapter_name: str, stack: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        """
        Computes the factor by which DoRA rescales each output, m / ‖W + scaling·B·A‖.

        Args:
            adapter_name (`str`):
                Name of the adapter.
            stack (`torch.Tensor`):
                W, in the orientation of the parameter.
            experts (`torch.Tensor`, *optional*):
                Indices of the experts in `stack`. By default, it contains all experts.

        Returns:
            `torch.Tensor` of shape `(E, out)`, in the dtype of `stack`.
        """
        if self.share is not None:
            experts = self.share.experts
        magnitude = self.lora_magnitude_vector[adapter_name].weight
        weights = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight

        def norm() -> torch.Tensor:
            a, b = self.factors(adapter_name)
            a, b = (a, b) if experts is None else (a[experts], b[experts])
            return adapted_norm(self.out_first(stack), a, b, self.scaling[adapter_name])

        if experts is None:
            norms = self._memory.get(adapter_name, (*weights, stack), self.scaling.values(), norm)
        else:
            norms, magnitude = norm(), magnitude[experts]
        return (magnitude / norms.to(magnitude.dtype)).to(stack.dtype)

    def forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any):
        if self.disable_adapters or (self.merged and adapter_names is None):
            return super().forward(x, *args, **kwargs)
        if adapter_names is not None:
            return run_by_row(self, adapter_names, x, *args, *kwargs.values())
        return self.run(self.active_adapters, x, *args, **kwargs)

    def run(self, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs the experts with these adapters, for all nested layers in one call."""
        adapters: dict[str, expert_seam.Adapt] = {}
        experts: Any = self
        num_tokens = next(iter((*args, *kwargs.values()))).shape[0]
        while isinstance(experts, FactoredExpertsLayer):
            layer, experts = experts, experts._modules["base_layer"]
            has = layer._modules["lora_A"]._modules
            names = [name for name in adapter_names if name in has]
            layer._memory.begin(num_tokens, layer.num_experts)
            if names:
                check_dora(layer, names)
                adapters[layer.parameter_name] = partial(AdaptedStack, layer, names, layer._updates(names))
        try:
            return expert_seam.run_with_adapters(experts, adapters, *args, **kwargs)
        finally:
            layer = self
            while isinstance(layer, FactoredExpertsLayer):
                layer._memory.end()
                layer = layer._modules["base_layer"]

    def _updates(self, adapter_names: Sequence[str]) -> Sequence[LowRankUpdate]:
        """Returns the updates of adapters. In a decoding step, those of the previous step are reused."""
        # Reads the dictionaries directly: `nn.Module.__getattr__` is slow enough to matter in a decoding step.
        factors = [self._modules[factor]._modules for factor in ("lora_A", "lora_B")]
        weights = [factor[name]._parameters["weight"] for name in adapter_names for factor in factors]
        dtype = self.get_base_layer()._parameters[self.parameter_name].dtype
        settings = (*adapter_names, *self.scaling.values(), dtype)
        return self._memory.get("updates", weights, settings, lambda: [self.update(name) for name in adapter_names])


# PEFT recognises its own layers, into which it nests the next layer of a module, by the name of their class.
FactoredExpertsLayer.__name__ = ParamWrapper.__name__


def run_factored(config: LoraConfig, experts: Iterable[nn.Module]) -> None:
    """Makes PEFT adapt experts modules of these classes with [`FactoredExpertsLayer`] instead of its own layer."""
    config._register_custom_module({expert_seam.class_of(module): FactoredExpertsLayer for module in experts})


def _plain(config: LoraConfig) -> LoraConfig:
    """Returns a copy of a configuration without the features that PEFT's own layer refuses."""
    config = copy.copy(config)
    config.lora_dropout, config.use_dora = 0.0, False
    return config
