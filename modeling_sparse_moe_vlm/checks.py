"""Checks of configuration values: their messages name the field, what it holds and what it may hold."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any


def check(condition: bool, message: str) -> None:
    """Raises `ValueError` with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_integer(field: str, value: Any, *, at_least: int = 1, below: int | None = None) -> None:
    """Raises `ValueError` unless the field holds an integer in the range."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    wanted = f"of at least {at_least}" if below is None else f"from {at_least} to {below - 1}"
    check(
        is_integer and value >= at_least and (below is None or value < below),
        f"`{field}` must be an integer {wanted}, got {value!r}.",
    )


def check_number(field: str, value: Any, *, at_most: float = math.inf) -> None:
    """Raises `ValueError` unless the field holds a number from 0 to `at_most`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    wanted = "of at least 0" if at_most == math.inf else f"from 0 to {at_most}"
    check(
        is_number and 0 <= value <= at_most and value != math.inf,
        f"`{field}` must be a number {wanted}, got {value!r}.",
    )


def check_boolean(field: str, value: Any) -> None:
    """Raises `ValueError` unless the field holds `True` or `False`."""
    check(isinstance(value, bool), f"`{field}` must be True or False, got {value!r}.")


def check_choice(field: str, value: Any, choices: Collection[str]) -> None:
    """Raises `ValueError` unless the field holds one of the choices."""
    check(isinstance(value, str) and value in choices, f"`{field}` must be one of {', '.join(choices)}, got {value!r}.")


def check_sequence(field: str, value: Any, of: type) -> None:
    """Raises `ValueError` unless the field holds a list (or tuple) of values of the type."""
    check(
        isinstance(value, list | tuple) and all(isinstance(item, of) for item in value),
        f"`{field}` must be a list of {of.__name__}, got {value!r}.",
    )


def check_layers(field: str, layers: Any, num_hidden_layers: int) -> None:
    """Raises `ValueError` unless the field holds a list of layers that the model has."""
    check_sequence(field, layers, int)
    wrong = [layer for layer in layers if not 0 <= layer < num_hidden_layers]
    check(not wrong, f"`{field}` names layers {wrong}, but the model has layers 0 to {num_hidden_layers - 1}.")
    check_distinct(field, layers)


def check_distinct(field: str, values: Sequence[Any]) -> None:
    """Raises `ValueError` if the field holds something twice."""
    check(len(set(values)) == len(values), f"`{field}` repeats a value: {list(values)}.")


def check_spelling(unknown: Iterable[str], fields: Collection[str], *, kind: str = "field") -> None:
    """Raises `ValueError` if an unknown field reads like a misspelt known one: the library would keep it unheeded."""
    for field in unknown:
        close = difflib.get_close_matches(field, fields, n=1, cutoff=0.88)
        check(not close, f"there is no {kind} `{field}`: did you mean `{', '.join(close)}`?")
