"""The modality of every token of a forward pass, and which tokens are padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils.import_utils import is_tracing

from .expert_groups import BUILTIN_MODALITIES, served_as


class TokenModalities(NamedTuple):
    """
    The tokens of a forward pass. The outermost model creates this object once and passes it to its submodels as
    `token_modalities`, for the routing, the attention, the router losses and the routing statistics.

    Args:
        ids (`torch.Tensor` of shape `(B, T)`, *optional*):
            Modality id of every token, of type int64. `None` if all tokens are text.
        is_real (`torch.Tensor` of shape `(B, T)`, *optional*):
            `False` for padding, of type bool. `None` if there is no padding.
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
        position_ids: torch.Tensor | None = None,
    ) -> TokenModalities:
        """
        Creates the object from the arguments of a forward pass.

        Args:
            shape (`Sequence[int]`):
                Shape `(B, T)` of the tokens.
            mm_token_type_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
                Modality id of every token, of an integer type. By default, all tokens are text.
            attention_mask (`torch.Tensor`, *optional*):
                See [`real_tokens`].
            modalities (`Sequence[str]`):
                The `modalities` of the configuration. The position of a modality is its id.
            position_ids (`torch.Tensor`, *optional*):
                See [`padding_mask`].

        Returns:
            [`TokenModalities`]: The object.

        Raises:
            ValueError: If the ids have another shape or are not positions in `modalities`. The values of single tokens
                (decoding) are not checked on devices other than the CPU, because this would wait for the device.
        """
        if mm_token_type_ids is not None:
            check_shape(mm_token_type_ids, shape)
            mm_token_type_ids = mm_token_type_ids.long()
            is_cheap = mm_token_type_ids.device.type == "cpu" or shape[1] > 1
            if is_cheap and not is_tracing(mm_token_type_ids):
                check_range(mm_token_type_ids, modalities)
        is_real = None
        attention_mask = padding_mask(attention_mask, position_ids, shape)
        if torch.is_tensor(attention_mask) and attention_mask.dim() == 2:
            rows, length = attention_mask.shape
            # The decoder raises an error for a mask that does not match the tokens.
            fits = rows == shape[0] and length >= shape[1]
            is_real = attention_mask[:, length - shape[1] :].bool() if fits else None
        return cls(mm_token_type_ids, is_real)


def ids_of_step(mm_token_type_ids: torch.Tensor, input_ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    Returns the modality ids of the tokens that a step of `generate` runs. Tokens after the prompt are text, including
    the candidate tokens of assisted decoding, which have no ids yet.

    Args:
        mm_token_type_ids (`torch.Tensor` of shape `(B, S)`):
            Modality ids of the prompt and possibly of tokens after it.
        input_ids (`torch.Tensor` of shape `(B, S')`):
            Token ids of the prompt and the tokens after it, including candidates.
        tokens (`torch.Tensor` of shape `(B, T)` or `(B, T, D)`):
            The last tokens, which this step runs.

    Returns:
        `torch.Tensor` of shape `(B, T)`: The modality ids.
    """
    num_new = max(input_ids.shape[1] - mm_token_type_ids.shape[1], 0)
    ids = nn.functional.pad(mm_token_type_ids, (0, num_new))[:, -tokens.shape[1] :]
    return ids.to(tokens.device).contiguous()


def check_tokens(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """
    Checks that a call has exactly one of two arguments.

    Args:
        input_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
            Token ids.
        inputs_embeds (`torch.Tensor` of shape `(B, T, D)`, *optional*):
            Embeddings of the tokens.

    Returns:
        `torch.Tensor`: The argument that was given.

    Raises:
        ValueError: If both or neither are given.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of `input_ids` and `inputs_embeds`.")
    tokens = input_ids if input_ids is not None else inputs_embeds
    assert tokens is not None
    return tokens


def check_shape(mm_token_type_ids: torch.Tensor, shape: Sequence[int]) -> None:
    """Raises `ValueError` unless there is one modality id per token; `shape` is the shape `(B, T)` of the tokens."""
    if tuple(mm_token_type_ids.shape) != tuple(shape):
        raise ValueError(
            f"`mm_token_type_ids` has shape {tuple(mm_token_type_ids.shape)}, but there are tokens of shape "
            f"{tuple(shape)}: pass one modality id per token of this call."
        )


def check_range(mm_token_type_ids: torch.Tensor, modalities: Sequence[str]) -> None:
    """Raises `ValueError` unless every modality id is a position in `modalities`."""
    if not ((mm_token_type_ids >= 0) & (mm_token_type_ids < len(modalities))).all():
        raise ValueError(
            f"`mm_token_type_ids` must be between 0 and {len(modalities) - 1}, the positions in the configuration's "
            f"`modalities` {tuple(modalities)}, got {mm_token_type_ids.unique().tolist()}."
        )


def listed_ids(mm_token_type_ids: torch.Tensor, modalities: Sequence[str]) -> torch.Tensor:
    """
    Converts the modality ids of Transformers to positions in the `modalities` of the configuration.

    Args:
        mm_token_type_ids (`torch.Tensor`):
            Modality ids of Transformers, of any shape.
        modalities (`Sequence[str]`):
            The `modalities` of the configuration.

    Returns:
        `torch.Tensor`: The positions. Modalities that are not listed are converted as in
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
    Determines the modality ids of the tokens of a call.

    Without `mm_token_type_ids`, placeholder tokens have their modality, and all other tokens are text. Embedded tokens
    are placeholders if they equal the embedding of a placeholder.

    With `mm_token_type_ids` and token ids, the given ids are used with two exceptions. If a row has the id of images at
    a token that is not an image placeholder, the placeholders of the row determine where its images are, because
    callers that pad tokens on the left and ids on the right shift them against each other. (An image placeholder with
    the id of text is text, because the model may have generated it.) For further modalities, the placeholders always
    determine the ids, because processors only know text and images.

    With `mm_token_type_ids` and embedded tokens, the image placeholders determine the ids if their number in a row
    equals the number of image ids. Otherwise, for example if image features are already merged into the embeddings, the
    given ids are used.

    Args:
        input_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
            Token ids.
        inputs_embeds (`torch.Tensor` of shape `(B, T, D)`, *optional*):
            Embeddings of the tokens, if there are no token ids.
        mm_token_type_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
            The given modality ids.
        placeholder_ids (`Mapping[int, int | Sequence[int]]`):
            Ids of the placeholder token or tokens of each modality, by modality id.
        embedding (`nn.Module`):
            Token embedding of the model.

    Returns:
        `torch.Tensor` of shape `(B, T)`: The modality ids, of type int64.

    Raises:
        ValueError: If the given ids do not have the shape of the tokens.
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
                # ONNX Runtime has no `torch.where` for values of type bool.
                is_placeholder = (is_shifted & is_placeholder) | (~is_shifted & is_said_to_be)
            ids = ids.masked_fill(is_said_to_be, 0)
        ids = ids.masked_fill(is_placeholder, modality_id)
    return ids


def _is_placeholder(tokens: torch.Tensor, token_ids: int | Sequence[int], embedding: nn.Module) -> torch.Tensor:
    """
    Returns which tokens `(B, T)` or embedded tokens `(B, T, D)` have one of the token ids, as a tensor `(B, T)` of type
    bool.
    """
    found = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    for token_id in (token_ids,) if isinstance(token_ids, int) else token_ids:
        if tokens.dim() == 2:
            found = found | (tokens == token_id)
        # Without an embedding for the token, the base model embeds another token instead.
        elif token_id < getattr(embedding, "num_embeddings", token_id + 1):
            found = found | (tokens == embedding(torch.tensor(token_id, device=tokens.device))).all(dim=-1)
    return found


def _unshifted(
    ids: torch.Tensor,
    embeds: torch.Tensor,
    placeholder_ids: Mapping[int, int | Sequence[int]],
    embedding: nn.Module,
) -> torch.Tensor:
    """
    Returns the ids of embedded tokens. In rows with as many image placeholders as image ids, the placeholders determine
    where the images are.
    """
    image = BUILTIN_MODALITIES.index("image")
    if image not in placeholder_ids:
        return ids
    is_image = ids == image
    is_placeholder = _is_placeholder(embeds, placeholder_ids[image], embedding)
    # If image features are merged into the embeddings, there are no placeholders to compare with.
    is_shifted = is_placeholder.sum(dim=1, keepdim=True) == is_image.sum(dim=1, keepdim=True)
    return torch.where(is_shifted, ids.masked_fill(is_image, 0).masked_fill(is_placeholder, image), ids)


def positions_fit(position_ids: torch.Tensor, shape: Sequence[int]) -> bool:
    """
    Returns whether there is one position per token.

    Args:
        position_ids (`torch.Tensor`):
            Positions, which should have the shape `(B or 1, T)`.
        shape (`Sequence[int]`):
            Shape `(B, T)` of the tokens.
    """
    if position_ids.dim() != 2 or position_ids.shape[1] != shape[1]:
        return False
    # Two comparisons: in compiled code, `in (1, B)` is wrong where only one of the sizes is symbolic.
    return position_ids.shape[0] == 1 or position_ids.shape[0] == shape[0]


def padding_mask(attention_mask: Any, position_ids: torch.Tensor | None, shape: Sequence[int]) -> Any:
    """
    Returns a mask of the padding, also for packed sequences. Packed sequences have no attention mask: positions that
    restart separate them. Their padding has negative positions.

    Args:
        attention_mask (`torch.Tensor`, *optional*):
            Attention mask of the call, which is returned if there is one.
        position_ids (`torch.Tensor` of shape `(B or 1, T)` or `(number of axes, B, T)`, *optional*):
            Positions of the tokens. With several axes, the first one is used.
        shape (`Sequence[int]`):
            Shape `(B, T)` of the tokens.

    Returns:
        `torch.Tensor` of shape `(B, T)`, *optional*: `False` for padding, of type bool. `None` if there is neither a
        mask nor a position for each of several tokens.
    """
    if attention_mask is not None or position_ids is None or shape[1] == 1:
        return attention_mask
    positions = position_ids[0] if position_ids.dim() == 3 else position_ids
    if not positions_fit(positions, shape):
        return None  # the decoder raises an error
    return (positions >= 0).expand(shape[0], -1)


def real_tokens(attention_mask: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
    """
    Returns which tokens of a forward pass are not padding.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch_size, number of cached tokens + sequence_length)`, *optional*):
            0 for padding. A mask with another number of dimensions or of another type is ignored.
        num_tokens (`int`):
            Number of tokens, `batch_size * sequence_length`.

    Returns:
        `torch.Tensor` of shape `(num_tokens,)`, *optional*: `False` for padding, of type bool. `None` if no token is
        known to be padding.
    """
    if not torch.is_tensor(attention_mask) or attention_mask.dim() != 2:
        return None
    length = num_tokens // attention_mask.shape[0]
    return attention_mask[:, attention_mask.shape[1] - length :].reshape(-1).bool()


def flat_tokens(
    mm_token_type_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, num_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns the modality and padding of the tokens of a forward pass, in the order of its router logits.

    Args:
        mm_token_type_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Modality id of every token. By default, all tokens are text.
        attention_mask (`torch.Tensor`, *optional*):
            See [`real_tokens`].
        num_tokens (`int`):
            Number of tokens, `batch_size * sequence_length`.
        device (`torch.device`):
            Device of the results.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The modality ids, and which tokens are not padding (of type bool), both of
        shape `(num_tokens,)`.
    """
    ids = torch.zeros(num_tokens, dtype=torch.long, device=device)
    if mm_token_type_ids is not None:
        ids = mm_token_type_ids.reshape(-1).to(device)
    real = real_tokens(attention_mask, num_tokens)
    return ids, torch.ones(num_tokens, dtype=torch.bool, device=device) if real is None else real.to(device)
