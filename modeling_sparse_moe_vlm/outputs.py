"""Outputs of the models: the Transformers outputs of mixture-of-experts models with additional fields."""

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

# Transformers models return `image_outputs` since 5.24 and have deprecated `image_hidden_states`. Up to 5.23, it is a
# field; from 5.30 on, it will be the hidden states of all layers of the vision tower.
_HAS_IMAGE_OUTPUTS = hasattr(modeling_outputs, "MultimodalModelOutput")
_MEANS_ALL_LAYERS = TRANSFORMERS_VERSION >= (5, 30)


def join_image_tokens(pooler_output: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor:
    """
    Returns the image tokens of a batch.

    Args:
        pooler_output (`Sequence[torch.Tensor]` or `torch.Tensor`):
            One tensor `(image_seq_length, hidden_size)` per image, or one tensor with an additional first dimension.

    Returns:
        `torch.Tensor` of shape `(num_image_tokens, hidden_size)`: The tokens of all images.
    """
    return pooler_output.flatten(0, 1) if torch.is_tensor(pooler_output) else torch.cat(list(pooler_output))


class _ImageOutput(ModelOutput):
    """Base class of the outputs with a field `image_outputs`."""

    image_outputs: BaseModelOutputWithPooling | None

    def __post_init__(self):
        super().__post_init__()
        if "image_hidden_states" in {field.name for field in fields(self)}:
            self["image_hidden_states"] = self._image_tokens()

    @property
    def image_hidden_states(self) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
        """The image tokens of the batch `(num_image_tokens, hidden_size)`. Deprecated, as in Transformers."""
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
        """Converts the output to a tuple, including the nested `image_outputs`, as in Transformers."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in super().to_tuple())


@dataclass
class SparseMoeVlmVisualOutput(BaseModelOutputWithPooling):
    """
    Output of [`SparseMoeVlmModel.get_image_features`] and [`SparseMoeVlmModel.get_video_features`] with native sizes.

    Args:
        deepstack_features (`list[list[torch.Tensor]]`, *optional*, returned with `config.use_deepstack`):
            For each level of DeepStack features, one tensor of the same shape as in `pooler_output` per image.

    The other fields are those of [`~transformers.modeling_outputs.BaseModelOutputWithPooling`].
    """

    deepstack_features: list[list[torch.Tensor]] | None = None


@dataclass
class SparseMoeVlmTextModelOutputWithPast(MoeModelOutputWithPast):
    """
    Output of [`SparseMoeVlmTextModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, T, D)`):
            Hidden states after the final norm.
        past_key_values (`Cache`, *optional*, returned with `use_cache=True`):
            Key/value cache.
        hidden_states (`tuple[torch.Tensor]`, *optional*, returned with `output_hidden_states=True`):
            Hidden states `(B, T, D)` of the embedding and of every layer.
        attentions (`tuple[torch.Tensor]`, *optional*, returned with `output_attentions=True`):
            Attention weights `(B, heads, T, number of keys)` of every layer.
        router_logits (`tuple[torch.Tensor]`, *optional*, returned with `output_router_logits=True`):
            One tensor `(B * T, num_experts)` per sparse layer: router logits, minus infinity for experts that do not
            serve the token.
        router_indices (`tuple[torch.Tensor]`, *optional*, returned with `output_router_logits=True`):
            One tensor `(B * T, k)` of type int64 per sparse layer: ids of the experts chosen for every token, best
            first. The id of an unused slot is the number of experts.
        router_dropped (`tuple[torch.Tensor]`, *optional*, returned with `output_router_logits=True`):
            One tensor `(B * T, k)` of type bool per sparse layer: which of the chosen experts dropped the token because
            they had no capacity left. Only returned if `config.expert_capacity_factor` is set.
        modality_weights (`tuple[torch.Tensor]`, *optional*, returned with `output_modality_weights=True`):
            One tensor `(B, heads, T, num_modalities)` per layer: the weight of every attention part, in the order of
            `config.modalities` (β, α, …). The weights sum to 1.
        count_free_modality_weights (`tuple[torch.Tensor]`, *optional*, returned with `output_modality_weights=True`):
            The same weights without the effect of the number of keys of each part.
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
            Output of the vision tower, with the image tokens from the connector as `pooler_output` (see
            [`SparseMoeVlmModel.get_image_features`]). `None` if no images were processed.

    The other fields are those of [`SparseMoeVlmTextModelOutputWithPast`].
    """

    image_outputs: BaseModelOutputWithPooling | None = None
    if not _HAS_IMAGE_OUTPUTS:
        image_hidden_states: torch.Tensor | None = None


@dataclass
class SparseMoeVlmCausalLMOutputWithPast(MoeCausalLMOutputWithPast, _ImageOutput):
    """
    Output of the models with a language head.

    Args:
        loss (`torch.Tensor`, *optional*, returned with `labels`):
            Language loss, with the router losses added if they are computed. A scalar.
        logits (`torch.Tensor` of shape `(B, T, vocab_size)`):
            Logits of the language head.
        aux_loss (`torch.Tensor`, *optional*, returned with the router losses):
            Load balancing loss, a scalar.
        z_loss (`torch.Tensor`, *optional*, returned with the router losses):
            Router z-loss, a scalar.
        aux_loss_by_modality (`torch.Tensor` of shape `(num_modalities,)`, *optional*, returned with the router losses):
            Load balancing loss of each modality, detached. NaN for modalities without tokens in the batch.
        router_loss (`torch.Tensor`, *optional*, returned with the router losses):
            Sum of all router losses, multiplied by their coefficients. A scalar. The model adds it to the language
            loss; a training loop that computes the loss itself must add it as well.
        image_outputs (`BaseModelOutputWithPooling`, *optional*):
            See [`SparseMoeVlmModelOutputWithPast`].

    The other fields are those of [`SparseMoeVlmTextModelOutputWithPast`].
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


@dataclass
class SparseMoeVlmRetrievalOutput(ModelOutput):
    """
    Output of [`SparseMoeVlmForImageTextRetrieval`].

    Args:
        loss (`torch.Tensor`, *optional*, returned with `labels`):
            Contrastive loss, with the router losses added if they are computed. A scalar.
        logits_per_image (`torch.FloatTensor` of shape `(num_documents, num_queries)`, *optional*):
            Scores of the documents (images) for the queries (texts) of this process: cosine similarities, multiplied by
            the learned scale, plus the learned bias of the sigmoid loss. Returned if the batch has both.
        logits_per_text (`torch.FloatTensor` of shape `(num_queries, num_documents)`, *optional*):
            The same scores, transposed.
        text_embeds (`torch.FloatTensor` of shape `(num_queries, embedding_size)`, *optional*):
            Embeddings of the queries.
        image_embeds (`torch.FloatTensor` of shape `(num_documents, embedding_size)`, *optional*):
            Embeddings of the documents.
        embeddings (`torch.FloatTensor` of shape `(B, embedding_size)`):
            Embeddings of all rows, in float32, with the length 1.
        last_hidden_state (`torch.FloatTensor` of shape `(B, T, D)`):
            Hidden states of the tokens.
        hidden_states (`tuple[torch.Tensor]`, *optional*, returned with `output_hidden_states=True`):
            Hidden states `(B, T, D)` of the embedding and of every layer.
        attentions (`tuple[torch.Tensor]`, *optional*, returned with `output_attentions=True`):
            Attention weights `(B, heads, T, T)` of every layer.
        aux_loss (`torch.Tensor`, *optional*, returned with the router losses):
            Load balancing loss, a scalar.
        z_loss (`torch.Tensor`, *optional*, returned with the router losses):
            Router z-loss, a scalar.
        aux_loss_by_modality (`torch.Tensor` of shape `(num_modalities,)`, *optional*, returned with the router losses):
            Load balancing loss of each modality, detached. NaN for modalities without tokens in the batch.
        router_loss (`torch.Tensor`, *optional*, returned with the router losses):
            Sum of all router losses, multiplied by their coefficients, which is added to the loss. A scalar.
        router_logits (`tuple[torch.Tensor]`, *optional*, returned with `output_router_logits=True`):
            See [`SparseMoeVlmTextModelOutputWithPast`].
        router_indices (`tuple[torch.Tensor]`, *optional*, returned with `output_router_logits=True`):
            See [`SparseMoeVlmTextModelOutputWithPast`].
        router_dropped (`tuple[torch.Tensor]`, *optional*, returned with `output_router_logits=True`):
            See [`SparseMoeVlmTextModelOutputWithPast`].
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    aux_loss_by_modality: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None
    router_dropped: tuple[torch.Tensor, ...] | None = None
