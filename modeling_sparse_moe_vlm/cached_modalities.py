"""Modality ids of cached tokens: kept with the cache, since its keys do not show them."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing

# A place in a static cache that has not been filled, or was filled by a pass that did not remember its ids.
_UNKNOWN = -1


def remember_modality_ids(mm_token_type_ids: torch.Tensor, cache: Cache) -> torch.Tensor | None:
    """
    Adds the modality ids of the new tokens to those that the cache remembers.

    Args:
        mm_token_type_ids (`torch.Tensor` of shape `(B, T)`):
            Modality ids of the tokens of this pass.
        cache (`Cache`):
            Cached keys and values, before this pass.

    Returns:
        `torch.Tensor` of shape `(B, S)`, *optional*: the modality ids of all keys; text in the empty places of a static
        cache, which a mask hides. `None` if the cache was filled without them.
    """
    known = getattr(cache, "modality_ids", None)
    if known is not None and known.shape[0] != mm_token_type_ids.shape[0]:
        known = None
    if cache.is_compileable:  # its length is fixed
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
