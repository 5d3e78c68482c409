"""The base class of the models: weight initialisation and the settings that Transformers needs."""

import torch
from torch import nn
from transformers import initialization as init

from .attention import SparseMoeVlmAttention
from .configuration_sparse_moe_vlm import SparseMoeVlmConfig
from .experts_host import ExpertsHost
from .steering import initial_log_priors


class SparseMoeVlmPreTrainedModel(ExpertsHost):
    """
    Base class of all models of the package: weight initialisation, loading and saving, and the settings that
    Transformers needs.

    Args:
        config ([`SparseMoeVlmConfig`] or [`SparseMoeVlmTextConfig`]):
            Configuration of the model.
        args (`Any`):
            Other arguments of [`~transformers.PreTrainedModel`].
        kwargs (`Any`):
            Other keyword arguments of [`~transformers.PreTrainedModel`].

    Raises:
        ValueError: If a field of the configuration is invalid or fields contradict each other.
    """

    config: SparseMoeVlmConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["SparseMoeVlmDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache", "pooled_experts"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config, *args, **kwargs):
        config.validate_architecture()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SparseMoeVlmAttention) and module.modality_log_priors is not None:
            log_priors = torch.tensor(initial_log_priors(module.config))
            init.copy_(module.modality_log_priors, log_priors.expand_as(module.modality_log_priors))
