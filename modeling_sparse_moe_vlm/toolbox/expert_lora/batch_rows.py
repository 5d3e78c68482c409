"""Finds the row of the batch of each token that a module gets, even if the model passes only some tokens to it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...checks import check
from ..expert_modules import base_model_of

# In ERNIE-4.5-VL-MoE, every block has one bank of experts for text and one for images.
BANKS = {"text_moe": False, "vision_moe": True}


@dataclass(frozen=True)
class _Call:
    """
    A running call of the model, or of a module that passes some of its tokens to each of its parts.

    Args:
        module (`nn.Module`):
            The called module.
        num_tokens (`int`):
            Number of tokens of the call, over all rows.
        outer (`_Call`, *optional*):
            The call around this one.
        num_rows (`int`, *optional*):
            Number of rows, for a call of the model.
        places (`Mapping[str, torch.Tensor | None]`):
            Indices of the tokens that each part gets, by name of the part. `None` means all tokens.
    """

    module: nn.Module
    num_tokens: int
    outer: _Call | None
    num_rows: int | None = None
    places: Mapping[str, torch.Tensor | None] = field(default_factory=dict)


# The innermost running call of this thread.
_call: ContextVar[_Call | None] = ContextVar("call", default=None)


def tell_token_rows(model: nn.Module) -> None:
    """
    Registers hooks with which [`rows_of_tokens`] finds the row of each token. They work for models of this package, for
    ERNIE-4.5-VL-MoE, and for all models whose experts get all tokens in order.

    Args:
        model (`nn.Module`):
            Model to register the hooks on. A second call has no effect.
    """
    base: Any = base_model_of(model)
    for module in base.modules():
        if module is base:
            _register(module, _tell_of_model)
        elif all(hasattr(module, bank) for bank in BANKS):
            _register(module, _tell_of_banks)
        elif isinstance(module, nn.ModuleDict) and "tokens" in inspect.signature(type(module).forward).parameters:
            _register(module, _tell_of_groups)


def rows_of_tokens(module: nn.Module, num_inputs: int, num_names: int) -> torch.Tensor:
    """
    Returns the row of the batch to which each token of a module belongs.

    Args:
        module (`nn.Module`):
            Module that runs within a call of its model.
        num_inputs (`int`):
            Number of tokens that the module gets.
        num_names (`int`):
            Number of rows that the caller expects.

    Returns:
        `torch.Tensor` of shape `(num_inputs,)`: The index of the row of each token, of type int64.

    Raises:
        ValueError: If the batch has another number of rows, if it is unknown which tokens the module gets, or if the
            model is compiled.
    """
    check_not_compiled()
    call, places, num_tokens = _call.get(), None, None
    while call is not None and call.num_rows is None:
        part = next((name for name in call.places if _has(getattr(call.module, name, None), module)), None)
        if part is not None and num_tokens is None:
            places, num_tokens = call.places[part], call.num_tokens
        call = call.outer
    if call is not None:
        check_number_of_names(num_names, call.num_rows)
    if num_tokens is None:
        # The module gets one vector for each row, or all tokens.
        num_tokens = num_inputs if call is None or num_inputs == num_names else call.num_tokens
    check(
        num_tokens % num_names == 0 and num_inputs == (num_tokens if places is None else len(places)),
        f"`adapter_names` has {num_names} names, but a module of type {type(module).__name__} got {num_inputs} of "
        f"{num_tokens} tokens, and it is unknown which rows they belong to: leave out `adapter_names`.",
    )
    return (torch.arange(num_tokens) if places is None else places) // (num_tokens // num_names)


def check_not_compiled() -> None:
    """Raises `ValueError` in a compiled call, because compiled code does not run the hooks of this module."""
    check(
        not torch.compiler.is_compiling() and torch._C._dynamo.eval_frame.get_eval_frame_callback() is None,
        "`adapter_names` cannot be combined with `torch.compile`: call the model that was not compiled.",
    )


def check_number_of_names(num_names: int, num_rows: int | None) -> None:
    """Raises `ValueError` if the number of names differs from the number of rows, unless that is unknown."""
    check(
        num_rows is None or num_names == num_rows,
        f"`adapter_names` has {num_names} names, but the batch has {num_rows} rows: give one for each row.",
    )


def num_rows_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Size | None:
    """Returns the shape `(rows, tokens)` of the inputs of a model, or `None` if they have no such shape."""
    given = [kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds")]
    tokens = next((tensor for tensor in (*given, *args[:1]) if isinstance(tensor, torch.Tensor)), None)
    return None if tokens is None or tokens.dim() < 2 else tokens.shape[:2]


def _has(part: nn.Module | None, module: nn.Module) -> bool:
    return part is not None and any(other is module for other in part.modules())


def _register(module: nn.Module, tell: Any) -> None:
    if tell not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(tell, with_kwargs=True)
        module.register_forward_hook(_end, always_call=True)


def _tell_of_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    shape = None if torch.compiler.is_compiling() else num_rows_of(args, kwargs)
    if shape is not None:
        _call.set(_Call(model, shape.numel(), _call.get(), num_rows=shape[0]))


def _tell_of_groups(groups: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    given = inspect.signature(type(groups).forward).bind(groups, *args, **kwargs).arguments
    hidden_states, tokens = given["hidden_states"], given.get("tokens") or {}
    # If a group has a mask instead of indices, it gets all tokens.
    places = {name: None if (of := tokens.get(name)) is None or of.dtype == torch.bool else of for name in groups}
    _call.set(_Call(groups, hidden_states.shape[0], _call.get(), places=places))


def _tell_of_banks(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    hidden_states, is_image = (*args, *kwargs.values(), None)[:2]
    places: dict[str, torch.Tensor | None] = dict.fromkeys(BANKS)
    if is_image is not None and is_image.any():
        for bank, of_images in BANKS.items():
            places[bank] = (is_image.bool().flatten() == of_images).nonzero().squeeze(1)
    _call.set(_Call(block, hidden_states.shape[:-1].numel(), _call.get(), places=places))


def _end(module: nn.Module, *_: object) -> None:
    if torch.compiler.is_compiling():
        return
    call = _call.get()
    if call is not None and call.module is module:
        _call.set(call.outer)
