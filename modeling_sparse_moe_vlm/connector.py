"""The connector, which converts patch features of the vision tower to tokens of the decoder."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_sparse_moe_vlm import SparseMoeVlmConfig


class SparseMoeVlmMultiModalProjector(nn.Module):
    """
    The connector: merges squares of patches (space-to-depth, also called pixel shuffle; arXiv 2404.16821) and applies a
    two-layer MLP: `patch_features (N, h·w, D_vision)` → `(N, h·w / f², D_text)`, where f is the `pixel_shuffle_factor`.

    Args:
        config (`SparseMoeVlmConfig`):
            Configuration of the whole model.
    """

    def __init__(self, config: SparseMoeVlmConfig):
        super().__init__()
        self.factor = config.pixel_shuffle_factor
        bias = config.multimodal_projector_bias
        merged_size = config.vision_config.hidden_size * self.factor**2
        self.linear_1 = nn.Linear(merged_size, config.text_config.hidden_size, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size, bias=bias)

    def forward(self, patch_features: torch.Tensor) -> torch.Tensor:
        """Converts the patch features of images to image tokens."""
        return self.linear_2(self.act(self.linear_1(self._space_to_depth(patch_features))))

    def _space_to_depth(self, features: torch.Tensor) -> torch.Tensor:
        """Merges squares of patches: `(N, h·w, D)` → `(N, h·w / f², f²·D)`."""
        if self.factor == 1:
            return features
        num_images, num_patches, width = features.shape
        side = int(num_patches**0.5)
        small = side // self.factor
        features = features.view(num_images, small, self.factor, small, self.factor, width)
        return features.transpose(2, 3).reshape(num_images, small * small, self.factor**2 * width)
