"""
What only the installed package has, and the code in checkpoints does not: the public classes, registered with the auto
classes of Transformers; atomic saves; and a warning about checkpoints with other code.
"""

import sys

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from ..configuration_retrieval import SparseMoeVlmRetrievalConfig
from ..configuration_sparse_moe_vlm import SparseMoeVlmConfig, SparseMoeVlmTextConfig
from ..experts_host import ExpertsHost
from ..fusion import SparseMoeFusion
from ..modeling_retrieval import SparseMoeVlmForImageTextRetrieval
from ..modeling_sparse_moe_vlm import (
    SparseMoeVlmForCausalLM,
    SparseMoeVlmForConditionalGeneration,
    SparseMoeVlmModel,
    SparseMoeVlmPreTrainedModel,
    SparseMoeVlmTextModel,
)
from ..processing_sparse_moe_vlm import SparseMoeVlmProcessor
from . import code_revisions, staged_saves

# The classes are registered only in this file, because it is not copied into checkpoints. Once the package is imported,
# the auto classes use its code for every checkpoint of these model types. In processes that do not import the package,
# they use the code in the checkpoint.
for _config in (SparseMoeVlmTextConfig, SparseMoeVlmConfig, SparseMoeVlmRetrievalConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
AutoModel.register(SparseMoeVlmTextConfig, SparseMoeVlmTextModel, exist_ok=True)
AutoModel.register(SparseMoeVlmConfig, SparseMoeVlmModel, exist_ok=True)
AutoModel.register(SparseMoeVlmRetrievalConfig, SparseMoeVlmForImageTextRetrieval, exist_ok=True)
for _auto_class in (AutoModelForCausalLM, AutoModelForMultimodalLM):
    _auto_class.register(SparseMoeVlmTextConfig, SparseMoeVlmForCausalLM, exist_ok=True)
for _auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(SparseMoeVlmConfig, SparseMoeVlmForConditionalGeneration, exist_ok=True)
for _config in (SparseMoeVlmConfig, SparseMoeVlmRetrievalConfig):
    AutoProcessor.register(_config, SparseMoeVlmProcessor, exist_ok=True)

ExpertsHost._warn_of_other_code = staticmethod(code_revisions.warn_of_other_code)
ExpertsHost._staged_folder = staticmethod(staged_saves.staged_folder)
# Both modules have moved. They stay importable from the package.
for _module in (code_revisions, staged_saves):
    _name = _module.__name__.rpartition(".")[2]
    sys.modules[f"{__package__.rpartition('.')[0]}.{_name}"] = _module

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
