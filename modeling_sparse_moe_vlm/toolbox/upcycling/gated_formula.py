"""Finding out whether a module is a gated feed-forward block, by running it."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.activations import ACT2FN

from .errors import UpcyclingError

FORMULA = "down(act(gate(x)) * up(x))"
# A clamp or a normalisation of activations is only noticed at the larger scale.
SCALES = (1.0, 1000.0)
# Above rounding in float32, and below the difference between the two approximations of GELU.
TOLERANCE = 1e-5
# Attributes that every module has, which do not affect what it computes.
MODULE_STATE = frozenset(vars(nn.Module()))

Rows = tuple[str, slice | None]


class NotTheFormulaError(UpcyclingError):
    """A module is not a gated feed-forward block."""


@dataclass(frozen=True)
class GatedFormula:
    """
    A module that computes `down(act(gate(x)) * up(x))`.

    Attributes:
        hidden_size (`int`): Width of `x` and of the output.
        intermediate_size (`int`): Width of `gate(x)`.
        hidden_act (`str`): Name of `act` in `ACT2FN`.
        parameters (`dict[str, tuple[str, slice | None]]`):
            For "gate", "up" and "down": the name of a parameter of the module, and its rows (`None`: all of them).
    """

    hidden_size: int
    intermediate_size: int
    hidden_act: str
    parameters: Mapping[str, Rows]


def read_formula(block: nn.Module, likely_activations: Iterable[str] = ()) -> GatedFormula:
    """
    Runs a module with random weights in float32 and compares it with the formula.

    The module may be of any dtype and on any device, including the meta device. Neither the module nor a random state
    is changed. Random weights also reveal what trained weights could hide, such as a projection that is all zeros.

    Args:
        block (`nn.Module`): Any module.
        likely_activations (iterable of `str`): Names in `ACT2FN` that are tried first.

    Returns:
        `GatedFormula`: The sizes, the activation and the names of the parameters.

    Raises:
        NotTheFormulaError: If the module computes something else or has other parts.
    """
    linears = _linears(block)
    layouts = list(_layouts(linears))
    if not layouts:
        raise NotTheFormulaError("not gated")
    _check_parts(block, linears)
    structure = _without_weights(block)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(linear.weight.shape, generator=generator, dtype=torch.float32, device="cpu")
        / math.sqrt(linear.in_features)
        for name, linear in linears.items()
    }
    names = list(dict.fromkeys((*likely_activations, *_activations())))
    fork = torch.random.fork_rng(devices=[])  # dropout uses the global random state
    with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False), fork:
        width = layouts[0].hidden_size
        x = torch.randn(2, 3, width, generator=generator, dtype=torch.float32)
        outputs = [_run(structure, weights, x * scale) for scale in SCALES]
        for layout in layouts:
            hidden_act = layout.activation(weights, x, outputs, names)
            if hidden_act is not None:
                if _differs(_run(structure.train(), weights, x), outputs[0]):
                    raise NotTheFormulaError("its outputs differ in training mode (set its dropout to 0 first)")
                return GatedFormula(width, layout.intermediate_size, hidden_act, layout.parameters())
    raise NotTheFormulaError(f"it computes something other than {FORMULA} with an activation of `ACT2FN`")


def looks_like_feed_forward(module: nn.Module) -> bool:
    """
    Returns whether the linear layers of a module widen its inputs and narrow them again, gated or not. Sequence mixers,
    such as Mamba's, have such layers as well, but also other parameters and further arguments.
    """
    linears = _linears(module)
    shapes = [tuple(linear.weight.shape) for linear in linears.values()]
    plain = len(shapes) == 2 and shapes[0] == shapes[1][::-1] and shapes[0][0] > shapes[0][1]
    gated = any(layout.intermediate_size != layout.hidden_size for layout in _layouts(linears))
    return (plain or gated) and (not _other_parts(module, linears) or not _takes_further_arguments(module))


def fingerprint(block: nn.Module) -> tuple:
    """Returns a key that is only equal for modules that compute the same function of their inputs and weights."""
    return tuple(
        (
            name,
            type(module),
            tuple((key, parameter.shape) for key, parameter in module.named_parameters(recurse=False)),
            tuple((key, buffer.shape) for key, buffer in module.named_buffers(recurse=False)),
            tuple((key, _identity(value)) for key, value in vars(module).items() if key not in MODULE_STATE),
        )
        for name, module in block.named_modules(remove_duplicate=False)
    )


def _identity(value) -> object:
    if isinstance(value, functools.partial):
        return (value.func, value.args, tuple(value.keywords.items()))
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


@dataclass(frozen=True)
class _Layout:
    """An assignment of linear layers, or halves of one, to the parts of the formula."""

    hidden_size: int
    intermediate_size: int
    gate: Rows
    up: Rows
    down: Rows

    def parameters(self) -> dict[str, Rows]:
        parts = {"gate": self.gate, "up": self.up, "down": self.down}
        return {part: (f"{name}.weight", rows) for part, (name, rows) in parts.items()}

    def activation(
        self, weights: Mapping[str, Tensor], x: Tensor, outputs: list[Tensor], names: list[str]
    ) -> str | None:
        """Returns the first activation in `names` with which the formula gives `outputs`."""
        gate, up, down = (weights[name][rows or slice(None)] for name, rows in (self.gate, self.up, self.down))
        inner = [(x * scale @ gate.T, x * scale @ up.T) for scale in SCALES]
        for name in names:
            act = ACT2FN[name]
            if not any(_differs(output, act(gates) * ups @ down.T) for output, (gates, ups) in zip(outputs, inner)):
                return name
        return None


def _layouts(linears: dict[str, nn.Linear]) -> Iterator[_Layout]:
    if len(linears) == 3:
        for gate, up, down in itertools.permutations(linears):
            width, inner = linears[gate].in_features, linears[gate].out_features
            if linears[up].weight.shape == (inner, width) and linears[down].weight.shape == (width, inner):
                yield _Layout(width, inner, (gate, None), (up, None), (down, None))
    elif len(linears) == 2:
        for fused, down in itertools.permutations(linears):
            width, inner = linears[fused].in_features, linears[down].in_features
            if linears[fused].out_features == 2 * inner and linears[down].out_features == width:
                first, second = (fused, slice(0, inner)), (fused, slice(inner, 2 * inner))
                yield _Layout(width, inner, first, second, (down, None))
                yield _Layout(width, inner, second, first, (down, None))


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if name and isinstance(module, nn.Linear)}


def _check_parts(block: nn.Module, linears: dict[str, nn.Linear]) -> None:
    for name, linear in linears.items():
        if type(linear) is not nn.Linear:
            raise NotTheFormulaError(f"`{name}` is a {type(linear).__name__}, not a `torch.nn.Linear`")
    biases = [name for name, linear in linears.items() if linear.bias is not None]
    if biases:
        raise NotTheFormulaError(f"linear layers with biases ({', '.join(biases)})")
    if others := _other_parts(block, linears):
        raise NotTheFormulaError(f"parameters or buffers besides those of its projections ({', '.join(others)})")
    if _takes_further_arguments(block):
        raise NotTheFormulaError(f"`{type(block).__name__}.forward` takes further arguments besides hidden states")


def _other_parts(block: nn.Module, linears: dict[str, nn.Linear]) -> list[str]:
    own = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    return [name for name, _ in (*block.named_parameters(), *block.named_buffers()) if name not in own]


def _takes_further_arguments(block: nn.Module) -> bool:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return sum(each.kind not in variable for each in inspect.signature(block.forward).parameters.values()) > 1


def _without_weights(block: nn.Module) -> nn.Module:
    """Copies a module's structure without its weights, its hooks and its configuration."""
    memo: dict[int, object] = {}
    for parameter in block.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, device="meta"), requires_grad=False)
    for module in block.modules():
        for key in ("config", "_hf_hook"):  # Accelerate's hook contains the weights of offloaded modules
            if key in vars(module):
                memo[id(vars(module)[key])] = vars(module)[key]
    structure = copy.deepcopy(block, memo)
    for module in structure.modules():
        if "_old_forward" in vars(module):  # the method that Accelerate's hook wraps
            module.forward = vars(module)["_old_forward"]
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return structure.eval()


def _run(structure: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    try:
        output = functional_call(structure, {f"{name}.weight": weight for name, weight in weights.items()}, (x,))
    except Exception as error:
        reason = f"it does not run on hidden states of shape (batch, length, hidden_size) ({error})"
        raise NotTheFormulaError(reason) from error
    if not isinstance(output, Tensor):
        raise NotTheFormulaError(f"it returns a {type(output).__name__}, not hidden states")
    return output


def _differs(output: Tensor, expected: Tensor) -> bool:
    """Returns whether outputs differ from expected ones by more than rounding. NaN differs from everything."""
    if output.shape != expected.shape:
        return True
    return not (output - expected).abs().max() <= TOLERANCE * expected.abs().max()


@functools.cache
def _activations() -> list[str]:
    """Returns the names in `ACT2FN` of functions without parameters. If several are equal, the usual name is first."""
    usual = ("silu", "gelu", "gelu_pytorch_tanh")
    # Creating xIELU, which has parameters, prints a message if its kernel is not installed.
    names = [name for name in dict.fromkeys((*usual, *ACT2FN)) if name != "xielu"]
    return [name for name in names if not list(ACT2FN[name].parameters())]
