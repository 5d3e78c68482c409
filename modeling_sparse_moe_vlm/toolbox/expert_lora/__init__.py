"""
LoRA on the experts of any Transformers model. The adapter is a standard PEFT adapter on disk and runs factored: x·W +
(x·A)·B instead of x·(W + A·B).
"""

from .config import ExpertLoraConfig, num_adapter_parameters
from .dense_models import decoder_lora_config
from .loading import factor_expert_lora, load_expert_lora
from .peft_0_18 import upgrade_expert_adapter
from .selection import busiest_experts, expert_lora_config
from .shards import load_adapter, lora_config_for_shards, save_adapter

__all__ = [
    "ExpertLoraConfig",
    "busiest_experts",
    "decoder_lora_config",
    "expert_lora_config",
    "factor_expert_lora",
    "load_adapter",
    "load_expert_lora",
    "lora_config_for_shards",
    "num_adapter_parameters",
    "save_adapter",
    "upgrade_expert_adapter",
]
