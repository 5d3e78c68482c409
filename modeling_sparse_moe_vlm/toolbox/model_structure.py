"""Which modules of any Transformers model hold experts, and what a model is beneath PEFT's adapters."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# What `use_experts_implementation` of Transformers gives a class; the last one is the class's own.
MARKS = ("has_gate", "has_bias", "is_transposed", "_is_expert_parallel", "num_experts")


def uses_experts_interface(module: nn.Module) -> bool:
    """Whether Transformers' experts interface runs the module."""
    return all(hasattr(module, mark) for mark in MARKS)


def base_model_of(model: Any) -> PreTrainedModel:
    """The model within PEFT's, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def name_without_adapters(name: str) -> str:
    """The name that a module of a model with adapters has without them."""
    return re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", name).removeprefix("base_model.model.")


def name_without_shard(name: str) -> str:
    """The name that a module or parameter of a shard has in a model without shards."""
    return re.sub(r"\.shards\.\d+(?=\.|$)", "", name)
