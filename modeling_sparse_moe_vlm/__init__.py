"""Sparse mixture-of-experts vision-language models for Hugging Face Transformers."""

from transformers import AutoProcessor

from .configuration_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmTextConfig
from .fusion import SparseMoeFusion
from .modeling_sparse_moe_vlm import (
    SparseMoeVlmForCausalLM,
    SparseMoeVlmForConditionalGeneration,
    SparseMoeVlmModel,
    SparseMoeVlmPreTrainedModel,
    SparseMoeVlmTextModel,
)
from .processing_sparse_moe_vlm import SparseMoeVlmProcessor

AutoProcessor.register(SparseMoeVlmConfig, SparseMoeVlmProcessor, exist_ok=True)

__version__ = "0.1.0"

__all__ = [
    "SparseMoeFusion",
    "SparseMoeVlmConfig",
    "SparseMoeVlmForCausalLM",
    "SparseMoeVlmForConditionalGeneration",
    "SparseMoeVlmModel",
    "SparseMoeVlmPreTrainedModel",
    "SparseMoeVlmProcessor",
    "SparseMoeVlmTextConfig",
    "SparseMoeVlmTextModel",
]
