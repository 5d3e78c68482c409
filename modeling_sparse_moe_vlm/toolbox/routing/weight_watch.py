"""Mean weights of the attention parts (α, β, …) by layer, sampled in training."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...experts_config import experts_config_of
from ...parallel_plans import is_one_of_several_processes
from .watch import decoders


class ModalityWeightsSample:
    """
    Samples the weights of the attention parts in one forward pass between two calls of `figures`. Only decoders of our
    own architecture return them.

    Args:
        when (`Callable`):
            Function that is called with the decoder and returns whether the next pass can be sampled.
    """

    def __init__(self, when: Callable[[nn.Module], bool]) -> None:
        self._when = when
        self._modalities: tuple[str, ...] = ()
        self._sums: torch.Tensor | None = None  # of the weights and their number, `(2, layers, modalities)`

    def watch(self, model: nn.Module) -> list[RemovableHandle]:
        """
        Starts to sample.

        Args:
            model (`nn.Module`):
                The model. It can be wrapped or have adapters.

        Returns:
            `list[RemovableHandle]`: Handles of the hooks; remove them to stop sampling.
        """
        self._sums = None
        handles = []
        for decoder in decoders(model):
            if "output_modality_weights" in inspect.signature(decoder.forward).parameters:
                handles.append(decoder.register_forward_pre_hook(self._before, with_kwargs=True))
                handles.append(decoder.register_forward_hook(self._after, with_kwargs=True))
        return handles

    def _before(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self._sums is None and self._when(decoder):
            kwargs = kwargs | {"output_modality_weights": True}
        return args, kwargs

    @torch.no_grad()
    def _after(self, decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self._sums is not None or not kwargs.get("output_modality_weights"):
            return
        mask, device = kwargs.get("attention_mask"), output.modality_weights[0].device
        # `(layers, rows, heads, T, modalities)`
        weights = torch.stack([layer.to(device).float() for layer in output.modality_weights])
        counted = weights > 0  # tokens that cannot attend to a modality have no weight on it
        if mask is not None and mask.dim() == 2:
            counted &= mask[None, :, None, -weights.shape[3] :, None].to(device) != 0
        self._modalities = tuple(experts_config_of(decoder.config).modalities)
        self._sums = torch.stack([(weights * counted).sum(dim=(1, 2, 3)), counted.sum(dim=(1, 2, 3)).float()])

    def figures(self) -> dict[str, float]:
        """
        Returns the means over tokens and heads, and over all processes, which must call this method together. Padding
        and tokens that cannot attend to the modality are not counted. Then the next forward pass is sampled.

        Returns:
            `dict[str, float]`: Means by `"layer_<layer>/<modality>"`. Empty if no pass was sampled.
        """
        sums, self._sums = self._sums, None
        if sums is None:
            return {}
        if is_one_of_several_processes():
            torch.distributed.all_reduce(sums)
        return {
            f"layer_{layer}/{modality}": total / number
            for layer, (totals, numbers) in enumerate(zip(*sums.tolist(), strict=True))
            for modality, total, number in zip(self._modalities, totals, numbers, strict=True)
            if number
        }
