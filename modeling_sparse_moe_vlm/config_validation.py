"""Validation of configurations: every message names the field and the fix."""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from .checks import (
    check,
    check_boolean,
    check_choice,
    check_distinct,
    check_integer,
    check_layers,
    check_number,
    check_sequence,
)
from .expert_groups import BUILTIN_MODALITIES, resolve_groups
from .vision_tower import check_vision_config, patches_per_side

logger = logging.get_logger(__name__)

TEXT_MODEL_TYPE = "sparse_moe_vlm_text"
ROUTERS = ("softmax", "sigmoid", "top_p")
# Fields of the decoder that hold whole numbers from 1, numbers from 0, and True or False.
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "decoder_sparse_step",
    "num_experts_per_tok",
    "moe_intermediate_size",
)
_NUMBERS = ("initializer_range", "rms_norm_eps", "router_aux_loss_coef", "router_z_loss_coef")
_FLAGS = (
    "use_cache",
    "tie_word_embeddings",
    "attention_bias",
    "use_qk_norm",
    "learned_modality_priors",
    "norm_topk_prob",
    "output_router_logits",
)


def _builtin(position: int) -> str | None:
    return BUILTIN_MODALITIES[position] if position < len(BUILTIN_MODALITIES) else None


def check_text_fields(config: PreTrainedConfig) -> None:
    """Raises `ValueError` if a field of a decoder's configuration is wrong by itself."""
    for field in _COUNTS:
        check_integer(field, getattr(config, field))
    for field in _NUMBERS:
        check_number(field, getattr(config, field))
    for field in _FLAGS:
        check_boolean(field, getattr(config, field))
    check_number("attention_dropout", config.attention_dropout, at_most=1)
    for field in ("alpha_init", "beta_init"):
        check_number(field, getattr(config, field))
        check(getattr(config, field) > 0, f"`{field}` must be more than 0, or its part would never be seen.")
    check_choice("hidden_act", config.hidden_act, ACT2FN)
    check_choice("router", config.router, ROUTERS)
    check_number("router_top_p", config.router_top_p, at_most=1)
    check(config.router_top_p > 0, "`router_top_p` must be more than 0, or no expert would be chosen.")
    check(
        isinstance(config.rope_parameters, dict | None),
        f"`rope_parameters` must be a dict, got {config.rope_parameters!r}.",
    )
    if config.pad_token_id is not None:
        check_integer("pad_token_id", config.pad_token_id, at_least=0, below=config.vocab_size)
    check(
        config.num_attention_heads % config.num_key_value_heads == 0,
        f"`num_attention_heads` ({config.num_attention_heads}) must be a multiple of `num_key_value_heads` "
        f"({config.num_key_value_heads}).",
    )
    if config.head_dim is None:
        check(
            config.hidden_size % (2 * config.num_attention_heads) == 0,
            f"`hidden_size` ({config.hidden_size}) must be a multiple of twice `num_attention_heads` "
            f"({config.num_attention_heads}), for rotary embeddings: choose one, or set `head_dim`.",
        )
    else:
        check_integer("head_dim", config.head_dim)
        check(config.head_dim % 2 == 0, f"`head_dim` must be even for rotary embeddings, got {config.head_dim}.")
    check_layers("mlp_only_layers", config.mlp_only_layers, config.num_hidden_layers)
    check_sequence("modalities", config.modalities, str)
    check_distinct("modalities", config.modalities)
    wrong = [name for i, name in enumerate(config.modalities) if name in BUILTIN_MODALITIES and name != _builtin(i)]
    check(
        bool(config.modalities) and config.modalities[0] == "text" and not wrong,
        f"`modalities` must start with 'text', and {BUILTIN_MODALITIES} must have their own places, which are the ids "
        f"in `mm_token_type_ids`; got {list(config.modalities)}.",
    )
    _check_balancing(config)


def _check_balancing(config: PreTrainedConfig) -> None:
    for field in ("router_local_entropy_coef", "router_global_entropy_coef", "router_global_entropy_threshold"):
        value = getattr(config, field)
        if isinstance(value, dict):
            unknown = sorted(set(value) - set(config.modalities))
            check(not unknown, f"`{field}` names {unknown}, but the `modalities` are {config.modalities}.")
            for modality, number in value.items():
                check_number(f"{field}[{modality!r}]", number)
        elif value is not None or field != "router_global_entropy_threshold":
            check_number(field, value)
    if config.router_bias_update_rate is not None:
        check_number("router_bias_update_rate", config.router_bias_update_rate)
    if config.expert_capacity_factor is not None:
        check_number("expert_capacity_factor", config.expert_capacity_factor)
        check(config.expert_capacity_factor > 0, "`expert_capacity_factor` must be more than 0, or None for no limit.")


def resolve_expert_groups(config: PreTrainedConfig) -> None:
    """Spells the expert groups out, and raises `ValueError` if layers, groups and routing do not fit together."""
    config.expert_groups = resolve_groups(
        config.expert_groups,
        modalities=config.modalities,
        num_experts=config.num_experts,
        intermediate_size=config.moe_intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
    )
    by_modality = config.num_experts_per_tok_by_modality or {}
    check(
        isinstance(by_modality, dict) and set(by_modality) <= set(config.modalities),
        f"`num_experts_per_tok_by_modality` must be a dict whose keys are among the `modalities` "
        f"{config.modalities}, got {by_modality!r}.",
    )
    for modality, num_experts in by_modality.items():
        check_integer(f"num_experts_per_tok_by_modality[{modality!r}]", num_experts)

    sparse_layers = [i for i in range(config.num_hidden_layers) if config.is_sparse_layer(i)]
    for group in config.expert_groups:
        check(
            group["layers"] is None or not set(sparse_layers).isdisjoint(group["layers"]),
            f"`expert_groups[{group['name']!r}].layers` is {group['layers']}, of which none is sparse: name one of "
            f"the sparse layers {sparse_layers}, or drop the group.",
        )
    num_routed = {0}
    for layer in sparse_layers:
        groups = config.layer_expert_groups(layer, always_on=False)
        check(
            bool(groups),
            f"`expert_groups` leaves sparse layer {layer} without a routed group: add one whose `layers` "
            f"contains {layer}, or list the layer in `mlp_only_layers`.",
        )
        for modality in config.modalities:
            serving = sum(group.num_experts for group in groups if group.serves(modality))
            chosen = config.experts_per_token(modality)
            check(
                chosen <= serving,
                f"`num_experts_per_tok` is {chosen} for modality {modality!r}, but layer {layer} has {serving} "
                "routed experts that serve it: lower it (`num_experts_per_tok` or "
                "`num_experts_per_tok_by_modality`), or let a group serve more.",
            )
            if chosen == 1 < serving and config.norm_topk_prob:
                logger.warning_once(
                    f"`num_experts_per_tok` is 1 for modality {modality!r} and `norm_topk_prob` is True: the only "
                    "weight is always 1, so the router learns nothing from the language loss. Set "
                    "`norm_topk_prob=False`."
                )
        num_routed.add(sum(group.num_experts for group in groups))
    check(
        config.num_experts in (None, max(num_routed)) or not sparse_layers,
        f"`num_experts` is {config.num_experts}, but `expert_groups` have {max(num_routed)} routed experts in a "
        "layer: leave `num_experts` out, or change the groups.",
    )
    config.num_experts = max(num_routed)
    if config.expert_pool is not None:
        _check_pools(config)


def _check_pools(config: PreTrainedConfig) -> None:
    check(
        isinstance(config.expert_pool, list | tuple) and len(config.expert_pool) == config.num_hidden_layers,
        f"`expert_pool` must be a list with a pool or None for each of the {config.num_hidden_layers} layers, got "
        f"{config.expert_pool!r}.",
    )
    config.expert_pool = list(config.expert_pool)
    for layer, pool in enumerate(config.expert_pool):
        if pool is None:
            continue
        check_integer(f"expert_pool[{layer}]", pool, at_least=0)
        check(
            config.is_sparse_layer(layer),
            f"`expert_pool[{layer}]` is {pool}, but layer {layer} is dense: make it None, or the layer sparse.",
        )
    for pool, layers in config.pools.items():
        groups = {config.layer_expert_groups(layer, always_on=False) for layer in layers}
        check(
            len(groups) == 1,
            f"`expert_pool` has layers {layers} share pool {pool}, but `expert_groups` give them different routed "
            "groups: let their groups name all of these layers, or pool others.",
        )


def check_rope(config: PreTrainedConfig) -> None:
    """Raises `ValueError` if the parameters of the rotary embedding, which the library has completed, are wrong."""
    check_choice("rope_parameters['rope_type']", config.rope_parameters["rope_type"], ("default", *ROPE_INIT_FUNCTIONS))
    theta = config.rope_parameters.get("rope_theta")
    if theta is not None:
        check_number("rope_parameters['rope_theta']", theta)
        check(theta > 0, f"`rope_parameters['rope_theta']` must be more than 0, got {theta!r}.")
    try:
        config.validate_rope()
    except KeyError as error:
        raise ValueError(f"`rope_parameters` is incomplete: {error}.") from error


def check_fields(config: PreTrainedConfig) -> None:
    """Raises `ValueError` if the configuration of a whole model is wrong, or its parts do not fit together."""
    text, vision = config.text_config, config.vision_config
    # Not `isinstance`: a checkpoint that brings its code along has classes of its own.
    check(
        text.model_type == TEXT_MODEL_TYPE and "image" in text.modalities,
        f"`text_config` must be of type {TEXT_MODEL_TYPE!r} with `modalities` that include "
        f"'image', got {text.model_type!r} with {getattr(text, 'modalities', None)}.",
    )
    for field in ("tie_word_embeddings", "use_cache", "multimodal_projector_bias"):
        check_boolean(field, getattr(config, field))
    check_choice("projector_hidden_act", config.projector_hidden_act, ACT2FN)
    check_integer("image_token_id", config.image_token_id, at_least=0, below=text.vocab_size)
    check_integer("pixel_shuffle_factor", config.pixel_shuffle_factor)
    check(
        config.image_token_id != text.pad_token_id,
        f"`image_token_id` ({config.image_token_id}) is also `text_config.pad_token_id`: pictures need a token of "
        "their own.",
    )
    check_vision_config(vision)
    side = patches_per_side(vision)
    check(
        side % config.pixel_shuffle_factor == 0,
        f"`pixel_shuffle_factor` ({config.pixel_shuffle_factor}) must divide the {side} patches per side that "
        f"`vision_config` makes of an image ({vision.image_size} / {vision.patch_size}).",
    )
    _check_modality_encoders(config)


def _check_modality_encoders(config: PreTrainedConfig) -> None:
    encoders = config.modality_encoders
    if encoders is None:
        return
    further = [name for name in config.text_config.modalities if name not in ("text", "image")]
    check(
        isinstance(encoders, dict) and set(encoders) <= set(further),
        "`modality_encoders` must be a dict whose keys are further modalities of `text_config.modalities`, "
        f"{further}, got {encoders!r}.",
    )
    for name, encoder in encoders.items():
        check(
            isinstance(encoder, dict) and isinstance(encoder.get("model_type"), str) and "token_id" in encoder,
            f"`modality_encoders[{name!r}]` must be a dict with `model_type`, the encoder's fields and `token_id`, got "
            f"{encoder!r}.",
        )
        check_integer(
            f"modality_encoders[{name!r}]['token_id']",
            encoder["token_id"],
            at_least=0,
            below=config.text_config.vocab_size,
        )
    check_distinct("placeholder tokens (`image_token_id`, `token_id`s)", list(config.placeholder_ids.values()))
