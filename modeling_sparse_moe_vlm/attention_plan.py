"""Chooses plain attention or an implementation of distributed attention, once per forward pass for all layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing

from .attention import SparseMoeVlmAttention
from .attention_parts import AttentionParts, RowParts, RunParts
from .attention_runs import find_runs
from .cached_modalities import remember_modality_ids
from .checks import check
from .steering import are_equal, check_guidance, fixed_log_priors
from .visible_keys import visible_counts

# Maximum number of attention weights that every layer keeps to compute the modality weights of all layers together.
MAX_KEPT_ROW = 2**20
# Attention implementations of serving engines, which keep the keys themselves.
ENGINES = ("vllm", "sglang")


def plan_attention(
    config: PreTrainedConfig,
    mm_token_type_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    cache: Cache | None,
    *,
    attentions: Sequence[SparseMoeVlmAttention] = (),
    parameters: Iterable[torch.nn.Parameter] = (),
    output_attentions: bool = False,
    output_modality_weights: bool = False,
    modality_priors: Mapping[str, float] | None = None,
    modality_guidance: float = 0.0,
) -> AttentionParts | None:
    """
    Determines whether a forward pass needs distributed attention, and prepares the fastest implementation that supports
    it.

    Args:
        config (`SparseMoeVlmTextConfig`):
            Configuration of the decoder.
        mm_token_type_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
            Modality id of every token. By default, all tokens are text.
        inputs_embeds (`torch.Tensor` of shape `(B, T, D)`):
            Embeddings of the tokens.
        attention_mask (`Any`, *optional*):
            Causal mask in the format of the attention implementation.
        cache (`Cache`, *optional*):
            Cached keys and values before this call.
        attentions (`Sequence[SparseMoeVlmAttention]`, *optional*):
            Attention modules of all layers.
        parameters (`Iterable[torch.nn.Parameter]`, *optional*):
            Parameters of the decoder, used to determine whether gradients are needed.
        output_attentions (`bool`, *optional*, defaults to `False`):
            Whether the attention weights of the layers are returned.
        output_modality_weights (`bool`, *optional*, defaults to `False`):
            See [`SparseMoeVlmForConditionalGeneration.forward`].
        modality_priors (`Mapping[str, float]`, *optional*):
            See [`SparseMoeVlmForConditionalGeneration.forward`].
        modality_guidance (`float`, *optional*, defaults to 0.0):
            See [`SparseMoeVlmForConditionalGeneration.forward`].

    Returns:
        [`~attention_parts.AttentionParts`], *optional*: The implementation. `None` if plain attention gives the same
        result.

    Raises:
        ValueError: If `modality_priors` or `modality_guidance` are invalid, if the cache was filled without the
            modality ids that are needed now, or if a serving engine computes the attention.
    """
    check_guidance(modality_guidance)
    log_priors = fixed_log_priors(config, modality_priors)
    learned = [each.modality_log_priors for each in attentions if each.modality_log_priors is not None]
    is_distributed = bool(
        output_modality_weights or modality_guidance or log_priors is not None or not are_equal(learned)
    )
    if not (is_distributed or learned):
        return None
    batch_size, length = inputs_embeds.shape[:2]
    if mm_token_type_ids is None:
        mm_token_type_ids = torch.zeros(batch_size, length, dtype=torch.long, device=inputs_embeds.device)
    key_ids: torch.Tensor | None = mm_token_type_ids
    if cache is not None:  # also if the learned priors are still equal, because a later call may need the ids
        key_ids = remember_modality_ids(mm_token_type_ids, cache)
    if not is_distributed:
        return None
    check(
        key_ids is not None,
        "the cache was filled without the modality ids of its tokens, which distributed attention needs now: pass "
        "`output_modality_weights`, `modality_priors` or `modality_guidance` from the first call that fills the cache.",
    )
    assert key_ids is not None
    traced = is_tracing(mm_token_type_ids)
    if not (output_modality_weights or traced) and not (key_ids != key_ids[:1, :1]).any():
        return None  # there is only one part, which has weight 1

    check(
        config._attn_implementation not in ENGINES,
        f"distributed attention needs the keys, but the engine {config._attn_implementation!r} keeps them itself: only "
        "serve models with equal attention priors (`alpha_init` = `beta_init`, `learned_modality_priors=False`), and "
        "do not pass `modality_priors`, `modality_guidance` or `output_modality_weights`.",
    )
    num_modalities = len(config.modalities)
    parts: dict[str, Any] = {
        "key_ids": key_ids,
        "num_modalities": num_modalities,
        "log_priors": None if log_priors is None else torch.tensor(log_priors, device=inputs_embeds.device),
        "guidance": modality_guidance,
    }
    if output_modality_weights:
        parts["counts"] = visible_counts(attention_mask, key_ids, length, num_modalities)
    if output_attentions or any(attention.training and attention.attention_dropout for attention in attentions):
        return AttentionParts(**parts)
    if length == 1 and _is_dense(attention_mask):
        few = key_ids.numel() * config.num_attention_heads <= MAX_KEPT_ROW
        return RowParts(**parts, keeps_rows=output_modality_weights and few)
    if attention_mask is None and not traced and key_ids.device.type == "cpu":
        runs = find_runs(mm_token_type_ids)
        # In this implementation, the modality weights and the guidance have no gradient.
        without_gradient = output_modality_weights or modality_guidance
        if runs is not None and not (without_gradient and _has_gradient(inputs_embeds, parameters)):
            return RunParts(**parts, runs=runs)
    return AttentionParts(**parts)


def _is_dense(attention_mask: Any) -> bool:
    return attention_mask is None or (torch.is_tensor(attention_mask) and attention_mask.dim() == 4)


def _has_gradient(inputs_embeds: torch.Tensor, parameters: Iterable[torch.nn.Parameter]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return inputs_embeds.requires_grad or any(parameter.requires_grad for parameter in parameters)
