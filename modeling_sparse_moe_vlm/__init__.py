"""Sparse mixture-of-experts vision-language models for Hugging Face Transformers."""

import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

# The `sparse-moe-vlm` command also imports this package. To print its help without importing torch, the command
# loads the classes only when it needs them.
_IS_COMMAND = PurePath(*sys.argv[:1]).stem == "sparse-moe-vlm"

if TYPE_CHECKING or not _IS_COMMAND:
    from .registered import (
        SparseMoeFusion,
        SparseMoeVlmConfig,
        SparseMoeVlmForCausalLM,
        SparseMoeVlmForConditionalGeneration,
        SparseMoeVlmForImageTextRetrieval,
        SparseMoeVlmModel,
        SparseMoeVlmPreTrainedModel,
        SparseMoeVlmProcessor,
        SparseMoeVlmRetrievalConfig,
        SparseMoeVlmTextConfig,
        SparseMoeVlmTextModel,
    )

__version__ = "0.1.0"

__all__ = [
    "SparseMoeFusion",
    "SparseMoeVlmConfig",
    "SparseMoeVlmForCausalLM",
    "SparseMoeVlmForConditionalGeneration",
    "SparseMoeVlmForImageTextRetrieval",
    "SparseMoeVlmModel",
    "SparseMoeVlmPreTrainedModel",
    "SparseMoeVlmProcessor",
    "SparseMoeVlmRetrievalConfig",
    "SparseMoeVlmTextConfig",
    "SparseMoeVlmTextModel",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".registered", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
