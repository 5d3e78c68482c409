"""Checks of configurations. Every error message names the field and what to do."""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .checks import (
    MAX_LAYERS,
    MAX_MODALITIES,
    MAX_WIDTH,
    check,
    check_boolean,
    check_choice,
    check_distinct,
    check_integer,
    check_layers,
    check_library_fields,
    check_number,
    check_sequence,
    shown,
)
from .native_towers import has_merger, merge_size_of, num_deepstack_levels_of, patches_per_side
from .vision_tower import check_vision_config

TEXT_MODEL_TYPE = "sparse_moe_vlm_text"
# How images get their size: that of the vision tower, or one close to their own.
IMAGE_SIZINGS = ("fixed", "native")
# Fields of the decoder whose values are positive integers, and fields whose values are True or False.
_COUNTS = (
    "vocab_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)
_FLAGS = (
    "use_cache",
    "tie_word_embeddings",
    "attention_bias",
    "use_qk_norm",
    "learned_modality_priors",
)


def check_text_fields(config: PreTrainedConfig) -> None:
    """Raises `ValueError` if a field of the decoder's configuration, other than those of the experts, is invalid."""
    for field in _COUNTS:
        check_integer(field, getattr(config, field), at_most=MAX_WIDTH)
    check_integer("max_position_embeddings", config.max_position_embeddings, at_most=2**62)
    check_number("rms_norm_eps", config.rms_norm_eps)
    for field in _FLAGS:
        check_boolean(field, getattr(config, field))
    if config.attention_out_bias is not None:
        check_boolean("attention_out_bias", config.attention_out_bias)
    check_layers("nope_layers", config.nope_layers, config.num_hidden_layers)
    check_number("attention_dropout", config.attention_dropout, at_most=1)
    for field in ("alpha_init", "beta_init"):
        check_number(field, getattr(config, field))
        check(getattr(config, field) > 0, f"`{field}` must be more than 0, or no token would attend to its part.")
    check(
        isinstance(config.rope_parameters, dict | None),
        f"`rope_parameters` must be a dict, got {shown(config.rope_parameters)}.",
    )
    check(isinstance(config.start, dict | None), f"`start` must be a dict, got {shown(config.start)}.")
    for field in ("pad_token_id", "bos_token_id"):
        if getattr(config, field) is not None:
            check_integer(field, getattr(config, field), at_least=0, below=config.vocab_size)
    _check_eos_token_ids(config)
    check(
        config.num_attention_heads % config.num_key_value_heads == 0,
        f"`num_attention_heads` ({config.num_attention_heads}) must be a multiple of `num_key_value_heads` "
        f"({config.num_key_value_heads}).",
    )
    if config.head_dim is None:
        check(
            config.hidden_size % (2 * config.num_attention_heads) == 0,
            f"`hidden_size` ({config.hidden_size}) must be a multiple of twice `num_attention_heads` "
            f"({config.num_attention_heads}), for rotary embeddings: change one of them, or set `head_dim`.",
        )
    else:
        check_integer("head_dim", config.head_dim, at_most=MAX_WIDTH // config.num_attention_heads)
        check(config.head_dim % 2 == 0, f"`head_dim` must be even for rotary embeddings, got {config.head_dim}.")


def _check_eos_token_ids(config: PreTrainedConfig) -> None:
    """Raises `ValueError` unless `eos_token_id` is a token id, a list of token ids, or `None`."""
    ids = config.eos_token_id
    if isinstance(ids, list | tuple):
        check_sequence("eos_token_id", ids, int)
        check(len(ids) > 0, "`eos_token_id` is an empty list: set it to None if no token ends a text.")
        for position, token_id in enumerate(ids):
            check_integer(f"eos_token_id[{position}]", token_id, at_least=0, below=config.vocab_size)
    elif ids is not None:
        check_integer("eos_token_id", ids, at_least=0, below=config.vocab_size)


def check_rope(config: PreTrainedConfig) -> None:
    """Raises `ValueError` if the rotary embedding parameters, as completed by Transformers, are invalid."""
    check_choice("rope_parameters['rope_type']", config.rope_parameters["rope_type"], ("default", *ROPE_INIT_FUNCTIONS))
    if "rope_theta" in config.rope_parameters:
        theta = config.rope_parameters["rope_theta"]
        check_number("rope_parameters['rope_theta']", theta, at_most=2**62)
        check(theta > 0, f"`rope_parameters['rope_theta']` must be more than 0, got {theta!r}.")
    try:
        config.validate_rope()
    except KeyError as error:
        raise ValueError(f"`rope_parameters` is incomplete: {error}.") from error


def check_fields(config: PreTrainedConfig) -> None:
    """Raises `ValueError` if a field of the whole model is invalid, or if its parts do not fit together."""
    text, vision = config.text_config, config.vision_config
    # Not checked with `isinstance`, because remote code has its own classes.
    check(
        text.model_type == TEXT_MODEL_TYPE and "image" in text.modalities,
        f"`text_config` must be of type {TEXT_MODEL_TYPE!r} with `modalities` that include "
        f"'image', got {text.model_type!r} with {getattr(text, 'modalities', None)}.",
    )
    for field in ("tie_word_embeddings", "use_cache", "multimodal_projector_bias"):
        check_boolean(field, getattr(config, field))
    check_choice("projector_hidden_act", config.projector_hidden_act, ACT2FN)
    _check_placeholder("image_token_id", config.image_token_id, text.vocab_size)
    check_integer("pixel_shuffle_factor", config.pixel_shuffle_factor)
    check(
        config.image_token_id != text.pad_token_id,
        f"`image_token_id` ({config.image_token_id}) is also `text_config.pad_token_id`: choose another token for "
        "images.",
    )
    check_choice("image_sizing", config.image_sizing, IMAGE_SIZINGS)
    check_vision_config(vision, config.image_sizing)
    if config.vision_feature_layer is not None:
        num_layers = getattr(vision, "num_hidden_layers", MAX_LAYERS)
        check_integer("vision_feature_layer", config.vision_feature_layer, at_least=-num_layers - 1)
        check(
            config.vision_feature_layer <= num_layers,
            f"`vision_feature_layer` is {config.vision_feature_layer}, but `vision_config` has {num_layers} layers.",
        )
    if config.image_sizing == "native":
        _check_native_sizes(config)
    else:
        side = patches_per_side(vision)
        check(
            side % config.pixel_shuffle_factor == 0,
            f"`pixel_shuffle_factor` ({config.pixel_shuffle_factor}) must divide the {side} patches per side into "
            f"which `vision_config` splits an image ({vision.image_size} / {vision.patch_size}).",
        )
    _check_deepstack(config)
    _check_modality_encoders(config)
    _check_videos(config)


def _check_deepstack(config: PreTrainedConfig) -> None:
    """Raises `ValueError` if the model cannot use the DeepStack features of its vision tower as it should."""
    if config.use_deepstack is None:
        return
    check_boolean("use_deepstack", config.use_deepstack)
    if not config.use_deepstack:
        return
    vision, num_layers = config.vision_config, config.text_config.num_hidden_layers
    levels = num_deepstack_levels_of(vision)
    check(
        levels > 0,
        f"`use_deepstack` is True, but `vision_config` ({vision.model_type}) has no DeepStack features: leave it out, "
        "or choose a vision tower with `deepstack_visual_indexes` (Qwen3-VL).",
    )
    check_layers("vision_config.deepstack_visual_indexes", vision.deepstack_visual_indexes, vision.depth)
    check(
        levels <= num_layers,
        f"`use_deepstack` adds {levels} levels of features after as many layers, but `text_config.num_hidden_layers` "
        f"is {num_layers}: use more layers, or set `use_deepstack=False`.",
    )


def _check_native_sizes(config: PreTrainedConfig) -> None:
    """Raises `ValueError` if a field does not fit images of different sizes."""
    vision = config.vision_config
    check(
        config.vision_feature_layer is None or not has_merger(vision),
        f"`vision_feature_layer` ({config.vision_feature_layer}) must be left out: `vision_config` "
        f"({vision.model_type}) merges the patches of its last layer.",
    )
    side, patches = patches_per_side(vision), merge_size_of(vision) * config.pixel_shuffle_factor
    check(
        patches <= side,
        f"`pixel_shuffle_factor` ({config.pixel_shuffle_factor}) makes one token of {patches} × {patches} patches, but "
        f"`vision_config` splits a square image into {side} × {side}.",
    )


def _check_placeholder(field: str, token_id: int, vocab_size: int) -> None:
    """Raises `ValueError` unless the decoder has an embedding for a placeholder token."""
    try:
        check_integer(field, token_id, at_least=0, below=vocab_size)
    except ValueError as error:
        if not isinstance(token_id, int) or token_id < vocab_size:
            raise
        raise ValueError(
            f"{error} If you added the token to the tokenizer, set `text_config.vocab_size` ({vocab_size}) to "
            f"`len(tokenizer)`. If the weights do not have as many rows, create the model with another `{field}` and "
            "then run:\n"
            "    model.resize_token_embeddings(len(tokenizer))\n"
            f"    model.config.{field} = {token_id}"
        ) from None


def _check_videos(config: PreTrainedConfig) -> None:
    """Raises `ValueError` if the fields for videos are invalid."""
    check_integer("video_temporal_pooling", config.video_temporal_pooling)
    token_id, text = config.video_token_id, config.text_config
    if token_id is None:
        return
    _check_placeholder("video_token_id", token_id, text.vocab_size)
    check(
        "video" in text.modalities,
        f"`video_token_id` needs 'video' in `text_config.modalities`, got {list(text.modalities)}: set them to "
        "['text', 'image', 'video'].",
    )
    check(
        "video" not in (config.modality_encoders or {}),
        "`video_token_id` and `modality_encoders['video']` exclude each other: the vision tower encodes the frames of "
        "videos.",
    )
    for field, other in (("image_token_id", config.image_token_id), ("text_config.pad_token_id", text.pad_token_id)):
        check(token_id != other, f"`video_token_id` ({token_id}) is also `{field}`: choose another token for videos.")


def _check_modality_encoders(config: PreTrainedConfig) -> None:
    """Raises `ValueError` if an entry of `modality_encoders` is invalid."""
    encoders = config.modality_encoders
    if encoders is None:
        return
    further = [name for name in config.text_config.modalities if name not in ("text", "image")]
    check(
        isinstance(encoders, dict) and len(encoders) <= MAX_MODALITIES and set(encoders) <= set(further),
        "`modality_encoders` must be a dict whose keys are further modalities of `text_config.modalities`, "
        f"{further}, got {shown(encoders)}.",
    )
    for name, encoder in encoders.items():
        check(
            isinstance(encoder, dict) and isinstance(encoder.get("model_type"), str) and "token_id" in encoder,
            f"`modality_encoders[{name!r}]` must be a dict with `model_type`, the encoder's fields and `token_id`, got "
            f"{shown(encoder)}.",
        )
        check_library_fields(f"modality_encoders[{name!r}]", encoder)
        _check_placeholder(
            f"modality_encoders[{name!r}]['token_id']", encoder["token_id"], config.text_config.vocab_size
        )
    check_distinct("placeholder tokens (`image_token_id`, `token_id`s)", list(config.placeholder_ids.values()))
