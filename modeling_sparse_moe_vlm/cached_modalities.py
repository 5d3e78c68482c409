"""Modality ids of cached tokens, stored as an attribute of the cache."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing

# Position of a static cache that is empty, or that was filled by a forward pass that did not store the ids.
_UNKNOWN = -1


def remember_modality_ids(mm_token_type_ids: torch.Tensor, cache: Cache) -> torch.Tensor | None:
    """
    Adds the modality ids of the new tokens to those stored with the cache.

    Args:
        mm_token_type_ids (`torch.Tensor` of shape `(B, T)`):
            Modality ids of the tokens of this forward pass.
        cache (`Cache`):
            Cached keys and values before this forward pass.

    Returns:
        `torch.Tensor` of shape `(B, S)`, *optional*: The modality ids of all keys. Empty positions of a static cache,
        which the mask hides, have the id of text. `None` if the cache was filled without modality ids.
    """
    known = getattr(cache, "modality_ids", None)
    if known is not None and known.shape[0] != mm_token_type_ids.shape[0]:
        known = None
    if cache.is_compileable:  # a static cache with a fixed length
        return _remember_in_place(mm_token_type_ids, cache, known)
    seen = cache.get_seq_length()
    if known is None:
        known = mm_token_type_ids.new_empty(len(mm_token_type_ids), 0)
    if known.shape[1] < seen:
        return None
    cache.modality_ids = torch.cat([known[:, :seen], mm_token_type_ids.to(known.device)], dim=1)
    return cache.modality_ids


def _remember_in_place(
    mm_token_type_ids: torch.Tensor, cache: Cache, known: torch.Tensor | None
) -> torch.Tensor | None:
    """[`remember_modality_ids`] for a static cache."""
    batch_size, length = mm_token_type_ids.shape
    seen = cache.get_seq_length()
    if known is None:
        known = mm_token_type_ids.new_full((batch_size, cache.get_max_length()), _UNKNOWN)
    if not is_tracing(mm_token_type_ids) and bool((known[:, : int(seen)] == _UNKNOWN).any()):
        return None
    positions = torch.arange(length, device=known.device) + seen
    known = known.index_copy(1, positions, mm_token_type_ids.to(known.device))
    cache.modality_ids = known
    return known.clamp(min=0)
