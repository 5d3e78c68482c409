"""What a forward pass knows of its tokens: the modality of each, and which are padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils.import_utils import is_tracing

from .expert_groups import BUILTIN_MODALITIES, served_as


class TokenModalities(NamedTuple):
    """
    The tokens of one forward pass. The outermost model makes this once and hands it down (`token_modalities`): routing,
    attention, router losses and statistics all read it.

    Args:
        ids (`torch.Tensor` of shape `(B, T)`, *optional*):
            Modality id of every token, of type int64; all text when `None`.
        is_real (`torch.Tensor` of shape `(B, T)`, *optional*):
            `False` for padding, of type bool; no padding when `None`.
    """

    ids: torch.Tensor | None
    is_real: torch.Tensor | None

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        mm_token_type_ids: torch.Tensor | None,
        attention_mask: Any,
        modalities: Sequence[str],
    ) -> TokenModalities:
        """
        Makes the record of tokens of the shape `(B, T)`.

        Args:
            shape (`Sequence[int]`):
                B and T.
            mm_token_type_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
                Modality id of every token, of an integer type.
            attention_mask (`torch.Tensor`, *optional*):
                See [`real_tokens`].
            modalities (`Sequence[str]`):
                The configuration's `modalities`, of which an id is the position.

        Raises:
            ValueError: If the ids have another shape, or lie outside of `modalities`. On a device that would have to be
                waited for, single tokens are not looked at.
        """
        if mm_token_type_ids is not None:
            check_shape(mm_token_type_ids, shape)
            mm_token_type_ids = mm_token_type_ids.long()
            is_cheap = mm_token_type_ids.device.type == "cpu" or shape[1] > 1
            if is_cheap and not is_tracing(mm_token_type_ids):
                check_range(mm_token_type_ids, modalities)
        is_real = None
        if torch.is_tensor(attention_mask) and attention_mask.dim() == 2:
            rows, length = attention_mask.shape
            # A mask that does not fit the tokens is refused by the decoder.
            fits = rows == shape[0] and length >= shape[1]
            is_real = attention_mask[:, length - shape[1] :].bool() if fits else None
        return cls(mm_token_type_ids, is_real)


def ids_of_step(mm_token_type_ids: torch.Tensor, input_ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    The modality ids of the tokens that a step of `generate` runs. What follows the prompt is text, also candidates of
    assisted decoding, which have no ids yet.

    Args:
        mm_token_type_ids (`torch.Tensor` of shape `(B, S)`):
            Modality ids of the text so far, or at least of the prompt.
        input_ids (`torch.Tensor` of shape `(B, S')`):
            The text so far, with candidates.
        tokens (`torch.Tensor` of shape `(B, T)` or `(B, T, D)`):
            Its last tokens, which this step runs.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    num_new = max(input_ids.shape[1] - mm_token_type_ids.shape[1], 0)
    ids = nn.functional.pad(mm_token_type_ids, (0, num_new))[:, -tokens.shape[1] :]
    return ids.to(tokens.device).contiguous()


def check_tokens(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """The tokens `(B, T)` or `(B, T, D)` of a call; raises `ValueError` unless it gives exactly one of the two."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of `input_ids` and `inputs_embeds`.")
    tokens = input_ids if input_ids is not None else inputs_embeds
    assert tokens is not None
    return tokens


def check_shape(mm_token_type_ids: torch.Tensor, shape: Sequence[int]) -> None:
    """Raises `ValueError` unless there is one modality id per token of the shape `(B, T)`."""
    if tuple(mm_token_type_ids.shape) != tuple(shape):
        raise ValueError(
            f"`mm_token_type_ids` has shape {tuple(mm_token_type_ids.shape)}, but there are tokens of shape "
            f"{tuple(shape)}: it needs one modality id per token of this call."
        )


def check_range(mm_token_type_ids: torch.Tensor, modalities: Sequence[str]) -> None:
    """Raises `ValueError` unless every modality id is a position in `modalities`."""
    if not ((mm_token_type_ids >= 0) & (mm_token_type_ids < len(modalities))).all():
        raise ValueError(
            f"`mm_token_type_ids` must lie between 0 and {len(modalities) - 1}, the positions in the configuration's "
            f"`modalities` {tuple(modalities)}, got {mm_token_type_ids.unique().tolist()}."
        )


def listed_ids(mm_token_type_ids: torch.Tensor, modalities: Sequence[str]) -> torch.Tensor:
    """
    Modality ids as Transformers numbers them, as positions in the configuration's `modalities`: see
    [`~expert_groups.served_as`].
    """
    for modality_id in range(len(modalities), len(BUILTIN_MODALITIES)):
        served = served_as(BUILTIN_MODALITIES[modality_id], modalities)
        mm_token_type_ids = mm_token_type_ids.masked_fill(mm_token_type_ids == modality_id, served)
    return mm_token_type_ids


def find_modalities(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    mm_token_type_ids: torch.Tensor | None,
    placeholder_ids: Mapping[int, int | Sequence[int]],
    embedding: nn.Module,
) -> torch.Tensor:
    """
    Modality ids of the tokens of a call.

    Without given ids, the placeholder tokens tell where images are, and what else has a placeholder; all other tokens
    are text. Given ids hold, with two exceptions where there are token ids. In a row where they say "image" of a token
    that is not the image placeholder, the tokens tell where its images are: callers that pad tokens on the left and ids
    on the right shift them against each other. (A placeholder that is said to be text is text: the model may have
    generated it.) And further modalities always are where their placeholders are, since processors know only of text
    and images. Embedded tokens without given ids have the modality of the placeholder whose embedding they equal. With
    given ids, images are where a row has as many such placeholders as the ids say; else, as when images are merged into
    the embeddings, the ids hold.

    Args:
        input_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
            Token ids.
        inputs_embeds (`torch.Tensor` of shape `(B, T, D)`, *optional*):
            Embedded tokens, where there are no token ids.
        mm_token_type_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
            The given modality ids.
        placeholder_ids (`Mapping[int, int | Sequence[int]]`):
            By modality id, the id of its placeholder token, or of several.
        embedding (`nn.Module`):
            Embeds token ids.

    Returns:
        `torch.Tensor` of shape `(B, T)`, of type int64.

    Raises:
        ValueError: If the given ids have another shape than the tokens.
    """
    tokens = input_ids if input_ids is not None else inputs_embeds
    assert tokens is not None
    ids = torch.zeros(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    if mm_token_type_ids is not None:
        check_shape(mm_token_type_ids, ids.shape)
        ids = mm_token_type_ids.to(tokens.device, torch.long)
        if input_ids is None:
            return _unshifted(ids, tokens, placeholder_ids, embedding)
    for modality_id, token_id in placeholder_ids.items():
        is_placeholder = _is_placeholder(tokens, token_id, embedding)
        if mm_token_type_ids is not None:
            is_said_to_be = ids == modality_id
            if modality_id == BUILTIN_MODALITIES.index("image"):
                is_shifted = (is_said_to_be & ~is_placeholder).any(dim=1, keepdim=True)
                is_placeholder = torch.where(is_shifted, is_placeholder, is_said_to_be)
            ids = ids.masked_fill(is_said_to_be, 0)
        ids = ids.masked_fill(is_placeholder, modality_id)
    return ids


def _is_placeholder(tokens: torch.Tensor, token_ids: int | Sequence[int], embedding: nn.Module) -> torch.Tensor:
    """Which of the tokens `(B, T)`, or embedded tokens `(B, T, D)`, are among the given ones: `(B, T)` of type bool."""
    found = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    for token_id in (token_ids,) if isinstance(token_ids, int) else token_ids:
        if tokens.dim() == 2:
            found = found | (tokens == token_id)
        elif token_id < getattr(embedding, "num_embeddings", token_id + 1):  # else the base embeds another in its place
            found = found | (tokens == embedding(torch.tensor(token_id, device=tokens.device))).all(dim=-1)
    return found


def _unshifted(
    ids: torch.Tensor,
    embeds: torch.Tensor,
    placeholder_ids: Mapping[int, int | Sequence[int]],
    embedding: nn.Module,
) -> torch.Tensor:
    """The given ids of embedded tokens, but images are where a row has as many placeholders as it has image ids."""
    image = BUILTIN_MODALITIES.index("image")
    if image not in placeholder_ids:
        return ids
    is_image = ids == image
    is_placeholder = _is_placeholder(embeds, placeholder_ids[image], embedding)
    # Merged images are no placeholders any more: then there is nothing to compare with.
    is_shifted = is_placeholder.sum(dim=1, keepdim=True) == is_image.sum(dim=1, keepdim=True)
    return torch.where(is_shifted, ids.masked_fill(is_image, 0).masked_fill(is_placeholder, image), ids)


def real_tokens(attention_mask: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
    """
    Which tokens of a forward pass are not padding, `(num_tokens,)` of type bool; `None` for all of them.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch_size, cached + sequence_length)`, *optional*):
            0 for padding. A mask of another rank or kind says nothing of padding, so every token counts.
        num_tokens (`int`):
            Number of tokens, batch_size * sequence_length.
    """
    if not torch.is_tensor(attention_mask) or attention_mask.dim() != 2:
        return None
    length = num_tokens // attention_mask.shape[0]
    return attention_mask[:, attention_mask.shape[1] - length :].reshape(-1).bool()


def flat_tokens(
    mm_token_type_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, num_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The tokens of a forward pass in the order of its router logits.

    Args:
        mm_token_type_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Modality id of every token; all text when `None`.
        attention_mask (`torch.Tensor`, *optional*):
            See [`real_tokens`].
        num_tokens (`int`):
            Number of tokens, batch_size * sequence_length.
        device (`torch.device`):
            Where the result goes.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the modality ids, and which tokens are not padding, of type bool; both
        `(num_tokens,)`.
    """
    ids = torch.zeros(num_tokens, dtype=torch.long, device=device)
    if mm_token_type_ids is not None:
        ids = mm_token_type_ids.reshape(-1).to(device)
    real = real_tokens(attention_mask, num_tokens)
    return ids, torch.ones(num_tokens, dtype=torch.bool, device=device) if real is None else real.to(device)
