"""The modules that a decoder runs and their order, recorded by hooks in one forward pass of a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..evaluation_mode import evaluating
from .errors import UpcyclingError

# Modules that do nothing in evaluation mode.
_IDLE = (nn.Dropout, nn.Identity)
_NUM_TOKENS = 8
_OUR_ORDER = "a norm, attention, a norm and a feed-forward block"


@dataclass(frozen=True)
class LayerTrace:
    """
    The parts of a decoder layer, in the order in which they run.

    Args:
        input_norm, attention, feed_forward_norm, feed_forward (`tuple[str, nn.Module]`):
            The four parts, each with its name in the layer.
        projections (`list[nn.Linear]`):
            The linear layers of the attention.
        attention_norms (`list[tuple[str, nn.Module]]`):
            Its other modules, with their names in the layer.
        is_rotary (`bool`):
            Whether the attention depends on the rotary embedding of its tokens.
    """

    input_norm: tuple[str, nn.Module]
    attention: tuple[str, nn.Module]
    feed_forward_norm: tuple[str, nn.Module]
    feed_forward: tuple[str, nn.Module]
    projections: list[nn.Linear]
    attention_norms: list[tuple[str, nn.Module]]
    is_rotary: bool

    @property
    def read(self) -> list[nn.Module]:
        """The modules that contain all weights of the layer."""
        parts = (self.input_norm, self.feed_forward_norm, self.feed_forward, *self.attention_norms)
        return [*(module for _, module in parts), *self.projections]


@torch.no_grad()
def trace_decoder(
    model: PreTrainedModel, decoder: nn.Module, layers: Sequence[nn.Module]
) -> tuple[list[LayerTrace], tuple[str, nn.Module]]:
    """
    Runs a language model in evaluation mode, and finds the parts of its layers.

    Args:
        model (`PreTrainedModel`):
            A language model. It is not changed.
        decoder (`nn.Module`):
            The module that runs the layers.
        layers (`Sequence[nn.Module]`):
            The layers.

    Returns:
        `tuple[list[LayerTrace], tuple[str, nn.Module]]`: The parts of each layer, and the norm after the last layer
        with its name.

    Raises:
        UpcyclingError: If the layers have other parts than those of our decoder, or run them in another order.
    """
    order: list[nn.Module] = []
    calls: dict[nn.Module, tuple[tuple, dict[str, Any]]] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        order.append(module)
        if "position_embeddings" in kwargs:
            calls[module] = args, kwargs

    input_ids = torch.arange(_NUM_TOKENS, device=model.device).remainder(model.get_input_embeddings().num_embeddings)
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules()]
    with evaluating(model):
        try:
            model(input_ids=input_ids[None], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        traces = [_read_layer(model, number, layer, order, calls) for number, layer in enumerate(layers)]
    after = order[len(order) - order[::-1].index(layers[-1]) :]
    names = {module: name for name, module in decoder.named_children()}
    outer = [(names[module], module) for module in after if module in names and not isinstance(module, _IDLE)]
    if len(outer) != 1:
        raise UpcyclingError(
            f"{type(model).__name__} runs {[name for name, _ in outer]} after its layers, but our decoder runs "
            "one norm."
        )
    return traces, outer[0]


def _read_layer(
    model: PreTrainedModel,
    number: int,
    layer: nn.Module,
    order: list[nn.Module],
    calls: dict[nn.Module, tuple[tuple, dict[str, Any]]],
) -> LayerTrace:
    names = {module: name for name, module in layer.named_modules()}
    children = set(layer.children())
    ran = [(names[module], module) for module in order if module in names and not isinstance(module, _IDLE)]
    parts = [(name, module) for name, module in ran if module in children]
    is_norm = [not any(isinstance(inner, nn.Linear) for inner in module.modules()) for _, module in parts]
    if is_norm != [True, False, True, False]:
        raise UpcyclingError(
            f"layer {number} of {type(model).__name__} runs {', '.join(name for name, _ in parts)}, in this order, but "
            f"a layer of our decoder runs {_OUR_ORDER}. `upcycle` keeps the model's own decoder."
        )
    input_norm, attention, feed_forward_norm, feed_forward = parts
    within = f"{attention[0]}."
    inside = [(name, module) for name, module in ran if name.startswith(within) and not any(module.children())]
    projections = [module for _, module in inside if isinstance(module, nn.Linear)]
    others = [(name, module) for name, module in inside if not isinstance(module, nn.Linear)]
    if len(projections) not in (2, 4) or len(others) not in (0, 2):
        raise UpcyclingError(
            f"attention in layer {number} of {type(model).__name__} runs {', '.join(name for name, _ in inside)}, but "
            "attention in our decoder runs only projections of queries, keys, values and the output, and norms of "
            "queries and keys. `upcycle` keeps the model's own decoder."
        )
    return LayerTrace(
        input_norm, attention, feed_forward_norm, feed_forward, projections, others,
        is_rotary=_is_rotary(attention[1], calls),
    )  # fmt: skip


def _is_rotary(attention: nn.Module, calls: dict[nn.Module, tuple[tuple, dict[str, Any]]]) -> bool:
    """Returns whether the outputs of the attention change if all rotary angles are zero."""
    if attention not in calls:
        return True  # the comparison of the models decides
    args, kwargs = calls[attention]
    cos, sin = kwargs["position_embeddings"]
    at_zero = torch.ones_like(cos), torch.zeros_like(sin)
    usual, unturned = (
        attention(*args, **kwargs | {"position_embeddings": angles})[0] for angles in ((cos, sin), at_zero)
    )
    return not torch.equal(usual, unturned)
