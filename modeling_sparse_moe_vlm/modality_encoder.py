"""Further modalities: an encoder from Transformers and a projector turn what is not text or an image into tokens."""

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
    The encoder of one further modality, which `AutoModel` makes, then a two-layer MLP: the encoder's main input →
    tokens `(num_items, num_tokens, D_text)`, one per row of its last hidden state.

    Args:
        config (`SparseMoeVlmConfig`):
            Configuration of the whole model.
        encoder_config (`dict`):
            The entry of the modality in `config.modality_encoders`.

    Raises:
        ValueError: If `AutoModel` cannot make an encoder of the entry.
    """

    def __init__(self, config: SparseMoeVlmConfig, encoder_config: dict[str, Any]):
        super().__init__()
        fields = {key: value for key, value in encoder_config.items() if key != "token_id"}
        try:
            self.encoder = AutoModel.from_config(AutoConfig.for_model(**fields))
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"`modality_encoders` names the model type {fields['model_type']!r}, which makes no encoder: {error}. "
                "Register its classes first, with `AutoConfig.register` and `AutoModel.register`."
            ) from error
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(self.encoder.config.hidden_size, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        features = self.encoder(**{self.encoder.main_input_name: values}).last_hidden_state
        return self.linear_2(self.act(self.linear_1(features)))


class SparseMoeVlmModalityEncoders(nn.ModuleDict):
    """The encoders of all further modalities, by name."""

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
        Replaces the placeholders of further modalities by what their encoders return.

        Args:
            modality_values (`Mapping[str, torch.Tensor]`):
                By modality, the input of its encoder.
            inputs_embeds (`torch.Tensor` of shape `(B, T, D)`):
                The embedded tokens.
            mm_token_type_ids (`torch.Tensor` of shape `(B, T)`):
                Their modality ids.

        Returns:
            `torch.Tensor` of shape `(B, T, D)`: the embedded tokens with the features in place.

        Raises:
            ValueError: If a modality has no encoder, its values are not a tensor, or the numbers of its features and
                tokens differ.
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
                f"as its encoder makes features ({features.shape[0]} in this batch).",
            )
            inputs_embeds = inputs_embeds.masked_scatter(is_placeholder.unsqueeze(-1), features)
        return inputs_embeds

    def repeat(
        self, modality_values: Mapping[str, torch.Tensor], mm_token_type_ids: torch.Tensor, times: int
    ) -> dict[str, torch.Tensor]:
        """
        The values for a batch in which every row is repeated, as for beams.

        Args:
            modality_values (`Mapping[str, torch.Tensor]`):
                By modality, the input of its encoder.
            mm_token_type_ids (`torch.Tensor` of shape `(B, T)`):
                The modality ids of the rows before they are repeated.
            times (`int`):
                How many times every row appears.

        Returns:
            `dict[str, torch.Tensor]`: values that do not fit the rows are returned unchanged, and [`embed`] refuses
            them.
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
