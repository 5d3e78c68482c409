"""Outputs of the models: the library's for mixtures of experts, and what this model adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from transformers import modeling_outputs
from transformers.modeling_outputs import BaseModelOutputWithPooling, MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import ModelOutput, logging
from transformers.utils.import_utils import is_tracing

from .versions import TRANSFORMERS_VERSION

logger = logging.get_logger(__name__)

# The library's models return `image_outputs` since 5.24 and have deprecated `image_hidden_states`, which is to mean the
# hidden states of the vision tower's layers from 5.30 on. Until 5.23 it is a field.
_HAS_IMAGE_OUTPUTS = hasattr(modeling_outputs, "MultimodalModelOutput")
_MEANS_ALL_LAYERS = TRANSFORMERS_VERSION >= (5, 30)


def join_image_tokens(pooler_output: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor:
    """The image tokens of a batch `(num_image_tokens, hidden_size)`, from those of each image or one tensor of all."""
    return pooler_output.flatten(0, 1) if torch.is_tensor(pooler_output) else torch.cat(list(pooler_output))


class _ImageOutput(ModelOutput):
    """What outputs with a field `image_outputs` share."""

    image_outputs: BaseModelOutputWithPooling | None

    def __post_init__(self):
        super().__post_init__()
        if "image_hidden_states" in {field.name for field in fields(self)}:
            self["image_hidden_states"] = self._image_tokens()

    @property
    def image_hidden_states(self) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
        """The image tokens of the batch `(num_image_tokens, hidden_size)`; deprecated, as in the library's models."""
        if _MEANS_ALL_LAYERS:
            return None if self.image_outputs is None else self.image_outputs.hidden_states
        if not is_tracing():
            logger.warning_once(
                "`image_hidden_states` is deprecated and will return a list of all hidden states per layer from "
                "v5.30; Use `out.image_outputs.pooler_output` to obtain pooled features."
            )
        return self._image_tokens()

    def _image_tokens(self) -> torch.Tensor | None:
        return None if self.image_outputs is None else join_image_tokens(self.image_outputs.pooler_output)

    def to_tuple(self) -> tuple:
        """As the library's outputs with a field `image_outputs`: that becomes a tuple as well."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in super().to_tuple())


@dataclass
class SparseMoeVlmTextModelOutputWithPast(MoeModelOutputWithPast):
    """
    Output of [`SparseMoeVlmTextModel`].

    Args:
        router_indices (`tuple[torch.Tensor]`, *optional*, returned with `output_router_logits=True`):
            One tensor `(B * T, k)` per sparse layer, of type int64: the experts that were chosen for every token, best
            first; the number of experts for an unused slot.
        router_dropped (`tuple[torch.Tensor]`, *optional*, returned likewise where experts have a capacity):
            One tensor `(B * T, k)` per sparse layer, of type bool: which of them had no capacity for the token.
        modality_weights (`tuple[torch.Tensor]`, *optional*, returned with `output_modality_weights=True`):
            One tensor `(B, heads, T, num_modalities)` per layer: the weight of every attention part, in the order of
            `config.modalities` (β, α, …). The weights sum to 1.
        count_free_modality_weights (`tuple[torch.Tensor]`, *optional*, returned with `output_modality_weights=True`):
            The same without the effect of how many keys a part has.
    """

    router_indices: tuple[torch.Tensor, ...] | None = None
    router_dropped: tuple[torch.Tensor, ...] | None = None
    modality_weights: tuple[torch.Tensor, ...] | None = None
    count_free_modality_weights: tuple[torch.Tensor, ...] | None = None


@dataclass
class SparseMoeVlmModelOutputWithPast(SparseMoeVlmTextModelOutputWithPast, _ImageOutput):
    """
    Output of [`SparseMoeVlmModel`].

    Args:
        image_outputs (`BaseModelOutputWithPooling`, *optional*):
            Output of the vision tower, whose `pooler_output` holds the image tokens that the connector makes, as in
            [`SparseMoeVlmModel.get_image_features`]; `None` if no images were processed.
    """

    image_outputs: BaseModelOutputWithPooling | None = None
    if not _HAS_IMAGE_OUTPUTS:
        image_hidden_states: torch.Tensor | None = None


@dataclass
class SparseMoeVlmCausalLMOutputWithPast(MoeCausalLMOutputWithPast, _ImageOutput):
    """
    Output of the models with a language head.

    Args:
        z_loss (`torch.Tensor`, *optional*, returned with the router logits):
            Router z-loss, a scalar, next to the load-balancing `aux_loss`.
        aux_loss_by_modality (`torch.Tensor` of shape `(num_modalities,)`, *optional*, returned with the router logits):
            Load-balancing loss of each modality, detached; NaN where the batch has no token of the modality.
        router_loss (`torch.Tensor`, *optional*, returned with the router logits):
            All router losses with their coefficients, a scalar: what the model adds to its language loss, and what a
            training loop with a loss of its own is to add.
        image_outputs (`BaseModelOutputWithPooling`, *optional*):
            See [`SparseMoeVlmModelOutputWithPast`].
        router_indices, router_dropped (`tuple[torch.Tensor]`, *optional*, returned with the router logits):
            See [`SparseMoeVlmTextModelOutputWithPast`].
        modality_weights, count_free_modality_weights (`tuple[torch.Tensor]`, *optional*):
            See [`SparseMoeVlmTextModelOutputWithPast`].
    """

    z_loss: torch.Tensor | None = None
    aux_loss_by_modality: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    if not _HAS_IMAGE_OUTPUTS:
        image_hidden_states: torch.Tensor | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None
    router_dropped: tuple[torch.Tensor, ...] | None = None
    modality_weights: tuple[torch.Tensor, ...] | None = None
    count_free_modality_weights: tuple[torch.Tensor, ...] | None = None
    router_loss: torch.Tensor | None = None
