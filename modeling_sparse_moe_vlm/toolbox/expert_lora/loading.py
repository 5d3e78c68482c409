"""LoRA on experts: a standard PEFT adapter on disk, factored in execution, on any Transformers mixture of experts.

config = expert_lora_config(model, r=8)         # or a LoraConfig with `target_parameters`
model = get_peft_model(model, config)
factor_expert_lora(model)                       # needed with a plain LoraConfig, harmless otherwise
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from .. import expert_seam
from ..expert_modules import is_experts, name_without_adapters
from .adapted_layer import FactoredExpertsLayer, run_factored
from .adapters_by_row import take_names_by_call
from .batch_rows import tell_token_rows
from .peft_0_18 import is_old_version, misread
from .processes import keep_adapters_alike, prepare_for_adapters
from .shards import load_onto


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
        expert_seam.prepare(layer.get_base_layer())
        for adapter_name in layer.lora_A:
            layer.keep_zero_outputs(adapter_name)
    keep_adapters_alike(model, list(layers.values()))
    tell_token_rows(model)
    take_names_by_call(model)
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
        OSError: If a file of the adapter is missing or damaged; the message names it.
        ValueError:
            If the adapter was trained by PEFT before 0.19, has no adapters of experts, or does not fit the model.
    """

    def prepare(config: LoraConfig) -> None:
        run_factored(config, [module for module in model.modules() if is_experts(module)])
        prepare_for_adapters(model, config)

    adapted = load_onto(model, path, adapter_name, is_trainable=is_trainable, prepare=prepare, **hub_options)
    if not is_trainable:
        adapted.eval()
    factor_expert_lora(adapted)
    return adapted


def _check_orientation(configs: Mapping[str, LoraConfig], adapter_names: Sequence[str]) -> None:
    for name in adapter_names:
        version = getattr(configs.get(name), "peft_version", None)
        if version and is_old_version(version):
            raise ValueError(misread(name, version))
