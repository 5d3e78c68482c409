"""
A different adapter for each row of the batch: `adapter_names=["a", "b", "__base__"]` works in all layers of PEFT.

In PEFT itself, such a call registers hooks on the layers while it runs, which also affect the calls of other threads.
PEFT also passes one name per row to every layer, but experts get tokens that are no longer arranged in rows. Here, the
names belong to the thread that makes the call, and a layer that gets tokens receives the name of each token.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...checks import check
from .batch_rows import check_not_compiled, check_number_of_names, num_rows_of, rows_of_tokens
from .switches import switches_of

# Names of the rows of the call that runs in this thread.
_names: ContextVar[list[str] | None] = ContextVar("names", default=None)
_registering = threading.Lock()


def run_by_row(layer: Any, adapter_names: list[str], x: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
    """
    Runs experts with a different adapter for each row of the batch: once per adapter, on the tokens of its rows.

    Args:
        layer ([`~toolbox.expert_lora.adapted_layer.FactoredExpertsLayer`]):
            Outermost layer of the experts.
        adapter_names (`list[str]`):
            Name of the adapter of each row, `"__base__"` for no adapter.
        x (`torch.Tensor` of shape `(tokens, ...)`):
            Input of the experts.
        args (`torch.Tensor` of shape `(tokens, ...)`):
            Other inputs of the experts.

    Returns:
        `torch.Tensor`: The output of the experts, of the same shape and dtype as `x`.

    Raises:
        ValueError: If adapters are merged, if several processes share the experts, or if the number of names differs
            from the number of rows.
    """
    check(not layer.merged, "`adapter_names` needs adapters that are not merged: call `unmerge_adapter` first.")
    check(
        layer.share is None,
        f"several processes share {layer.stack_name!r}, so the rows of a batch cannot have different adapters: leave "
        "out `adapter_names` and switch adapters with `set_adapter`, or run the model in one process.",
    )
    rows = rows_of_tokens(layer, x.shape[0], len(adapter_names)).to(x.device)
    output = torch.zeros_like(x)
    for name in dict.fromkeys(adapter_names):
        has_it = torch.tensor([other == name for other in adapter_names], device=x.device)
        tokens = has_it[rows].nonzero().squeeze(1)
        output[tokens] = layer.run([name], x[tokens], *(arg[tokens] for arg in args)).to(output.dtype)
    return output


def take_names_by_call(model: nn.Module) -> None:
    """
    Gives every call of a model its own `adapter_names`, even if several threads call it at the same time. A call
    without names raises an error if another thread switches adapters while it runs.

    Args:
        model (`nn.Module`):
            Model with adapters. It is changed in place if it is a `PeftModel`. A second call has no effect.
    """
    if isinstance(model, PeftModel):
        tuner: Any = model.base_model
        tuner._enable_peft_forward_hooks = partial(_around_a_call, tuner)


@contextmanager
def _around_a_call(tuner: Any, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Iterator[None]:
    """Replaces the method of PEFT's models that wraps `forward` and `generate` and gets their arguments."""
    switches = switches_of(tuner)
    with type(tuner)._enable_peft_forward_hooks(tuner, *args, **kwargs):
        if adapter_names is None:
            with nullcontext() if switches is None else switches.forbidden():
                yield
            return
        check_not_compiled()
        names = _checked(tuner, adapter_names, args, kwargs)
        _give_names_to_layers(tuner)
        token = _names.set(names)
        try:
            yield
        finally:
            _names.reset(token)


def _checked(tuner: Any, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Checks the names, and returns one for each row that the layers get: `generate` repeats rows, as for beams."""
    check(isinstance(names, list | tuple), f"`adapter_names` must be a list of names, got {names!r}.")
    check(not tuner.training, "Cannot pass `adapter_names` when the model is in training mode.")
    compiled = [module for module in tuner.modules() if module._compiled_call_impl is not None]
    check(
        not compiled,
        "`adapter_names` cannot be combined with `compile()`, but a part of the model was compiled with it.",
    )
    layers = [layer for layer in tuner.modules() if isinstance(layer, LoraLayer)]
    known = {name for layer in layers for of in (layer.lora_A, layer.lora_embedding_A) for name in of}
    unknown = sorted(set(names) - known - {"__base__"})
    check(not unknown, f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    shape = num_rows_of(args, kwargs)
    check_number_of_names(len(names), None if shape is None else shape[0])
    generation_config = kwargs.get("generation_config")
    copies = [
        kwargs.get(key) or getattr(generation_config, key, None) or 1 for key in ("num_beams", "num_return_sequences")
    ]
    return [name for name in names for _ in range(max(copies))]


def _give_names_to_layers(tuner: nn.Module) -> None:
    with _registering:
        for layer in tuner.modules():
            is_layer = isinstance(layer, LoraLayer | AuxiliaryTrainingWrapper)
            if is_layer and _give_names not in layer._forward_pre_hooks.values():
                layer.register_forward_pre_hook(_give_names, with_kwargs=True)


def _give_names(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if torch.compiler.is_compiling():
        return None  # calls that are compiled have no names
    names = _names.get()
    if names is None:
        return None
    x = args[0] if args else next(iter(kwargs.values()))
    if x.dim() == 2 and not isinstance(layer, ParamWrapper):  # tokens that are not arranged in rows
        names = [names[row] for row in rows_of_tokens(layer, x.shape[0], len(names)).tolist()]
    return args, kwargs | {"adapter_names": names}
