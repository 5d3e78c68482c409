"""Vision towers that take images of any size, and their inputs, read from the signatures of their classes."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, initialization
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from .checks import OBSCURE_ERRORS, check, check_integer

# Inputs of vision towers, by a parameter that only towers with these inputs have.
_INPUTS = {
    "spatial_shapes": ("pixel_values", "pixel_attention_mask", "spatial_shapes"),  # NaFlex (SigLIP 2)
    "grid_thw": ("hidden_states", "grid_thw"),  # Qwen2-VL and later
    "image_sizes": ("pixel_values", "image_sizes"),  # Pixtral
}
# Grids of patches for which a tower must return one feature per patch.
_TRIED_GRIDS = ((2, 3), (5, 4))
# Patches along the side of a square, for towers whose configuration names neither a size nor a number of positions.
_DEFAULT_SIDE = 32


@dataclass(frozen=True)
class TowerInputs:
    """
    How a vision tower takes images. It is read once from the signature of the tower's class.

    Args:
        kind (`str`):
            Inputs for images of different sizes: `"spatial_shapes"` for padded lists of patches, `"grid_thw"` for a
            single list of patches that the tower merges, `"image_sizes"` for padded images whose sizes are given, and
            `"pixel_values"` for batches of images of one size.
        takes_interpolation (`bool`):
            Whether the tower has to be asked to interpolate its position embeddings.
    """

    kind: str
    takes_interpolation: bool

    @classmethod
    def of(cls, tower_class: Any) -> TowerInputs:
        """
        Reads the inputs of a vision tower.

        Args:
            tower_class (`type`):
                Class of the vision tower.

        Returns:
            `TowerInputs`: The inputs.
        """
        parameters = inspect.signature(tower_class.forward).parameters
        kind = next((kind for kind in _INPUTS if kind in parameters), "pixel_values")
        return cls(kind, "interpolate_pos_encoding" in parameters)


def native_inputs(config: PreTrainedConfig) -> str:
    """
    Returns how a vision tower takes images of different sizes.

    Args:
        config (`PreTrainedConfig`):
            Configuration of the vision tower.

    Returns:
        `str`: The `kind` of its [`TowerInputs`].

    Raises:
        ValueError: If there is no such tower, or if it needs other inputs.
    """
    name = f"`vision_config` ({config.model_type})"
    tower_class = _tower_class(config)
    kind = TowerInputs.of(tower_class).kind
    parameters = inspect.signature(tower_class.forward).parameters
    known = {"self", *_INPUTS.get(kind, ("pixel_values",))}
    needed = {
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    taken = [parameter for parameter in parameters if parameter not in ("self", "kwargs")]
    check(
        needed <= known <= parameters.keys(),
        f"{name} takes the inputs {taken}, but for images of any size the model passes {sorted(known - {'self'})}: "
        'leave out `image_sizing`, or choose another tower for `image_sizing="native"`.',
    )
    return kind


def check_native_tower(config: PreTrainedConfig) -> None:
    """Raises `ValueError` unless a vision tower with this configuration takes images of any size."""
    name = f"`vision_config` ({config.model_type})"
    kind = native_inputs(config)
    for field in ("hidden_size", "patch_size"):
        check_integer(f"vision_config.{field}", getattr(config, field, None))
    for field in ("image_size", "num_patches", "num_position_embeddings"):
        if getattr(config, field, None) is not None:
            check_integer(f"vision_config.{field}", getattr(config, field))
    if kind == "grid_thw":
        check_integer("vision_config.spatial_merge_size", getattr(config, "spatial_merge_size", None))
        check_integer("vision_config.temporal_patch_size", getattr(config, "temporal_patch_size", 1))
        _check_heads(config)
    if kind == "image_sizes":
        _check_head_width(config)
    if kind in ("pixel_values", "image_sizes"):
        config_class: Any = type(config)
        fault = _fault_of_tower(config_class, config.to_json_string(use_diff=False))
        check(
            fault is None,
            f'{name} does not take images of any size, as `image_sizing="native"` needs: {fault} Leave out '
            "`image_sizing`, or choose a tower with `interpolate_pos_encoding` or rotary positions (SigLIP, CLIP, ViT, "
            "DINOv2, DINOv3, …).",
        )


def _check_head_width(config: PreTrainedConfig) -> None:
    """Raises `ValueError` unless the attention heads of a tower can have positions with two coordinates."""
    field = "embed_dim" if hasattr(config, "embed_dim") else "hidden_size"
    width, heads = getattr(config, field), getattr(config, "num_attention_heads", 1)
    check_integer("vision_config.num_heads", heads)
    check(
        width % (4 * heads) == 0,
        f"`vision_config.{field}` ({width}) must be a multiple of 4 · `num_heads` ({heads}).",
    )


def _check_heads(config: PreTrainedConfig) -> None:
    """Raises `ValueError` unless the sizes of a tower that merges patches fit its attention, whose positions are 2D."""
    heads = getattr(config, "num_attention_heads", 1)
    check_integer("vision_config.num_heads", heads)
    if getattr(config, "head_dim", None) is None:
        _check_head_width(config)
    key_value_heads = getattr(config, "num_key_value_heads", heads)
    check_integer("vision_config.num_key_value_heads", key_value_heads)
    check(
        heads % key_value_heads == 0,
        f"`vision_config.num_key_value_heads` ({key_value_heads}) must divide `num_heads` ({heads}).",
    )
    side = merge_size_of(config) * config.patch_size
    if getattr(config, "window_size", None) is not None:
        check_integer("vision_config.window_size", config.window_size, at_least=side)
    if getattr(config, "out_hidden_size", None) is not None:
        check_integer("vision_config.out_hidden_size", config.out_hidden_size)


def merge_size_of(config: PreTrainedConfig) -> int:
    """Returns the number of patches along the side of the squares that a vision tower merges."""
    return getattr(config, "spatial_merge_size", None) or 1


def has_merger(config: PreTrainedConfig) -> bool:
    """Returns whether a vision tower has a merger, even if it merges squares of one patch."""
    return getattr(config, "spatial_merge_size", None) is not None


def feature_size_of(config: PreTrainedConfig) -> int:
    """Returns the width of the features that a vision tower returns."""
    merged = getattr(config, "out_hidden_size", None) if has_merger(config) else None
    return merged or config.hidden_size


def num_deepstack_levels_of(config: PreTrainedConfig) -> int:
    """Returns the number of DeepStack features of a vision tower: merged features of layers before the last one."""
    return len(getattr(config, "deepstack_visual_indexes", None) or ()) if has_merger(config) else 0


def num_channels_of(config: PreTrainedConfig) -> int:
    """Returns the number of channels of the images that a vision tower takes."""
    return getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3


def patches_per_side(config: PreTrainedConfig) -> int:
    """
    Returns the number of patches along one side of a square image: of the size for which the vision tower was trained,
    if its configuration says so.
    """
    if getattr(config, "image_size", None) is not None:
        return config.image_size // config.patch_size
    positions = getattr(config, "num_patches", None) or getattr(config, "num_position_embeddings", None)
    return int(positions**0.5) if positions else _DEFAULT_SIDE


def make_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Creates a vision tower. `AutoModel` creates most of them."""
    if type(config) in MODEL_MAPPING:
        return AutoModel.from_config(config)
    return _tower_class(config)._from_config(config)


def _tower_class(config: PreTrainedConfig) -> Any:
    """Returns the class of a vision tower. `AutoModel` lacks some towers of whole models, such as that of Qwen2-VL."""
    if type(config) in MODEL_MAPPING:
        found = MODEL_MAPPING[type(config)]
        return found[0] if isinstance(found, tuple) else found
    whole = config.model_type.removesuffix("_vision")
    of_whole = MODEL_MAPPING.get(CONFIG_MAPPING[whole], None) if whole in CONFIG_MAPPING else None
    # The tower is defined in the same file as the whole model.
    in_file = vars(sys.modules[of_whole.__module__]).values() if of_whole is not None else ()
    towers = [each for each in in_file if getattr(each, "config_class", None) is type(config)]
    check(
        len(towers) == 1,
        f"`vision_config` ({config.model_type}) has no model that `AutoModel` creates: choose another vision tower.",
    )
    return towers[0]


@lru_cache(maxsize=64)
def _fault_of_tower(config_class: Any, fields: str) -> str | None:
    """Returns why a vision tower does not take images of any size: tries it with one layer, without weights."""
    config = config_class.from_dict(json.loads(fields))
    config.num_hidden_layers = 1  # other fields can name layers that are then missing, such as `out_features`
    try:
        try:
            numbers = _numbers_of_other_features(config, "meta")
        except RuntimeError as error:
            if "meta" not in str(error):
                raise
            numbers = _numbers_of_other_features(config, "cpu")  # some towers read the values of masks
    except (*OBSCURE_ERRORS, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}."
    if len(numbers) > 1 or min(numbers) < 0:
        return "it does not return one feature per patch."
    return None


def _numbers_of_other_features(config: PreTrainedConfig, device: str) -> set[int]:
    """
    Returns how many features a vision tower returns besides those of the patches, for images of different sizes. The
    number is negative if there are too few features, or if they are not those of a batch.
    """
    patch_size = config.patch_size
    inputs = TowerInputs.of(_tower_class(config))
    options: dict[str, Any] = {"interpolate_pos_encoding": True} if inputs.takes_interpolation else {}
    numbers = set()
    with torch.no_grad(), torch.device(device), initialization.no_init_weights():
        tower = AutoModel.from_config(config, attn_implementation="eager").train(False)
        for rows, columns in _TRIED_GRIDS:
            images = torch.zeros(2, num_channels_of(config), rows * patch_size, columns * patch_size)
            if inputs.kind == "image_sizes":
                options["image_sizes"] = [(rows * patch_size, columns * patch_size)] * 2
            shape = tower(images, return_dict=True, **options).last_hidden_state.shape
            if inputs.kind == "image_sizes" and shape[:2] == (1, 2 * rows * columns):
                shape = (2, rows * columns, shape[-1])  # the images of the batch one after another
            is_batch = len(shape) == 3 and shape[0] == 2
            numbers.add(shape[1] - rows * columns if is_batch else -1)
    return numbers
