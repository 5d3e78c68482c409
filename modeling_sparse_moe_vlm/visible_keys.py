"""Number of keys of each modality that a query sees, derived from the attention mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_mask


def visible_counts(
    attention_mask: Any,
    key_ids: torch.Tensor,
    length: int,
    num_modalities: int,
    *,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """
    Counts the keys of each modality that a query sees.

    Args:
        attention_mask (`torch.Tensor` or `BlockMask`, *optional*):
            Mask in the format of the attention implementation: `None` for causal attention, `(B, S)` with 0 for
            padding, `(B or 1, 1, T, S)`, or a `BlockMask`.
        key_ids (`torch.Tensor` of shape `(B, S)`):
            Modality id of every key.
        length (`int`):
            Number T of queries.
        num_modalities (`int`):
            Number M of modalities.
        sliding_window (`int`, *optional*):
            Maximum number of keys that a query sees. Only for masks that do not include it: `None` or `(B, S)`.

    Returns:
        `torch.Tensor` of shape `(B, T, M)`: The counts, in float32.
    """
    if isinstance(attention_mask, BlockMask):
        batch_size, heads, queries, keys = attention_mask.shape
        attention_mask = create_mask(
            attention_mask.mask_mod, batch_size, heads, queries, keys, device=key_ids.device
        )[..., :length, :]  # fmt: skip
    if attention_mask is not None and attention_mask.dim() == 4:
        key_ids = fit_to_keys(key_ids, attention_mask.shape[-1])
        mask = attention_mask[:, 0]
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return visible.float() @ F.one_hot(key_ids, num_modalities).float()
    if attention_mask is None and length > 1:
        key_ids = key_ids[:, :length]  # the cache is empty; a static cache can be longer
    is_of = F.one_hot(key_ids, num_modalities).float()
    if attention_mask is not None:
        is_of = is_of * attention_mask[:, :, None].to(is_of)
    counts = is_of.cumsum(dim=1)
    if sliding_window is not None:
        counts = counts - F.pad(counts, (0, 0, sliding_window, 0))[:, : counts.shape[1]]
    return counts[:, -length:]


def fit_to_keys(key_ids: torch.Tensor, num_keys: int) -> torch.Tensor:
    """
    Cuts or pads modality ids to the number of keys.

    Args:
        key_ids (`torch.Tensor` of shape `(B, S)`):
            Modality id of every key.
        num_keys (`int`):
            Number of keys.

    Returns:
        `torch.Tensor` of shape `(B, num_keys)`: The ids. Added ids are those of text; the mask hides their keys.
    """
    if key_ids.shape[1] == num_keys:
        return key_ids
    return F.pad(key_ids, (0, max(num_keys - key_ids.shape[1], 0)))[:, :num_keys]
