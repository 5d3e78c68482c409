"""Hooks that tell what routers do in the forward passes of a model, whoever calls it."""

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
    """The modules within a model that plan the routing of a pass: its decoder, wherever wrappers put it."""
    # By attribute, since the classes of a checkpoint that came with its code are others.
    return [module for module in model.modules() if hasattr(module, "routing_planner")]


def watch_routing(
    model: nn.Module, listener: Listener, when: Callable[[Any], bool] = lambda decoder: True
) -> list[RemovableHandle]:
    """
    Tells a listener, once per forward pass, what each router did. Activation checkpointing, which runs layers again,
    tells nothing twice.

    Args:
        model (`nn.Module`):
            A model with our decoder in it, in a wrapper or with adapters.
        listener (`Callable`):
            Takes the configuration of the experts, the tokens of the pass and the routing of every sparse layer.
        when (`Callable`, *optional*):
            Takes the decoder before a pass; `False` to leave that pass alone.

    Returns:
        `list[RemovableHandle]`: the hooks; remove them to stop watching. Empty for a model of another class.
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
