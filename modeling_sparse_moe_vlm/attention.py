"""Self-attention of the decoder, as in Llama and Qwen3, through the attention interface of Transformers.

It runs plain attention, or distributed attention if the forward pass needs it: see `attention_plan.py`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_parts import AttentionParts
from .configuration_sparse_moe_vlm import SparseMoeVlmTextConfig
from .normalization import SparseMoeVlmRMSNorm


class SparseMoeVlmAttention(nn.Module):
    """
    Grouped-query self-attention (arXiv 2305.13245) with rotary position embeddings (except in `config.nope_layers`) and
    optional QK-norm.

    Args:
        config (`SparseMoeVlmTextConfig`):
            Configuration of the decoder.
        layer_idx (`int`):
            Index of the layer.
    """

    def __init__(self, config: SparseMoeVlmTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.is_rotary = layer_idx not in config.nope_layers

        query_size = config.num_attention_heads * self.head_dim
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        out_bias = config.attention_bias if config.attention_out_bias is None else config.attention_out_bias
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=out_bias)
        self.q_norm = (
            SparseMoeVlmRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        )
        self.k_norm = (
            SparseMoeVlmRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        )
        # Log priors log π by head and modality.
        self.modality_log_priors = None
        if config.learned_modality_priors:
            self.modality_log_priors = nn.Parameter(torch.empty(config.num_attention_heads, len(config.modalities)))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_parts: AttentionParts | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Runs the attention.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, D)`):
                Hidden states of the tokens.
            position_embeddings (`tuple[torch.Tensor, torch.Tensor]`):
                Cosines and sines of the rotary position embedding.
            attention_mask (`Any`, *optional*):
                Causal mask in the format of the attention implementation.
            past_key_values (`Cache`, *optional*):
                Key/value cache.
            attention_parts ([`~attention_parts.AttentionParts`], *optional*):
                Distributed attention of the forward pass. `None` for plain attention.
            kwargs (`Any`):
                Other arguments of the attention function.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: The output `(B, T, D)` and, with the eager implementation, the
            attention weights `(B, heads, T, keys)`.
        """
        input_shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*input_shape, -1, self.head_dim)
        key = self.k_proj(hidden_states).view(*input_shape, -1, self.head_dim)
        value = self.v_proj(hidden_states).view(*input_shape, -1, self.head_dim)
        query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, heads, T, head_dim)

        if self.is_rotary:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)

        attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        options = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling, **kwargs}
        log_priors = self.modality_log_priors
        if isinstance(log_priors, DTensor):
            log_priors = log_priors.to_local()  # with tensor parallelism, the priors of the heads of this process
        if attention_parts is not None:
            output, _, weights = attention_parts.attend(
                attention_function, self, query, key, value, attention_mask, log_priors, **options
            )
        else:
            output, weights = attention_function(self, query, key, value, attention_mask, **options)
        output = self.o_proj(output.reshape(*input_shape, -1).contiguous())
        if attention_parts is None and log_priors is not None and self.training:
            output = output + 0.0 * log_priors.sum()  # keeps the priors in the graph for batches with only text
        return output, weights
