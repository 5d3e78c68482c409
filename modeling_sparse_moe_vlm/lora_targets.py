"""A warning for adapters that skip the routed experts, because these are stacked parameters and not linear layers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from .experts import SparseMoeVlmExperts

# Names of the matrices of an expert in models whose experts are separate modules (as in checkpoints), and of the
# matrices of dense feed-forward blocks in base models of upcycled models.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")


class AdapterConfigs:
    """
    Descriptor for the attribute `peft_config` of a model, which PEFT sets after it has added an adapter. It warns if
    the adapter targets feed-forward blocks, by their usual names or with `"all-linear"`, but no routed expert got one.
    """

    def __get__(self, model: Any, _: type | None = None) -> Any:
        if model is None:
            return self
        try:
            return model.__dict__["peft_config"]
        except KeyError:
            raise AttributeError(f"{type(model).__name__!r} object has no attribute 'peft_config'") from None

    def __set__(self, model: Any, configs: Any) -> None:
        model.__dict__["peft_config"] = configs
        for name, config in configs.items() if isinstance(configs, Mapping) else ():
            _warn_of_missed_experts(model, name, config)

    def __delete__(self, model: Any) -> None:
        model.__dict__.pop("peft_config", None)


def _warn_of_missed_experts(model: nn.Module, adapter_name: str, config: Any) -> None:
    """Warns if an adapter targets feed-forward blocks, but no routed expert got one."""
    targets = getattr(config, "target_modules", None)
    # Configurations with `expert_ranks` come from `expert_lora_config`, in which the user has chosen the experts.
    if not targets or getattr(config, "inference_mode", False) or hasattr(config, "expert_ranks"):
        return
    experts = {name: module for name, module in model.named_modules() if isinstance(module, SparseMoeVlmExperts)}
    if not experts or any("base_layer" in name for name in experts):
        return
    matrices = [f"{name}.{projection}" for name in experts for projection in PROJECTIONS]
    if not any(_is_target(name, targets) for name in matrices) and any(_linear_layers_without_adapter(model)):
        return
    share = _size(experts.values()) / _size([model])
    warnings.warn(
        f"no routed expert gets an adapter: the adapter {adapter_name!r} is for linear layers, but the routed experts, "
        f"{share:.0%} of the model's parameters, are stacked parameters. Create the configuration with "
        "`expert_lora_config(model, …)` from `modeling_sparse_moe_vlm.toolbox.expert_lora` (it includes always-on "
        "experts and, with `attention=True`, the attention), or add "
        '`target_parameters=["gate_up_proj", "down_proj"]` to it.',
        stacklevel=6,  # `get_peft_model`
    )


def _is_target(name: str, targets: str | Iterable[str]) -> bool:
    """Returns whether PEFT would target a module with this name, by a pattern or by the end of its name."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _linear_layers_without_adapter(model: Any) -> Iterator[nn.Module]:
    """Yields the linear layers without an adapter, except for the head, which `"all-linear"` also skips."""
    for name, module in model.named_modules():
        is_part_of_adapter = re.search(r"\.(base_layer|lora_\w+)(\.|$)", name) is not None
        if isinstance(module, nn.Linear) and not is_part_of_adapter and module is not model.get_output_embeddings():
            yield module


def _size(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
