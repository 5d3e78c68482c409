"""
Adapters of experts that are distributed over several processes (`DistributedConfig`). Every process has whole adapters,
as on disk. It multiplies with the part of the factors that belongs to its experts, or to its rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...checks import check
from ...parallel_plans import forget_plans_of_stacks
from ..expert_modules import base_model_of

# Axes of a device mesh along which experts stay split while they run. Along the other axes, FSDP gathers them.
CUT = ("ep", "tp")
# Name of the attribute that marks a parameter with the same values and gradients in all processes.
MARK = "_is_alike_in_all_processes"


@dataclass(frozen=True)
class StackShare:
    """
    The part of a stack of experts that this process has, given by indices of type int64.

    Args:
        experts (`torch.Tensor`, *optional*):
            Indices of its experts; `None` for all.
        inputs (`torch.Tensor`, *optional*):
            Indices of its inputs of each expert; `None` for all.
        outputs (`torch.Tensor`, *optional*):
            Indices of its outputs of each expert; `None` for all.
    """

    experts: torch.Tensor | None
    inputs: torch.Tensor | None
    outputs: torch.Tensor | None

    @property
    def is_whole(self) -> bool:
        return self.experts is None and not self.cuts_matrices

    @property
    def cuts_matrices(self) -> bool:
        return self.inputs is not None or self.outputs is not None

    def of(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns its part of the factors A of shape `(E, r, in)` and Bᵀ of shape `(E, r, out)` of the whole stack."""
        return _take(_take(a, 0, self.experts), 2, self.inputs), _take(_take(b, 0, self.experts), 2, self.outputs)


def share_of(stack: Any, out_first: bool) -> StackShare | None:
    """
    Returns the part of a stack of experts that this process runs.

    Args:
        stack (`torch.Tensor` of shape `(E, out, in)` or `(E, in, out)`):
            The stack, as it is stored in its module.
        out_first (`bool`):
            Whether the shape is `(E, out, in)`.

    Returns:
        [`StackShare`]: The part, or `None` if the stack is not distributed.
    """
    if not is_spread(stack):
        return None
    places: list[torch.Tensor | None] = [None] * stack.dim()
    mesh = stack.device_mesh
    for axis, placement in enumerate(stack.placements):
        if mesh.mesh_dim_names is None or mesh.mesh_dim_names[axis] not in CUT or placement.is_replicate():
            continue
        whole = torch.arange(stack.shape[placement.dim], device=stack.device)
        # In a concatenated stack of gates and ups, both halves are split separately.
        parts = [part.chunk(mesh.size(axis)) for part in whole.chunk(getattr(placement, "split_factor", 1))]
        places[placement.dim] = torch.cat([part[mesh.get_local_rank(axis)] for part in parts])
    experts, rows, columns = places
    return StackShare(experts, columns, rows) if out_first else StackShare(experts, rows, columns)


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether a tensor is distributed over processes, that is, a `DTensor`, a class that some builds of torch lack."""
    return hasattr(tensor, "placements")


def prepare_for_adapters(model: nn.Module, config: LoraConfig) -> None:
    """
    Makes PEFT able to adapt the experts of a model that is distributed over several processes. Has no effect on other
    models.

    Args:
        model (`nn.Module`):
            Model without the adapter.
        config (`LoraConfig`):
            Configuration of the adapter.

    Raises:
        ValueError: If the configuration uses `modules_to_save` for a distributed module, or DoRA on linear layers. Both
            need whole weights.
    """
    if not any(is_spread(parameter) for parameter in model.parameters()):
        return
    forget_plans_of_stacks(base_model_of(model))
    copied = [
        name
        for name, module in model.named_modules()
        if name.endswith(tuple(config.modules_to_save or ())) and any(map(is_spread, module.parameters()))
    ]
    check(
        not copied,
        f"several processes share {copied[:1]}, so an adapter cannot train it in full (`modules_to_save`, `routers`, "
        "`connector`): leave it out, or load the model without `fsdp_size`.",
    )
    check(
        not (config.use_dora and config.target_modules),
        "several processes share the model, so PEFT cannot adapt its linear layers with `use_dora`: adapt only routed "
        "experts (`expert_lora_config(…, groups=…)`, `attention=False`), or train without `use_dora`.",
    )


def keep_adapters_alike(model: nn.Module, layers: Sequence[ParamWrapper]) -> None:
    """
    Copies the adapters of the first process to all processes, and makes their gradients equal from then on: the
    gradients of all processes are summed and divided by the number of batches, as FSDP does for its shards. All
    processes must call this function. A second call has no effect.

    Args:
        model (`nn.Module`):
            Model with adapters.
        layers (`Sequence[ParamWrapper]`):
            Layers of the experts that have adapters.

    Raises:
        ValueError: If the model is distributed in a way that adapters on experts do not support.
    """
    if not any(is_spread(layer.get_param()) for layer in layers):
        return
    sizes = getattr(base_model_of(model).config, "distributed_config", None)
    if sizes is None:
        return  # FSDP of Accelerate, which also shards the adapters
    check(sizes.pp_size == 1, "adapters on experts do not work with `pp_size`: load the model without it.")
    check(
        not sizes.fsdp_mixed_precision or sizes.ep_size == 1,
        "adapters on experts do not work with `fsdp_mixed_precision` and `ep_size`: load the model with "
        "`dtype=torch.bfloat16` instead. Adapters are trained in float32 in both cases.",
    )
    of_experts = {parameter for layer in layers for parameter in _adapter_parameters(layer)}
    num_processes = torch.distributed.get_world_size()
    num_batches = num_processes // sizes.tp_size
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        for linear in layer.modules():
            if isinstance(linear, nn.Linear) and is_spread(linear.weight):
                # PEFT sets these to the sizes of the local part, which Transformers splits again since 5.21.
                linear.out_features, linear.in_features = linear.weight.shape
        for parameter in _adapter_parameters(layer):
            if is_spread(parameter):
                # PEFT has split the adapter in the same way as its linear layer.
                check(
                    num_batches == 1,
                    f"the adapter of {name!r} is split by `tp_size` and would not learn from the batches of all "
                    "processes: leave out `tp_size` or `fsdp_size`, or adapt only experts.",
                )
            elif not hasattr(parameter, MARK):
                torch.distributed.broadcast(parameter.data, src=0)
                # For adapters of experts, processes with the same batch have the gradients of their own experts only.
                # For adapters of other layers, they all have the same gradient.
                _sum_gradients(parameter, num_batches if parameter in of_experts else num_processes)
                setattr(parameter, MARK, True)


def check_is_alike(parameter: nn.Parameter, stack_name: str, adapter_name: str) -> None:
    """Raises `ValueError` unless [`keep_adapters_alike`] was called for the adapter."""
    check(
        hasattr(parameter, MARK),
        f"several processes share {stack_name!r}, and its adapter {adapter_name!r} may differ between them: call "
        "`factor_expert_lora(model)` in every process, after `get_peft_model`, `PeftModel.from_pretrained` or "
        "`add_adapter`.",
    )


def _take(tensor: torch.Tensor, dim: int, places: torch.Tensor | None) -> torch.Tensor:
    return tensor if places is None else tensor.index_select(dim, places)


def _adapter_parameters(layer: Any) -> list[nn.Parameter]:
    adapters = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    return [parameter for adapter in adapters if adapter is not None for parameter in adapter.parameters()]


def _sum_gradients(parameter: nn.Parameter, divisor: int) -> None:
    def summed(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total.div_(divisor)

    # Also for adapters that are not active now: they may be trained later, but hooks need `requires_grad`.
    is_trained = parameter.requires_grad
    parameter.requires_grad_(True).register_hook(summed)
    parameter.requires_grad_(is_trained)
