"""DeepStack: features of earlier layers of the vision tower, added to the hidden states of the first decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Deepstack:
    """
    The DeepStack features of all images or of all videos of a batch.

    Args:
        is_placeholder (`torch.Tensor` of shape `(B, T)`):
            Which tokens are placeholders of images, or of videos.
        levels (`Sequence[torch.Tensor]` of shape `(number of placeholders, D)`):
            The features of the placeholders in each level.
    """

    is_placeholder: torch.Tensor
    levels: Sequence[torch.Tensor]

    def add_level(self, layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Adds the features of a level to the hidden states after the decoder layer of the same index.

        Args:
            layer_idx (`int`):
                Index of the decoder layer.
            hidden_states (`torch.Tensor` of shape `(B, T, D)`):
                Output of the layer.

        Returns:
            `torch.Tensor` of shape `(B, T, D)`: The hidden states. Those of layers without a level are unchanged.
        """
        if layer_idx >= len(self.levels):
            return hidden_states
        features = self.levels[layer_idx].to(hidden_states.device, hidden_states.dtype)
        is_placeholder = self.is_placeholder.to(hidden_states.device).unsqueeze(-1)
        return hidden_states + torch.zeros_like(hidden_states).masked_scatter(is_placeholder, features)
