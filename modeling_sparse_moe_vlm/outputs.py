"""Outputs of the models: the library's for mixtures of experts, with what this model adds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast


@dataclass
class SparseMoeVlmTextModelOutputWithPast(MoeModelOutputWithPast):
    """
    Output of [`SparseMoeVlmTextModel`].

    Args:
        modality_weights (`tuple[torch.Tensor]`, *optional*, returned with `output_modality_weights=True`):
            One tensor `(B, heads, T, num_modalities)` per layer: the weight of every attention part, in the order of
            `config.modalities` (β, α, …), which sum to 1.
        count_free_modality_weights (`tuple[torch.Tensor]`, *optional*, returned with `output_modality_weights=True`):
            The same without the effect of how many keys a part has.
    """

    modality_weights: tuple[torch.Tensor, ...] | None = None
    count_free_modality_weights: tuple[torch.Tensor, ...] | None = None


@dataclass
class SparseMoeVlmModelOutputWithPast(SparseMoeVlmTextModelOutputWithPast):
    """
    Output of [`SparseMoeVlmModel`].

    Args:
        image_hidden_states (`torch.Tensor` of shape `(num_image_tokens, hidden_size)`, *optional*):
            Image tokens of the batch, as the connector makes them.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class SparseMoeVlmCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """
    Output of the models with a language head.

    Args:
        z_loss (`torch.Tensor`, *optional*, returned with the router logits):
            Router z-loss, scalar, beside the load-balancing `aux_loss`.
        aux_loss_by_modality (`torch.Tensor` of shape `(num_modalities,)`, *optional*, returned with the router logits):
            Load-balancing loss of each modality, detached; not a number where the batch has no such token.
        image_hidden_states (`torch.Tensor` of shape `(num_image_tokens, hidden_size)`, *optional*):
            Image tokens of the batch, as the connector makes them.
        modality_weights, count_free_modality_weights (`tuple[torch.Tensor]`, *optional*):
            See [`SparseMoeVlmTextModelOutputWithPast`].
    """

    z_loss: torch.Tensor | None = None
    aux_loss_by_modality: torch.Tensor | None = None
    image_hidden_states: torch.Tensor | None = None
    modality_weights: tuple[torch.Tensor, ...] | None = None
    count_free_modality_weights: tuple[torch.Tensor, ...] | None = None
