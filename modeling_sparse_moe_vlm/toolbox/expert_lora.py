"""LoRA on experts: a standard PEFT adapter on disk, factored in execution, on any Transformers mixture of experts.

config = expert_lora_config(model, r=8)         # or a LoraConfig with `target_parameters`
model = get_peft_model(model, config)
factor_expert_lora(model)                       # needed with a plain LoraConfig, harmless otherwise
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import set_peft_model_state_dict
from torch import nn

from ..checks import check
from .adapter_upgrade import is_old_version, misread, read_adapter
from .factored_layer import FactoredExpertsLayer, is_experts, run_factored
from .model_structure import name_without_adapters
from .parallel_lora import keep_adapters_alike, prepare_for_adapters
from .sharded_lora import lora_config_for_shards, split_over_shards
from .token_rows import tell_token_rows


def factor_expert_lora(model: nn.Module) -> nn.Module:
    """
    Lets a model's LoRA adapters on experts run factored, as x·W + (x·A)·B, instead of adding W + B·A up for all experts
    in every forward pass. For any model whose experts use Transformers' experts interface, after `get_peft_model`,
    `PeftModel.from_pretrained`, `model.add_adapter` or `model.load_adapter`. Results are PEFT's, up to rounding;
    adapters are saved, loaded, switched, disabled and merged as before.

    Where several processes share the model (`DistributedConfig`), each calls it, after every new adapter: all get the
    values of the first, and the gradients of one process with all batches.

    Args:
        model (`nn.Module`): The model with adapters, changed in place.

    Returns:
        `nn.Module`: the model.

    Raises:
        ValueError:
            If no expert has an adapter, if one was trained by PEFT before 0.19, which took its inputs for outputs, or
            if processes share the model in a way that adapters cannot follow.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper) and is_experts(module.get_base_layer())
    }
    if not layers:
        raise ValueError(
            "no expert of the model has an adapter: make one with `expert_lora_config`, or with "
            '`LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])`.'
        )
    for name, layer in layers.items():
        if not layer.get_base_layer().is_transposed:
            _check_orientation(getattr(model, "peft_config", {}), list(layer.lora_A))
        if not isinstance(layer, FactoredExpertsLayer):
            FactoredExpertsLayer.take_over(layer, f"{name_without_adapters(name)}.{layer.parameter_name}")
        for adapter_name in layer.lora_A:
            layer.keep_zero_outputs(adapter_name)
    keep_adapters_alike(model, list(layers.values()))
    tell_token_rows(model)
    return model


def load_expert_lora(
    model: nn.Module,
    path: str | os.PathLike,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    **hub_options: Any,
) -> PeftModel:
    """
    Loads an adapter as `PeftModel.from_pretrained` does, run factored. Beyond that it loads DoRA of experts, loads onto
    a model whose experts are offloaded or in shards, and refuses adapters of a PEFT that took the experts' inputs for
    outputs.

    Args:
        model (`nn.Module`): The model, without adapters, or a `PeftModel` to add this adapter to.
        path (`str` or `os.PathLike`): The adapter's folder, or its name on the Hub.
        adapter_name (`str`): The name that it gets.
        is_trainable (`bool`): Whether it is trained further.
        **hub_options: `revision`, `token`, `cache_dir`.

    Returns:
        `PeftModel`: the model with the adapter.

    Raises:
        ValueError:
            If the adapter was trained by PEFT before 0.19, has no adapters of experts, or does not fit the model.
    """
    folder, weights = read_adapter(path, model, **hub_options)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not is_trainable
    config = lora_config_for_shards(config, model)
    run_factored(config, [module for module in model.modules() if is_experts(module)])
    prepare_for_adapters(model, config)
    # New values would be lost where PEFT puts them beside offloaded weights, on the meta device.
    is_offloaded = any(parameter.is_meta for parameter in model.parameters())
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config, low_cpu_mem_usage=is_offloaded)
        if is_trainable:
            model.set_requires_grad(adapter_name)
    else:
        model = get_peft_model(model, config, adapter_name, low_cpu_mem_usage=is_offloaded)
    weights = split_over_shards(weights, model)
    result = set_peft_model_state_dict(model, weights, adapter_name, low_cpu_mem_usage=is_offloaded)
    missing = [key for key in result.missing_keys if "lora_" in key and f".{adapter_name}." in key]
    check(
        not missing and not result.unexpected_keys,
        f"the adapter {str(path)!r} does not fit the model: it lacks {missing}, "
        f"and the model lacks {result.unexpected_keys}.",
    )
    if not is_trainable:
        model.eval()
    return factor_expert_lora(model)


def _check_orientation(configs: Mapping[str, LoraConfig], adapter_names: Sequence[str]) -> None:
    for name in adapter_names:
        version = getattr(configs.get(name), "peft_version", None)
        if version and is_old_version(version):
            raise ValueError(misread(name, version))


@dataclass
class ExpertLoraConfig(LoraConfig):
    """
    A `LoraConfig` whose adapters of experts are factored from the start, and may have what PEFT alone refuses. On disk
    it is a plain `LoraConfig`: dropout is for training, and is saved as 0 where experts have adapters, since PEFT alone
    would refuse to load them otherwise; ranks and projections are seen from the zeros in the weights.

    Args:
        expert_ranks (`dict[str, list[int]]`, *optional*):
            By name of a stack, as `target_parameters` has it, the rank of each expert, at most `r`; 0 for none.
            Of experts with less, the other rows are 0 and stay so. `lora_alpha / r` scales all alike.
        gate_up (`str`, *optional*):
            `"gate"` or `"up"` where only this half of the stack of gates and ups is adapted.
    """

    expert_ranks: dict[str, list[int]] = field(default_factory=dict)
    gate_up: str | None = None

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        for name in ("expert_ranks", "gate_up"):
            values.pop(name)
        if self.target_parameters:
            values["lora_dropout"] = 0.0
        return values

    @torch.no_grad()
    def settle(self, layer: FactoredExpertsLayer, adapter_name: str) -> None:
        """Confines a layer's new adapter to the ranks and outputs that it may use."""
        if self.gate_up is not None and layer.parameter_name == "gate_up_proj":
            layer.output_masks[adapter_name] = layer.output_mask(self.gate_up)
        ranks = next((ranks for name, ranks in self.expert_ranks.items() if layer.stack_name.endswith(name)), None)
        if ranks is None:
            return
        a, _ = layer.factors(adapter_name)
        if len(ranks) != a.shape[0] or not all(0 <= rank <= a.shape[1] for rank in ranks):
            raise ValueError(
                f"`expert_ranks` of {layer.stack_name!r} must be {a.shape[0]} numbers from 0 to r = {a.shape[1]}, "
                f"got {ranks}."
            )
        used = torch.arange(a.shape[1], device=a.device) < torch.tensor(ranks, device=a.device)[:, None]
        a.mul_(used[:, :, None])
        # Zeros in both factors get no gradient, and stay.
        layer.lora_B[adapter_name].weight.view(-1, a.shape[1], a.shape[0]).mul_(used.T)


def num_adapter_parameters(model: nn.Module) -> int:
    """
    Number of trainable adapter parameters that can change: without the rows beyond an expert's rank, and the outputs
    that an adapter may not change. PEFT's own count has the zeros, too.
    """
    total = 0
    counted: set[nn.Parameter] = set()
    for layer in model.modules():
        if not isinstance(layer, FactoredExpertsLayer):
            continue
        for name in layer.lora_A:
            weights = layer.lora_A[name].weight, layer.lora_B[name].weight
            if not all(weight.requires_grad for weight in weights):
                continue
            counted.update(weights)
            a, _ = layer.factors(name)
            rows = int(a.detach().any(dim=-1).sum())
            mask = layer.output_masks.get(name)
            total += rows * (a.shape[-1] + (weights[1].shape[0] if mask is None else int(mask.sum())))
    for parameter in model.parameters():
        if parameter.requires_grad and parameter not in counted:
            total += parameter.numel()
    return total
