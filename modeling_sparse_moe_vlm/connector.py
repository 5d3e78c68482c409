"""The connector, which converts patch features of the vision tower to tokens of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_sparse_moe_vlm import SparseMoeVlmConfig
from .native_towers import feature_size_of, num_deepstack_levels_of


class SparseMoeVlmFeatureProjector(nn.Module):
    """
    A projector of patch features: merges squares of patches (space-to-depth, also called pixel shuffle; arXiv
    2404.16821) and applies a two-layer MLP: `patch_features (N, h·w, D_vision)` → `(N, h·w / f², D_text)`, where f is
    the `pixel_shuffle_factor`.

    Args:
        config (`SparseMoeVlmConfig`):
            Configuration of the whole model.
    """

    def __init__(self, config: SparseMoeVlmConfig):
        super().__init__()
        self.factor = config.pixel_shuffle_factor
        bias = config.multimodal_projector_bias
        merged_size = feature_size_of(config.vision_config) * self.factor**2
        self.linear_1 = nn.Linear(merged_size, config.text_config.hidden_size, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size, bias=bias)

    def forward(self, patch_features: torch.Tensor, grids: Sequence[tuple[int, int]] | None = None) -> torch.Tensor:
        """
        Converts the patch features of images to image tokens.

        Args:
            patch_features (`torch.Tensor` of shape `(N, h·w, D_vision)`):
                The features of square images of one size. With `grids`, those of all images one after another, of shape
                `(sum of h·w, D_vision)`.
            grids (`Sequence[tuple[int, int]]`, *optional*):
                Height h and width w of each image in patches, multiples of f.

        Returns:
            `torch.Tensor` of shape `(N, h·w / f², D_text)` or `(sum of h·w / f², D_text)`: The image tokens.
        """
        if grids is None:
            side = int(patch_features.shape[1] ** 0.5)
            merged = self._space_to_depth(patch_features, side, side)
        else:
            images = patch_features.split([height * width for height, width in grids])
            merged = torch.cat(
                [
                    self._space_to_depth(image[None], height, width)[0]
                    for image, (height, width) in zip(images, grids, strict=True)
                ]
            )
        return self.linear_2(self.act(self.linear_1(merged)))

    def _space_to_depth(self, features: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Merges squares of patches: `(N, h·w, D)` → `(N, h·w / f², f²·D)`."""
        if self.factor == 1:
            return features
        num_images, _, size = features.shape
        rows, columns = height // self.factor, width // self.factor
        features = features.view(num_images, rows, self.factor, columns, self.factor, size)
        return features.transpose(2, 3).reshape(num_images, rows * columns, self.factor**2 * size)


class SparseMoeVlmMultiModalProjector(SparseMoeVlmFeatureProjector):
    """
    The connector. With `use_deepstack`, it has another projector for each level of the vision tower's DeepStack
    features (arXiv 2406.04334).

    Args:
        config (`SparseMoeVlmConfig`):
            Configuration of the whole model.
    """

    def __init__(self, config: SparseMoeVlmConfig):
        super().__init__(config)
        num_levels = num_deepstack_levels_of(config.vision_config) if config.use_deepstack else 0
        self.deepstack_projectors = nn.ModuleList([SparseMoeVlmFeatureProjector(config) for _ in range(num_levels)])

    def forward(
        self,
        patch_features: torch.Tensor,
        grids: Sequence[tuple[int, int]] | None = None,
        deepstack_features: Sequence[torch.Tensor] | None = None,
    ) -> Any:
        """
        Converts the patch features of images to image tokens: see [`SparseMoeVlmFeatureProjector.forward`].

        Args:
            patch_features (`torch.Tensor`):
                The features.
            grids (`Sequence[tuple[int, int]]`, *optional*):
                Height and width of each image in patches.
            deepstack_features (`Sequence[torch.Tensor]`, *optional*):
                The DeepStack features, one tensor per level with the shape of `patch_features`.

        Returns:
            `torch.Tensor`: The image tokens. With `deepstack_features`, a tuple of the image tokens and a list of one
            tensor of the same shape per level.
        """
        tokens = super().forward(patch_features, grids)
        if deepstack_features is None:
            return tokens
        projectors = zip(self.deepstack_projectors, deepstack_features, strict=True)
        return tokens, [projector(features, grids) for projector, features in projectors]
