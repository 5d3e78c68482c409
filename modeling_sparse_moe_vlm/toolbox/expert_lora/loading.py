"""
Loading of LoRA adapters on experts, and running them factored. The adapter is a standard PEFT adapter on disk, for any
mixture-of-experts model of Transformers.

```python
config = expert_lora_config(model, r=8)  # or a `LoraConfig` with `target_parameters`
model = get_peft_model(model, config)
factor_expert_lora(model)  # only needed for a plain `LoraConfig`, otherwise without effect
```
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
    Makes the LoRA adapters on the experts of a model run factored, as x·W + (x·A)·B. PEFT itself computes the sum of
    the weights and the update of all experts in every forward pass, which costs time and memory.

    Call it after `get_peft_model`, `PeftModel.from_pretrained`, `model.add_adapter` or `model.load_adapter`, for any
    model whose experts use the experts interface of Transformers. The results equal those of PEFT up to rounding.
    Adapters are saved, loaded, switched, disabled and merged as before.

    If several processes share the model (`DistributedConfig`), every process must call it, after each new adapter. All
    processes then get the adapter values of the first one. The gradients are those that a single process would get
    with all batches.

    Args:
        model (`nn.Module`):
            Model with adapters. It is changed in place.

    Returns:
        `nn.Module`: The same model.

    Raises:
        ValueError: If no expert has an adapter, if an adapter was trained by PEFT before 0.19 (which swapped the inputs
            and outputs of experts), or if the model is distributed in a way that adapters on experts do not support.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper) and is_experts(module.get_base_layer())
    }
    if not layers:
        raise ValueError(
            "no expert of the model has an adapter: create one with `expert_lora_config`, or with "
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
    Loads an adapter as `PeftModel.from_pretrained` does, and makes it run factored. It also loads adapters of experts
    with DoRA, supports models whose experts are offloaded or in shards, and checks the files of the adapter.

    Args:
        model (`nn.Module`):
            Model without adapters, or a `PeftModel` to add the adapter to.
        path (`str` or `os.PathLike`):
            Folder of the adapter, or its name on the Hub.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Name of the adapter in the model.
        is_trainable (`bool`, *optional*, defaults to `False`):
            Whether to train the adapter further. If `False`, the model is put in evaluation mode.
        hub_options:
            `revision`, `token` and `cache_dir` for an adapter on the Hub.

    Returns:
        `PeftModel`: The model with the adapter.

    Raises:
        OSError: If a file of the adapter is missing or damaged. The message names the file.
        ValueError: If the adapter was trained by PEFT before 0.19 (which swapped the inputs and outputs of experts),
            contains no adapters of experts, is not a LoRA adapter or does not fit the model.
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
