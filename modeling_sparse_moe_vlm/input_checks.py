"""Checks of the arguments of a forward pass. They only read shapes and names, so they never wait for a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from .cache_name import is_paged
from .routing import RoutingPlanner
from .steering import initial_log_priors
from .token_modalities import positions_fit

logger = logging.get_logger(__name__)


def check_shapes(
    shape: Sequence[int], attention_mask: Any, position_ids: torch.Tensor | None, cache: Any | None
) -> None:
    """
    Checks that the shapes of the mask and the positions match the tokens. Transformers would silently broadcast or pad
    them.

    Args:
        shape (`Sequence[int]`):
            Shape `(B, T)` of the tokens.
        attention_mask (`torch.Tensor`, *optional*):
            Mask `(B, number of cached tokens + T)`. Prepared masks with 4 dimensions or of another type are not
            checked.
        position_ids (`torch.Tensor`, *optional*):
            Positions `(B, T)` or `(1, T)`.
        cache (`Cache`, *optional*):
            Key/value cache before the forward pass.

    Raises:
        ValueError: If a shape does not match.
    """
    batch_size, length = shape
    if position_ids is not None and not positions_fit(position_ids, shape):
        raise ValueError(
            f"`position_ids` has shape {tuple(position_ids.shape)}, but there are tokens of shape {tuple(shape)}: pass "
            "one position per token of this call."
        )
    if not torch.is_tensor(attention_mask) or attention_mask.dim() == 4:
        return
    cached = 0 if cache is None or is_paged(cache) else cache.get_seq_length()
    # Static caches store their length in a tensor on the device.
    fits = attention_mask.dim() == 2 and attention_mask.shape[0] == batch_size
    if fits and isinstance(cached, int):
        fits = attention_mask.shape[1] == cached + length
    elif fits:
        fits = attention_mask.shape[1] >= length
    if not fits:
        expected = (
            f"({batch_size}, {cached + length})" if isinstance(cached, int) else f"({batch_size}, cached + {length})"
        )
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, but tokens and cache need {expected}: pass one "
            "value per token, cached tokens included."
        )


def check_only_tokens(unknown: Mapping[str, Any]) -> None:
    """Raises `ValueError` if the decoder is called with images or similar inputs, which would be ignored."""
    for name in ("pixel_values", "pixel_values_videos", "mm_encoder_outputs", "modality_values"):
        if unknown.get(name) is not None:
            raise ValueError(
                f"a language model takes tokens only, but got `{name}`: load the whole model with "
                "`AutoModelForImageTextToText`, or leave out the argument."
            )


def warn_of_unknown_modalities(config: PreTrainedConfig, planner: RoutingPlanner) -> None:
    """
    Logs a warning for embedded tokens with unknown modalities if the model treats modalities differently.

    Args:
        config (`SparseMoeVlmTextConfig`):
            Configuration of the decoder.
        planner ([`~routing.RoutingPlanner`]):
            Routing planner of the decoder.
    """
    has_priors = config.learned_modality_priors or len(set(initial_log_priors(config))) > 1
    if (planner.depends_on_modality or has_priors) and not torch.compiler.is_compiling():
        logger.warning_once(
            "`inputs_embeds` came without `mm_token_type_ids`: all tokens except placeholders are treated as text, but "
            "this model treats modalities differently. If image features are already merged into the embeddings, as in "
            "serving engines, pass `mm_token_type_ids` (zeros for text). Only models with joint expert groups, the "
            "same number of experts per token and the same attention prior for all modalities, no router biases and no "
            "expert capacity do not need it."
        )


def warn_of_missing_deepstack() -> None:
    """Logs a warning for embedded tokens without images if the model reads DeepStack features."""
    if not torch.compiler.is_compiling():
        logger.warning_once(
            "`inputs_embeds` came without images, but this model also reads DeepStack features (`use_deepstack=True`). "
            "If image features are already merged into the embeddings, as in serving engines, the DeepStack features "
            "are missing: pass `pixel_values` or `mm_encoder_outputs` as well."
        )


def check_encoder_outputs(mm_encoder_outputs: Mapping[str, Any] | None, reads_videos: bool = False) -> None:
    """
    Raises `ValueError` unless the encoder outputs are a dict with no keys other than `"image"` and, for models that
    read videos, `"video"`. The values must be the outputs of [`SparseMoeVlmModel.get_image_features`] and
    [`SparseMoeVlmModel.get_video_features`].
    """
    if mm_encoder_outputs is None:
        return
    if not isinstance(mm_encoder_outputs, Mapping):
        raise ValueError(f"`mm_encoder_outputs` must be a dict, got {type(mm_encoder_outputs).__name__}.")
    for name, outputs in mm_encoder_outputs.items():
        if name != "image" and not (reads_videos and name == "video"):
            known = "one that the model reads is 'image'"
            if reads_videos:
                known = "ones that the model reads are 'image' and 'video'"
            raise ValueError(f"`mm_encoder_outputs` has the key {name!r}, but the only {known}.")
        if getattr(outputs, "pooler_output", None) is None:
            raise ValueError(
                f"`mm_encoder_outputs[{name!r}]` must be what `get_{name}_features` returns, with a `pooler_output`, "
                f"got {type(outputs).__name__}. To read the text without its images, pass an empty dict."
            )


def keep_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    Selects the hidden states whose logits are computed, as in Transformers models.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, D)`):
            Hidden states of all tokens.
        logits_to_keep (`int` or `torch.Tensor`):
            Number of last positions (0 for all), positions for all rows `(K,)`, positions for each row `(B, K)`, or a
            mask `(B, T)` of type bool.

    Returns:
        `torch.Tensor`: The hidden states, of shape `(B, K, D)`, or `(number of selected tokens, D)` for a mask.

    Raises:
        ValueError: If `logits_to_keep` is anything else.
    """
    if isinstance(logits_to_keep, int) and not isinstance(logits_to_keep, bool) and logits_to_keep >= 0:
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if torch.is_tensor(logits_to_keep):
        is_mask = logits_to_keep.dtype == torch.bool
        is_integer = not (is_mask or logits_to_keep.is_floating_point() or logits_to_keep.is_complex())
        if logits_to_keep.dim() == 1 and is_integer:
            return hidden_states[:, logits_to_keep]
        if is_mask and logits_to_keep.shape == hidden_states.shape[:2]:
            return hidden_states[logits_to_keep]
        if logits_to_keep.dim() == 2 and is_integer and logits_to_keep.shape[0] == hidden_states.shape[0]:
            return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
        given = f"a tensor of shape {tuple(logits_to_keep.shape)} and type {logits_to_keep.dtype}"
    else:
        given = repr(logits_to_keep)
    raise ValueError(
        "`logits_to_keep` must be the number of last positions (0 for all), a tensor of positions, or a mask of the "
        f"tokens, got {given}."
    )


def check_labels(labels: torch.Tensor, logits: torch.Tensor) -> None:
    """Raises `ValueError` unless the labels `(B, T)` contain one target per position of the logits `(B, T, V)`."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)}, but there are logits for tokens of shape "
            f"{tuple(logits.shape[:-1])}: pass one target per token, -100 for tokens to ignore."
        )
