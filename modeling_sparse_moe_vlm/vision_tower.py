"""Checks of vision towers and access to their patch features: the model needs one feature per square patch."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from .checks import check, check_integer, check_library_fields

# Vision towers without one feature per square patch: a field that only their configurations have, and what they do.
_OTHER_FIELDS = {
    "depths": "merges patches from stage to stage",
    "num_frames": "reads videos",
    "tubelet_size": "reads videos",
    "spatial_merge_size": "packs images of any size",
}
_OTHER_TYPES = {
    "pixtral": "packs images of any size",
    "siglip2_vision_model": "takes images as lists of patches",
}


def check_vision_config(config: PreTrainedConfig) -> None:
    """Raises `ValueError` unless a vision tower with this configuration returns one feature per square patch."""
    name = f"`vision_config` ({config.model_type})"
    advice = "choose a tower with one feature per square patch: SigLIP, CLIP, ViT, DINOv2, DINOv3, …"
    reason = _OTHER_TYPES.get(config.model_type) or next(
        (reason for field, reason in _OTHER_FIELDS.items() if getattr(config, field, None) is not None), None
    )
    check_library_fields("vision_config", config.to_dict())
    check(reason is None, f"{name} {reason}, which the connector does not support: {advice}.")
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


def patches_per_side(config: PreTrainedConfig) -> int:
    """Returns the number of patches along one side of an image."""
    return config.image_size // config.patch_size


def patch_features(features: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """
    Returns the features of the patches without those of class and register tokens, which come first.

    Args:
        features (`torch.Tensor` of shape `(num_images, num_prefix_tokens + num_patches, hidden_size)`):
            Last hidden state of the vision tower.
        config (`PreTrainedConfig`):
            Configuration of the vision tower.

    Returns:
        `torch.Tensor` of shape `(num_images, num_patches, hidden_size)`: The features.

    Raises:
        ValueError: If the features have another shape.
    """
    num_patches = patches_per_side(config) ** 2
    if features.dim() != 3 or features.shape[1] < num_patches or features.shape[2] != config.hidden_size:
        raise ValueError(
            f"the vision tower ({config.model_type}) returns features of shape {tuple(features.shape)}, but the model "
            f"needs the shape (images, at least {num_patches} patches, {config.hidden_size})."
        )
    return features[:, features.shape[1] - num_patches :]
