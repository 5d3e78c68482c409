"""Checks of configuration values. The error messages name the field, its value and the allowed values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

# Larger sizes are mistakes. They are checked before any loop over layers, groups or modalities.
MAX_LAYERS = 4096
MAX_EXPERTS = 1_000_000
MAX_GROUPS = 1000
MAX_MODALITIES = 100

_LONGEST_SHOWN = 500


def shown(value: Any) -> str:
    """Returns the `repr` of a value for an error message, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def check(condition: bool, message: str) -> None:
    """Raises `ValueError` with the message unless the condition is true."""
    if not condition:
        raise ValueError(message)


def check_integer(
    field: str, value: Any, *, at_least: int = 1, below: int | None = None, at_most: int | None = None
) -> None:
    """
    Raises `ValueError` unless the value of the field is an integer in the range.

    Args:
        field (`str`):
            Name of the field in the error message.
        value (`Any`):
            The value.
        at_least (`int`, *optional*, defaults to 1):
            Smallest allowed value.
        below (`int`, *optional*):
            Smallest value that is too large.
        at_most (`int`, *optional*):
            Largest plausible value.
    """
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    wanted = f"of at least {at_least}" if below is None else f"from {at_least} to {below - 1}"
    check(
        is_integer and value >= at_least and (below is None or value < below),
        f"`{field}` must be an integer {wanted}, got {shown(value)}.",
    )
    check(
        at_most is None or value <= at_most,
        f"`{field}` is {value}, which is not plausible: at most {at_most} is allowed.",
    )


def check_number(field: str, value: Any, *, at_most: float = math.inf) -> None:
    """Raises `ValueError` unless the value of the field is a number from 0 to `at_most`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    wanted = "of at least 0" if at_most == math.inf else f"from 0 to {at_most}"
    check(
        is_number and 0 <= value <= at_most and value != math.inf,
        f"`{field}` must be a number {wanted}, got {shown(value)}.",
    )


def check_boolean(field: str, value: Any) -> None:
    """Raises `ValueError` unless the value of the field is `True` or `False`."""
    check(isinstance(value, bool), f"`{field}` must be True or False, got {shown(value)}.")


def check_choice(field: str, value: Any, choices: Collection[str]) -> None:
    """Raises `ValueError` unless the value of the field is one of the choices."""
    check(
        isinstance(value, str) and value in choices,
        f"`{field}` must be one of {', '.join(choices)}, got {shown(value)}.",
    )


def check_sequence(field: str, value: Any, of: type, *, at_most: int = MAX_LAYERS) -> None:
    """Raises `ValueError` unless the value of the field is a list or tuple of at most `at_most` values of a type."""
    check(isinstance(value, list | tuple), f"`{field}` must be a list of {of.__name__}, got {shown(value)}.")
    check(
        len(value) <= at_most,
        f"`{field}` has {len(value)} entries, which is not plausible: at most {at_most} is allowed.",
    )
    check(
        all(isinstance(item, of) for item in value), f"`{field}` must be a list of {of.__name__}, got {shown(value)}."
    )


def check_layers(field: str, layers: Any, num_hidden_layers: int) -> None:
    """Raises `ValueError` unless the value of the field is a list of different layers of the model."""
    check_sequence(field, layers, int)
    wrong = [layer for layer in layers if not 0 <= layer < num_hidden_layers]
    check(not wrong, f"`{field}` names layers {shown(wrong)}, but the model has layers 0 to {num_hidden_layers - 1}.")
    check_distinct(field, layers)


def check_distinct(field: str, values: Sequence[Any]) -> None:
    """Raises `ValueError` if the values of the field are not distinct."""
    check(len(set(values)) == len(values), f"`{field}` repeats a value: {shown(list(values))}.")


def check_spelling(unknown: Iterable[str], fields: Collection[str], *, kind: str = "field") -> None:
    """
    Raises `ValueError` if an unknown field is probably a misspelt known field. Transformers would ignore it.

    Args:
        unknown (`Iterable[str]`):
            Names of the unknown fields.
        fields (`Collection[str]`):
            Names of the known fields.
        kind (`str`, *optional*, defaults to `"field"`):
            Word for the fields in the error message.
    """
    for field in unknown:
        close = difflib.get_close_matches(field, fields, n=1, cutoff=0.88)
        check(not close, f"there is no {kind} `{field}`: did you mean `{', '.join(close)}`?")
