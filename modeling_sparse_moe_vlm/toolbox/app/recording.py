"""Records the attention and the routing of a call of `generate`, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ...experts_config import SparseMoeVlmExpertsConfig
from ...routing import LayerRouting
from ...token_modalities import TokenModalities
from ..expert_modules import base_model_of
from ..routing.watch import watch_routing


@dataclass
class Recording:
    """
    The attention of the last token of every forward pass, and the experts that the tokens of the prompt were routed to.

    Args:
        attention (`list[dict[int, torch.Tensor]]`):
            For every forward pass, by layer: the attention of the last token to every key, `(keys,)`, averaged over
            heads, in float32.
        experts (`list[torch.Tensor]`):
            By sparse layer, the first routed expert of every token of the prompt, `(prompt length,)`.
        layers (`list[int]`):
            Numbers of the sparse layers.
        groups (`list[list[tuple[str, int]]]`):
            Name and number of experts of the routed groups of every sparse layer.
    """

    attention: list[dict[int, torch.Tensor]] = field(default_factory=list)
    experts: list[torch.Tensor] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    groups: list[list[tuple[str, int]]] = field(default_factory=list)

    def attention_to_prompt(self, steps: Sequence[int], length: int) -> np.ndarray | None:
        """
        Returns the attention of some forward passes to the tokens of the prompt, averaged over layers.

        Args:
            steps (`Sequence[int]`):
                Numbers of the forward passes.
            length (`int`):
                Length of the prompt.

        Returns:
            `np.ndarray` of shape `(steps, length)`, in float64. 0 for tokens outside the window of a layer. `None`
            if the attention of a step is not known.
        """
        rows = []
        for step in steps:
            layers = self.attention[step] if step < len(self.attention) else {}
            if not layers:
                return None
            # The cache of a layer with a sliding window no longer contains the first keys.
            ends = [nn.functional.pad(keys, (length + step - len(keys), 0))[:length] for keys in layers.values()]
            rows.append(torch.stack(ends).double().mean(dim=0).numpy())
        return np.stack(rows)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Returns the decoder of a model, or the model itself if Transformers does not know its decoder."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return model if decoder is None else decoder


@contextmanager
def recording(model: nn.Module) -> Iterator[Recording]:
    """
    Context manager that records the attention and the routing of a model with one row per batch. It records attention
    only with the eager implementation, and routing only for the experts of this package.

    Args:
        model (`nn.Module`):
            The model, with or without adapters.

    Yields:
        [`Recording`]: The recording, which is filled while the model runs.
    """
    record = Recording()
    decoder = decoder_of(base_model_of(model))

    def begin(module: nn.Module, args: tuple) -> None:
        record.attention.append({})

    def keep(module: Any, args: tuple, output: Any) -> Any:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not record.attention or not torch.is_tensor(weights) or weights.dim() != 4:
            return output
        last = weights[:, :, -1:].clone()
        record.attention[-1][module.layer_idx] = last[0, :, 0].float().mean(dim=0).cpu()
        # With `output_attentions`, `generate` would keep the matrices of all layers.
        return output[0], last, *output[2:]

    def listen(config: SparseMoeVlmExpertsConfig, tokens: TokenModalities, layers: Sequence[LayerRouting]) -> None:
        if not record.experts:  # the first pass, which runs the prompt
            record.experts = [layer.chosen[:, 0].cpu() for layer in layers]
            record.layers = config.sparse_layers
            record.groups = [
                [(group.name, group.num_experts) for group in config.layer_expert_groups(layer, always_on=False)]
                for layer in config.sparse_layers
            ]

    handles = [decoder.register_forward_pre_hook(begin), *watch_routing(model, listen)]
    handles += [module.register_forward_hook(keep) for module in decoder.modules() if hasattr(module, "layer_idx")]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
