"""Which rows of the batch the tokens of a module are of, also where its model hands it only some of them."""

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

# ERNIE-4.5-VL-MoE: in every block a bank of experts for text, and one for images.
BANKS = {"text_moe": False, "vision_moe": True}


@dataclass(frozen=True)
class _Call:
    """
    A call in progress, of the model or of a module that hands parts of it some of the tokens.

    Args:
        module (`nn.Module`): The module.
        num_tokens (`int`): How many tokens it got, of all rows.
        outer (`_Call`, *optional*): The call that it is a part of.
        num_rows (`int`, *optional*): Of the model: how many rows it got.
        places (`Mapping[str, torch.Tensor | None]`):
            By name of a part: which of the tokens it gets, `None` for all.
    """

    module: nn.Module
    num_tokens: int
    outer: _Call | None
    num_rows: int | None = None
    places: Mapping[str, torch.Tensor | None] = field(default_factory=dict)


# A thread's innermost call.
_call: ContextVar[_Call | None] = ContextVar("call", default=None)


def tell_token_rows(model: nn.Module) -> None:
    """
    Lets adapters see of which row of the batch each token is: in our models, in ERNIE-4.5-VL-MoE, and wherever experts
    get all tokens in order.

    Args:
        model (`nn.Module`): The model, which gets hooks. Again harmless.
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
    The row of the batch that each input of a module is of.

    Args:
        module (`nn.Module`): The module, within a call of its model.
        num_inputs (`int`): How many tokens it got.
        num_names (`int`): For how many rows the caller has something.

    Returns:
        `torch.Tensor` of shape `(num_inputs,)`.

    Raises:
        ValueError: If the batch has another number of rows, or it is unknown which tokens the module got.
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
        # A module that gets one vector for each row, or all tokens.
        num_tokens = num_inputs if call is None or num_inputs == num_names else call.num_tokens
    check(
        num_tokens % num_names == 0 and num_inputs == (num_tokens if places is None else len(places)),
        f"`adapter_names` has {num_names} names, but a module of type {type(module).__name__} got {num_inputs} of "
        f"{num_tokens} tokens, and of which rows they are is unknown: leave out `adapter_names`.",
    )
    return (torch.arange(num_tokens) if places is None else places) // (num_tokens // num_names)


def check_not_compiled() -> None:
    """Compiled code does not run the hooks below, or those of before it was compiled."""
    check(
        not torch.compiler.is_compiling() and torch._C._dynamo.eval_frame.get_eval_frame_callback() is None,
        "`adapter_names` does not go with `torch.compile`: call the model that was not compiled.",
    )


def check_number_of_names(num_names: int, num_rows: int | None) -> None:
    check(
        num_rows is None or num_names == num_rows,
        f"`adapter_names` has {num_names} names, but the batch has {num_rows} rows: give one for each row.",
    )


def num_rows_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Size | None:
    """The shape `(rows, tokens)` of what a model is called with."""
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
    # A mask instead of places: the group gets all tokens.
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
