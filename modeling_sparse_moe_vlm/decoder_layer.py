"""The decoder layer: attention followed by experts or a dense feed-forward block."""

from __future__ import annotations

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import SparseMoeVlmAttention
from .cache_name import takes_cache_by_name
from .configuration_sparse_moe_vlm import SparseMoeVlmTextConfig
from .experts import SparseMoeVlmMLP, SparseMoeVlmSparseMoeBlock
from .normalization import SparseMoeVlmRMSNorm
from .routing import RoutingPlan


class SparseMoeVlmDecoderLayer(GradientCheckpointingLayer):
    """
    A pre-norm decoder layer: attention followed by experts or a dense feed-forward block.

    Args:
        config (`SparseMoeVlmTextConfig`):
            Configuration of the decoder.
        layer_idx (`int`):
            Index of the layer.
    """

    def __init__(self, config: SparseMoeVlmTextConfig, layer_idx: int):
        super().__init__()
        self.is_sparse = config.is_sparse_layer(layer_idx)
        self.self_attn = SparseMoeVlmAttention(config, layer_idx)
        self.mlp: nn.Module
        if self.is_sparse:
            self.mlp = SparseMoeVlmSparseMoeBlock(config, layer_idx)
        else:
            self.mlp = SparseMoeVlmMLP(config, config.intermediate_size)
        self.input_layernorm = SparseMoeVlmRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = SparseMoeVlmRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @takes_cache_by_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        routing: RoutingPlan | None = None,
        pooled_experts: nn.Module | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Runs the layer.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, D)`):
                Hidden states of the tokens.
            attention_mask (`Any`, *optional*):
                Causal mask in the format of the attention implementation.
            position_embeddings (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
                Cosines and sines of the rotary position embedding.
            past_key_values (`Cache`, *optional*):
                Key/value cache.
            routing ([`~routing.RoutingPlan`], *optional*):
                Routing plan of the forward pass, for sparse layers.
            pooled_experts (`nn.Module`, *optional*):
                The routed experts, if the layer uses an expert pool.
            kwargs (`Any`):
                Other arguments of the attention.

        Returns:
            `torch.Tensor` of shape `(B, T, D)`: The new hidden states.
        """
        attention_output, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attention_output
        normed = self.post_attention_layernorm(hidden_states)
        if self.is_sparse:
            return hidden_states + self.mlp(normed, routing, pooled_experts=pooled_experts)
        return hidden_states + self.mlp(normed)
