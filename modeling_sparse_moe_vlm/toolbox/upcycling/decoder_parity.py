"""Comparison of our decoder with a dense decoder, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..evaluation_mode import evaluating
from .errors import UpcyclingError
from .parts_weights import BuiltModel, decoder_of
from .receipt import ParityReceipt

FeedForward = Callable[[torch.Tensor], torch.Tensor]

TOLERANCE = 1e-5
# Differences of up to this multiple of the dense model's own rounding are accepted.
_SPREAD = 4
_NUM_TOKENS = 16


class _States(NamedTuple):
    """Embedded tokens, the output of each layer `(B, T, D)`, and logits `(B, T, V)`."""

    hidden_states: list[torch.Tensor]
    logits: torch.Tensor


@torch.no_grad()
def check_decoder(
    dense: PreTrainedModel,
    dense_layers: Sequence[nn.Module],
    model: BuiltModel,
    *,
    is_centred: bool = False,
    is_rounded: bool = False,
    feed_forward: Mapping[int, FeedForward] | None = None,
    seed: int = 0,
) -> ParityReceipt:
    """
    Compares two models on random text, at the first positions and at positions up to the largest that the model
    supports. The sparse model runs on tokens of every modality, because the experts of all modalities must start alike.

    Both models run in float32, one module at a time, which needs little memory. They may differ by 1e-5 (relative), or
    by 4 times the difference between the dense model in float32 and in float64, which is larger in models with large
    activations, especially at late positions. If weights of a smaller type had to be rounded, the models may differ by
    the rounding of that type, or by 4 times the difference between the dense model in that type and in float32.

    Args:
        dense (`PreTrainedModel`):
            The dense language model.
        dense_layers (`Sequence[nn.Module]`):
            Layers of the dense model.
        model (`SparseMoeVlmForCausalLM` or `SparseMoeVlmForConditionalGeneration`):
            The sparse model.
        is_centred (`bool`, defaults to `False`):
            Whether the sparse model's hidden states are those of the dense model minus their mean.
        is_rounded (`bool`, defaults to `False`):
            Whether weights of the sparse model were computed from those of the dense model, and rounded to their type.
        feed_forward (`Mapping[int, Callable]`, *optional*):
            Functions that run in place of the experts of a layer, by layer, for starts that are not exact.
        seed (`int`, defaults to 0):
            Seed of the random text.

    Returns:
        [`ParityReceipt`]: The receipt for the logits at the first positions, with the experts.

    Raises:
        UpcyclingError: If the models differ. The message names the first place at which they do.
    """
    config = model.config.get_text_config()
    decoder = decoder_of(model)
    layers: list[Any] = list(decoder.layers)
    num_ids = min(dense.get_input_embeddings().weight.shape[0], dense.get_output_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(num_ids, (1, _NUM_TOKENS), generator=generator).to(dense.device)
    modalities = config.modalities
    ids = torch.arange(len(modalities), device=dense.device)[:, None].expand(-1, _NUM_TOKENS)

    def run_dense(position_ids: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(input_ids)
        return dense(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits

    def run_sparse(position_ids: torch.Tensor) -> torch.Tensor:
        hidden_states = decoder(
            input_ids=input_ids.expand_as(ids),
            attention_mask=torch.ones_like(ids),
            position_ids=position_ids.expand_as(ids),
            mm_token_type_ids=ids,
            use_cache=False,
        ).last_hidden_state
        return model.lm_head(hidden_states)

    first = torch.arange(_NUM_TOKENS, device=dense.device)
    last = torch.linspace(0, config.max_position_embeddings - 1, _NUM_TOKENS, device=dense.device).long()
    floor = max(TOLERANCE, torch.finfo(dense.dtype).eps) if is_rounded else TOLERANCE
    with evaluating(dense), evaluating(model):
        for positions in (last[None], first[None]):
            with in_type(dense, torch.float32):
                expected = _states(dense_layers, run_dense, positions)
            with nullcontext() if is_rounded else in_type(dense, torch.float64):
                other = _states(dense_layers, run_dense, positions)
            with in_type(model, torch.float32), _replaced(layers, feed_forward or {}):
                actual = _states(layers, run_sparse, positions)
            bound = _compare(dense, modalities, other, expected, actual, floor, is_centred)
        logits = actual.logits
        if feed_forward:
            with in_type(model, torch.float32):
                logits = run_sparse(first[None])
    return _receipt(logits[..., :num_ids], expected.logits, None if feed_forward else bound, dense.dtype)


def _compare(
    dense: PreTrainedModel,
    modalities: Sequence[str],
    other: _States,
    expected: _States,
    actual: _States,
    floor: float,
    is_centred: bool,
) -> float:
    """
    Returns the bound on the difference of logits. Raises `UpcyclingError` at the first difference that is too large.
    `other` has the states of the dense model in another type.
    """
    name = type(dense).__name__
    num_layers = len(expected.hidden_states) - 1
    places = ["in the embedded tokens", *(f"after layer {layer}" for layer in range(num_layers))]
    rows = zip(places, other.hidden_states, expected.hidden_states, actual.hidden_states, strict=True)
    centre = _centred if is_centred else _same
    compared = [(place, centre(a), centre(b), c) for place, a, b, c in rows]
    num_ids = expected.logits.shape[-1]
    compared.append(
        ("in the logits, after the same hidden states", other.logits, expected.logits, actual.logits[..., :num_ids])
    )
    for place, rounded, wanted, found in compared:
        bound = max(floor, _SPREAD * difference(rounded, wanted))
        differences = [difference(row, wanted[0]) for row in found]
        worst = max(range(len(differences)), key=lambda row: differences[row])
        if not differences[worst] <= bound:
            raise UpcyclingError(
                f"our decoder with the weights of {name} computes something else {place}, for tokens of "
                f"{modalities[worst]!r}: the relative difference is {differences[worst]:.1e}, but rounding explains at "
                f"most {bound:.1e}. `upcycle` keeps the model's own decoder."
            )
    return bound


def _receipt(actual: torch.Tensor, expected: torch.Tensor, bound: float | None, dtype: torch.dtype) -> ParityReceipt:
    """Returns the receipt for logits `(M, T, V)` of M modalities, and logits `(1, T, V)` of the dense model."""
    deviation = (actual - expected).double()
    return ParityReceipt(
        relative_difference=(deviation.norm() / expected.expand_as(actual).double().norm()).item(),
        max_difference=deviation.abs().max().item(),
        same_tokens=(actual.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        bound=bound,
        dtype=str(dtype).removeprefix("torch."),
        num_tokens=actual.shape[0] * actual.shape[1],
        batch="made",
    )


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference, relative to the largest expected value; NaN if a value is not finite."""
    largest = expected.float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((actual.float() - expected.float()).abs().max() / largest).item()


def _same(states: torch.Tensor) -> torch.Tensor:
    return states


def _centred(states: torch.Tensor) -> torch.Tensor:
    return states.float() - states.float().mean(dim=-1, keepdim=True)


def _states(
    layers: Sequence[nn.Module], run: Callable[[torch.Tensor], torch.Tensor], positions: torch.Tensor
) -> _States:
    """Runs a model and records the inputs of its layers and the output of the last layer."""
    states: list[torch.Tensor] = []

    def note_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def note_output(module: nn.Module, args: tuple, output: Any) -> None:
        states.append(output if isinstance(output, torch.Tensor) else output[0])

    handles = [layer.register_forward_pre_hook(note_input, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(note_output))
    try:
        return _States(states, run(positions))
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_type(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """
    Makes a model compute in another type. The weights of each module are converted while the module runs, and restored
    afterwards.
    """
    usual: dict[nn.Parameter, torch.Tensor] = {}

    def convert(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != dtype:
                usual[parameter] = parameter.data
                parameter.data = parameter.data.to(dtype)

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in usual:
                parameter.data = usual.pop(parameter)

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(convert))
        handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, data in usual.items():
            parameter.data = data


@contextmanager
def _replaced(layers: Sequence[Any], feed_forward: Mapping[int, FeedForward]) -> Iterator[None]:
    """Replaces the outputs of feed-forward blocks with those of other functions."""
    handles = [
        layers[layer].mlp.register_forward_hook(lambda _, args, output, block=block: block(args[0]))
        for layer, block in feed_forward.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
