"""The text decoder of a model, and the way in which images enter it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import UpcyclingError

# Names of placeholder token ids in configurations of Transformers, by modality.
PLACEHOLDERS = {
    "image": ("image_token_id", "image_token_index", "image_patch_id"),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
}
CROSS_ATTENTION = ("crossattn", "crossattention")


@dataclass(frozen=True)
class DecoderLayers:
    """
    The list of layers of a text decoder.

    Attributes:
        decoder (`str`): Name in the model of the module that owns the list; `""` for the model itself.
        name (`str`): Name of the list in its owner.
        layers (`torch.nn.ModuleList`): The layers.
        config (`PreTrainedConfig`): The decoder's configuration.
    """

    decoder: str
    name: str
    layers: nn.ModuleList
    config: PreTrainedConfig

    @property
    def path(self) -> str:
        """Name of the list in the model."""
        return f"{self.decoder}.{self.name}" if self.decoder else self.name


def decoder_layers(model: PreTrainedModel) -> DecoderLayers:
    """
    Finds the layers of a model's text decoder, by structure: towers of other modalities are left out.

    Args:
        model (`PreTrainedModel`): Any language model or vision-language model, with or without a language head.

    Raises:
        UpcyclingError: If it has none, or several that take turns.
    """
    config = text_config_of(model)
    root = _decoder_root(model)
    owners = {id(module): name for name, module in model.named_modules()}
    num_layers = getattr(config, "num_hidden_layers", None)
    found: list[tuple[tuple[bool, bool, int], DecoderLayers]] = []
    for owner in root.modules():
        for name, layers in owner.named_children():
            if isinstance(layers, nn.ModuleList) and len(layers) and _belongs_to(root, owner, config):
                is_beside = all(_is_cross_attention(name, layer) for layer in layers)  # Idefics' layers for images
                is_encoder = _in_encoder(owners[id(owner)], name)
                size = sum(parameter.numel() for parameter in layers.parameters())
                rank = (len(layers) == num_layers, not is_encoder and not is_beside, size)
                found.append((rank, DecoderLayers(owners[id(owner)], name, layers, config)))
    if not found:
        raise UpcyclingError(f"{type(model).__name__} has no text decoder with a list of layers.")
    best = max(rank for rank, _ in found)
    first, *others = (entry for rank, entry in found if rank == best)
    if others:
        raise UpcyclingError(
            f"The decoder of {type(model).__name__} has several lists of layers ({first.path}, {others[0].path})."
        )
    return first


def text_config_of(model: PreTrainedModel) -> PreTrainedConfig:
    """Returns the configuration of a model's text decoder."""
    try:
        return model.config.get_text_config(decoder=True)
    except ValueError as error:
        raise UpcyclingError(f"{type(model).__name__} has several text decoders: {error}") from error


def takes_images_by_cross_attention(model: PreTrainedModel) -> bool:
    """
    Returns whether images or other inputs enter a model's decoder by cross-attention or from an encoder. All tokens of
    the decoder are text then, and experts for images would get no tokens.

    Args:
        model (`PreTrainedModel`): Any model.
    """
    if model.config.is_encoder_decoder:
        return True
    decoder = model.get_submodule(decoder_layers(model).decoder)
    return any(_is_cross_attention(name, module) for name, module in decoder.named_modules())


def placeholder_ids(config: PreTrainedConfig) -> dict[str, list[int]]:
    """
    Returns the ids of a model's placeholder tokens for images, videos and audio.

    Args:
        config (`PreTrainedConfig`): Configuration of any model of Transformers.

    Returns:
        `dict[str, list[int]]`: Ids by modality ("image", "video", "audio"), in this order, without modalities that have
        no such token. An id of several modalities (Molmo2 has one for images and videos) belongs to the first one.
    """
    found: dict[str, list[int]] = {}
    taken: set[int] = set()
    for modality, names in PLACEHOLDERS.items():
        values = dict.fromkeys(getattr(config, name, None) for name in names)
        if ids := [value for value in values if isinstance(value, int) and value not in taken]:
            found[modality] = ids
            taken.update(ids)
    return found


def _decoder_root(model: PreTrainedModel) -> nn.Module:
    """Returns the decoder, or the whole model if the library returns a language head, as for ModernBERT."""
    decoder = model.get_decoder()
    return decoder if any(isinstance(module, nn.ModuleList) for module in decoder.modules()) else model


def _belongs_to(root: nn.Module, owner: nn.Module, config: PreTrainedConfig) -> bool:
    """Returns whether the innermost model around `owner` is part of the text decoder, and not a tower."""
    innermost = root
    for module in root.modules():
        if isinstance(module, PreTrainedModel) and any(inner is owner for inner in module.modules()):
            innermost = module
    own = getattr(innermost, "config", config)
    return own is config or innermost is root or type(own) is type(config)


def _in_encoder(owner: str, name: str) -> bool:
    return any("encoder" in part for part in (*owner.split("."), name))


def _is_cross_attention(name: str, module: nn.Module) -> bool:
    names = (name.rsplit(".", 1)[-1], type(module).__name__)
    return any(part in own.replace("_", "").lower() for own in names for part in CROSS_ATTENTION)
