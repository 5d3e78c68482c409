"""
Adapters of experts that several processes share (`DistributedConfig`). Every process holds the adapters whole, as they
are on disk, and multiplies with those of the experts, or of the columns, that it has.
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

# The axes of a mesh along which experts stay cut while they run. Along the others, FSDP gathers them.
CUT = ("ep", "tp")
# What a parameter is marked with that has the same values and gradients in all processes.
MARK = "_is_alike_in_all_processes"


@dataclass(frozen=True)
class StackShare:
    """
    What a process has of a stack of experts that several share, by dimension of the stack.

    Args:
        experts (`torch.Tensor`, *optional*): Which experts; `None` for all.
        inputs (`torch.Tensor`, *optional*): Which inputs of each; `None` for all.
        outputs (`torch.Tensor`, *optional*): Which outputs of each; `None` for all.
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
        """What belongs to it of the factors A `(E, r, in)` and Bᵀ `(E, r, out)` of the whole stack."""
        return _take(_take(a, 0, self.experts), 2, self.inputs), _take(_take(b, 0, self.experts), 2, self.outputs)


def share_of(stack: Any, out_first: bool) -> StackShare | None:
    """
    Which part of a stack of experts this process runs.

    Args:
        stack (`torch.Tensor` of shape `(E, out, in)` or `(E, in, out)`): The stack, as its module holds it.
        out_first (`bool`): Whether it has the first of these shapes.

    Returns:
        [`StackShare`], or `None` where no other process has a part of the stack.
    """
    if not is_spread(stack):
        return None
    places: list[torch.Tensor | None] = [None] * stack.dim()
    mesh = stack.device_mesh
    for axis, placement in enumerate(stack.placements):
        if mesh.mesh_dim_names is None or mesh.mesh_dim_names[axis] not in CUT or placement.is_replicate():
            continue
        whole = torch.arange(stack.shape[placement.dim], device=stack.device)
        # Gates and ups that lie one behind the other are cut each.
        parts = [part.chunk(mesh.size(axis)) for part in whole.chunk(getattr(placement, "split_factor", 1))]
        places[placement.dim] = torch.cat([part[mesh.get_local_rank(axis)] for part in parts])
    experts, rows, columns = places
    return StackShare(experts, columns, rows) if out_first else StackShare(experts, rows, columns)


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether several processes hold parts of the tensor (whether it is a DTensor, which not all builds have)."""
    return hasattr(tensor, "placements")


def prepare_for_adapters(model: nn.Module, config: LoraConfig) -> None:
    """
    Lets PEFT adapt the experts of a model that several processes share, and refuses what it cannot adapt.

    Args:
        model (`nn.Module`): The model, without the adapter.
        config (`LoraConfig`): The adapter's configuration.

    Raises:
        ValueError: If the adapter is to change layers in a way that needs all of their weights.
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
        f"several processes share {copied[:1]}, which an adapter cannot train in full (`modules_to_save`, `routers`): "
        "leave it out, or load the model without `fsdp_size`.",
    )
    check(
        not (config.use_dora and config.target_modules),
        "several processes share the model, whose linear layers PEFT cannot adapt with `use_dora` then: adapt routed "
        "experts alone (`expert_lora_config(…, groups=…)`, `attention=False`), or train without it.",
    )


def keep_adapters_alike(model: nn.Module, layers: Sequence[ParamWrapper]) -> None:
    """
    Gives all processes the adapters of the first, and whole gradients: what other processes' experts and batches
    contribute is added, divided by the number of batches, as FSDP does for what it shards. Collective, and again
    harmless.

    Args:
        model (`nn.Module`): The model with adapters.
        layers (`Sequence[ParamWrapper]`): Those of experts.

    Raises:
        ValueError: If the model is shared in a way that its adapters cannot follow.
    """
    if not any(is_spread(layer.get_param()) for layer in layers):
        return
    sizes = getattr(base_model_of(model).config, "distributed_config", None)
    if sizes is None:
        return  # Accelerate's FSDP, which shards adapters as well
    check(sizes.pp_size == 1, "adapters on experts do not work with `pp_size`: load the model without it.")
    check(
        not sizes.fsdp_mixed_precision or sizes.ep_size == 1,
        "adapters on experts do not work with `fsdp_mixed_precision` and `ep_size`: load the model with "
        "`dtype=torch.bfloat16` instead, adapters are trained in float32 all the same.",
    )
    of_experts = {parameter for layer in layers for parameter in _adapter_parameters(layer)}
    num_processes = torch.distributed.get_world_size()
    num_batches = num_processes // sizes.tp_size
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        for linear in layer.modules():
            if isinstance(linear, nn.Linear) and is_spread(linear.weight):
                # PEFT leaves what the process has of them, which Transformers cuts again from 5.21 on.
                linear.out_features, linear.in_features = linear.weight.shape
        for parameter in _adapter_parameters(layer):
            if is_spread(parameter):
                # PEFT has cut it as the linear layer is cut that it belongs to.
                check(
                    num_batches == 1,
                    f"the adapter of {name!r} is cut by `tp_size` and would not learn from the batches of all "
                    "processes: leave `tp_size` or `fsdp_size` out, or adapt experts alone.",
                )
            elif not hasattr(parameter, MARK):
                torch.distributed.broadcast(parameter.data, src=0)
                # Processes that share a batch have the same gradient of other layers, but each its own experts'.
                _sum_gradients(parameter, num_batches if parameter in of_experts else num_processes)
                setattr(parameter, MARK, True)


def check_is_alike(parameter: nn.Parameter, stack_name: str, adapter_name: str) -> None:
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

    # Of an adapter that is not active now, too, which may be trained later.
    is_trained = parameter.requires_grad
    parameter.requires_grad_(True).register_hook(summed)
    parameter.requires_grad_(is_trained)
