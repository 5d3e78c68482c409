"""Hooks that report the routing of every forward pass of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ...experts_config import SparseMoeVlmExpertsConfig, experts_config_of
from ...routing import LayerRouting, RoutingRecord
from ...token_modalities import TokenModalities

Listener = Callable[[SparseMoeVlmExpertsConfig, TokenModalities, Sequence[LayerRouting]], None]


def decoders(model: nn.Module) -> list[Any]:
    """Returns the modules in a model that plan the routing of a forward pass: its decoder, also inside wrappers."""
    # Checks an attribute, not the class: a checkpoint that contains its own code has its own classes.
    return [module for module in model.modules() if hasattr(module, "routing_planner")]


def watch_routing(
    model: nn.Module, listener: Listener, when: Callable[[Any], bool] = lambda decoder: True
) -> list[RemovableHandle]:
    """
    Calls a listener with the routing of every router, once per forward pass. Gradient checkpointing, which runs layers
    again, does not call it twice.

    Args:
        model (`nn.Module`):
            A model that contains our decoder. It can be wrapped or have adapters.
        listener (`Callable`):
            Function that is called with the configuration of the experts, the tokens of the pass and the routing of
            every sparse layer.
        when (`Callable`, *optional*):
            Function that is called with the decoder and returns whether to record the pass. By default, all passes are
            recorded.

    Returns:
        `list[RemovableHandle]`: Handles of the hooks; remove them to stop watching. Empty if the model does not contain
        our decoder.
    """

    def before(decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if when(decoder) and kwargs.get("routing_record") is None:
            kwargs = kwargs | {"routing_record": RoutingRecord()}
        return args, kwargs

    def after(decoder: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        record = kwargs.get("routing_record")
        if record is not None and record.layers() and when(decoder):
            listener(experts_config_of(decoder.config), record.tokens, record.layers())

    handles = []
    for decoder in decoders(model):
        handles.append(decoder.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(decoder.register_forward_hook(after, with_kwargs=True))
    return handles
