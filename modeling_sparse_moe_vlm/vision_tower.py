"""Checks of vision towers and access to their patch features: the model needs one feature per square patch."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from .checks import check, check_integer, check_library_fields
from .native_towers import check_native_tower

# What vision towers without one feature per square patch do, by a field that only their configurations have.
_OF_OTHER_TOWERS = {
    "depths": "merges patches from stage to stage",
    "insert_layer_id": "merges patches in one of its layers",
    "num_frames": "reads videos",
    "tubelet_size": "reads videos",
}
# What vision towers do that only take images of native sizes.
_PACKS = "packs images of any size"
_PACKS_AND_MERGES = "packs images of any size and merges their patches"
_TAKES_LISTS = "takes images as lists of patches"
_OF_NATIVE_TOWERS = (_PACKS, _PACKS_AND_MERGES, _TAKES_LISTS)


def check_vision_config(config: PreTrainedConfig, image_sizing: str = "fixed") -> None:
    """
    Raises `ValueError` unless a vision tower with this configuration returns one feature per square patch. With
    `image_sizing="native"`, it must do so for images of any size, or return one feature per square of patches.
    """
    name = f"`vision_config` ({config.model_type})"
    advice = "choose a tower with one feature per square patch: SigLIP, CLIP, ViT, DINOv2, DINOv3, …"
    reason = _reason_against(config)
    check_library_fields("vision_config", config.to_dict())
    is_native_tower = reason in _OF_NATIVE_TOWERS
    if is_native_tower and image_sizing != "native":
        raise ValueError(f'{name} {reason}: set `image_sizing="native"`, or {advice}.')
    check(
        reason is None or is_native_tower,
        f"{name} {reason}, which the connector does not support: {advice}.",
    )
    if image_sizing == "native":
        check_native_tower(config)
        return
    for field in ("image_size", "patch_size"):
        value = getattr(config, field, None)
        check(isinstance(value, int), f"{name} must give `{field}` as one integer, got {value!r}: {advice}.")
    for field in ("hidden_size", "image_size", "patch_size"):
        check_integer(f"vision_config.{field}", getattr(config, field, None))
    heads = getattr(config, "num_attention_heads", None)
    check(
        heads is None or getattr(config, "head_dim", None) is not None or config.hidden_size % heads == 0,
        f"`vision_config.hidden_size` ({config.hidden_size}) must be a multiple of `num_attention_heads` ({heads}).",
    )
    check(
        config.image_size >= config.patch_size,
        f"`vision_config.image_size` ({config.image_size}) must be at least `patch_size` ({config.patch_size}).",
    )


def _reason_against(config: PreTrainedConfig) -> str | None:
    """Returns what a vision tower does instead of returning one feature per square patch of images of one size."""
    if config.model_type == "pixtral":
        return _PACKS
    if config.model_type == "siglip2_vision_model":
        return _TAKES_LISTS
    reasons = _OF_OTHER_TOWERS | {"spatial_merge_size": _PACKS_AND_MERGES}
    return next((reason for field, reason in reasons.items() if getattr(config, field, None) is not None), None)


def patch_features(features: torch.Tensor, config: PreTrainedConfig, num_patches: int) -> torch.Tensor:
    """
    Returns the features of the patches without those of class and register tokens, which come first.

    Args:
        features (`torch.Tensor` of shape `(num_images, num_prefix_tokens + num_patches, hidden_size)`):
            Last hidden state of the vision tower.
        config (`PreTrainedConfig`):
            Configuration of the vision tower.
        num_patches (`int`):
            Number of patches of each image.

    Returns:
        `torch.Tensor` of shape `(num_images, num_patches, hidden_size)`: The features.

    Raises:
        ValueError: If the features have another shape.
    """
    if features.dim() != 3 or features.shape[1] < num_patches or features.shape[2] != config.hidden_size:
        raise ValueError(
            f"the vision tower ({config.model_type}) returns features of shape {tuple(features.shape)}, but the model "
            f"needs the shape (images, at least {num_patches} patches, {config.hidden_size})."
        )
    return features[:, features.shape[1] - num_patches :]
