"""Encoders of further modalities: an encoder from Transformers and a projector convert their inputs to tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.activations import ACT2FN
from transformers.utils import torch_compilable_check

from .configuration_sparse_moe_vlm import SparseMoeVlmConfig


class SparseMoeVlmModalityEncoder(nn.Module):
    """
    The encoder of a further modality: an encoder created by `AutoModel`, followed by a two-layer MLP. It converts the
    main input of the encoder to tokens `(num_items, num_tokens, D_text)`, one for each row of its last hidden state.

    Args:
        config (`SparseMoeVlmConfig`):
            Configuration of the whole model.
        encoder_config (`dict`):
            The entry of the modality in `config.modality_encoders`.

    Raises:
        ValueError: If `AutoModel` cannot create an encoder from the entry.
    """

    def __init__(self, config: SparseMoeVlmConfig, encoder_config: dict[str, Any]):
        super().__init__()
        fields = {key: value for key, value in encoder_config.items() if key != "token_id"}
        try:
            self.encoder = AutoModel.from_config(AutoConfig.for_model(**fields))
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"`modality_encoders` names the model type {fields['model_type']!r}, for which there is no encoder: "
                f"{error}. Register its classes first with `AutoConfig.register` and `AutoModel.register`."
            ) from error
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(self.encoder.config.hidden_size, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Encodes the inputs of a modality."""
        features = self.encoder(**{self.encoder.main_input_name: values}).last_hidden_state
        return self.linear_2(self.act(self.linear_1(features)))


class SparseMoeVlmModalityEncoders(nn.ModuleDict):
    """
    The encoders of all further modalities, by the name of the modality.

    Args:
        config (`SparseMoeVlmConfig`):
            Configuration of the whole model.
    """

    def __init__(self, config: SparseMoeVlmConfig):
        super().__init__(
            {
                name: SparseMoeVlmModalityEncoder(config, entry)
                for name, entry in (config.modality_encoders or {}).items()
            }
        )
        self.modalities = config.text_config.modalities

    def embed(
        self,
        modality_values: Mapping[str, torch.Tensor],
        inputs_embeds: torch.Tensor,
        mm_token_type_ids: torch.Tensor,
    ) -> torch.Tensor:
        """
        Replaces the embeddings of placeholders with the features of the encoders.

        Args:
            modality_values (`Mapping[str, torch.Tensor]`):
                Inputs of the encoders, by the name of the modality.
            inputs_embeds (`torch.Tensor` of shape `(B, T, D)`):
                Embeddings of the tokens.
            mm_token_type_ids (`torch.Tensor` of shape `(B, T)`):
                Modality id of every token.

        Returns:
            `torch.Tensor` of shape `(B, T, D)`: The embeddings with the features.

        Raises:
            ValueError: If a modality has no encoder, if its values are not a tensor, or if the number of its features
                does not match the number of its tokens.
        """
        for name, values in modality_values.items():
            if name not in self:
                raise ValueError(f"`modality_values` has {name!r}, but there are encoders for {sorted(self)} only.")
            if not torch.is_tensor(values):
                raise ValueError(
                    f"`modality_values[{name!r}]` must be a tensor with one item per row, got {type(values).__name__}."
                )
            features = self[name](values).flatten(0, 1).to(inputs_embeds.device, inputs_embeds.dtype)
            is_placeholder = (mm_token_type_ids == self.modalities.index(name)).to(inputs_embeds.device)
            num_tokens = is_placeholder.sum()
            torch_compilable_check(
                num_tokens == features.shape[0],
                f"Features and tokens of modality {name!r} do not match: every item needs as many placeholder tokens "
                f"as the encoder returns features ({features.shape[0]} in this batch).",
            )
            inputs_embeds = inputs_embeds.masked_scatter(is_placeholder.unsqueeze(-1), features)
        return inputs_embeds

    def repeat(
        self, modality_values: Mapping[str, torch.Tensor], mm_token_type_ids: torch.Tensor, times: int
    ) -> dict[str, torch.Tensor]:
        """
        Repeats the inputs of the encoders for a batch in which every row is repeated, as for beam search.

        Args:
            modality_values (`Mapping[str, torch.Tensor]`):
                Inputs of the encoders, by the name of the modality.
            mm_token_type_ids (`torch.Tensor` of shape `(B, T)`):
                Modality ids of the rows before they are repeated.
            times (`int`):
                Number of repetitions of every row.

        Returns:
            `dict[str, torch.Tensor]`: The repeated inputs. Inputs that do not match the rows are returned unchanged;
            [`SparseMoeVlmModalityEncoders.embed`] raises an error for them.
        """
        repeated = dict(modality_values)
        for name in self.keys() & repeated.keys():
            values = repeated[name]
            num_tokens = (mm_token_type_ids == self.modalities.index(name)).sum(dim=1)
            # All items have the same number of tokens.
            num_items = (num_tokens * len(values) // num_tokens.sum().clamp(min=1)).tolist()
            if sum(num_items) == len(values):
                repeated[name] = torch.cat([rows for rows in values.split(num_items) for _ in range(times)])
        return repeated
