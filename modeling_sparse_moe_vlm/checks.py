"""Checks of configuration values. The error messages name the field, its value and the allowed values."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.activations import ACT2FN

# Larger sizes are mistakes. They are checked before any loop over layers, groups or modalities.
MAX_LAYERS = 4096
MAX_EXPERTS = 1_000_000
MAX_GROUPS = 1000
MAX_MODALITIES = 100
MAX_LABELS = 2**20
MAX_WIDTH = 2**24
MAX_IMAGE_SIZE = 2**16
# Number of weights of the experts of a group in one layer. More would be hundreds of terabytes.
MAX_WEIGHTS = 2**47

# Names of sizes in the configurations of Transformers, with their largest plausible value.
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth", "encoder_layers", "decoder_layers")
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_channels")
_SIZES = {
    **dict.fromkeys(_DEPTHS, MAX_LAYERS),
    **dict.fromkeys((*_WIDTHS, "vocab_size", "patch_size"), MAX_WIDTH),
    "image_size": MAX_IMAGE_SIZE,
}
_NOT_ZERO = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "patch_size", "vocab_size")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "projector_hidden_act")
_MAX_INTEGER = 2**62  # larger integers do not fit tensors

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


def check_dtype(field: str, value: Any) -> None:
    """Raises `ValueError` unless the value of the field is a dtype of torch, its name or `None`."""
    named = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    check(
        value is None or isinstance(named, torch.dtype),
        f"`{field}` must be the name of a dtype of torch, got {shown(value)}.",
    )


def check_library_fields(name: str, fields: Mapping[str, Any]) -> None:
    """
    Raises `ValueError` if a configuration of Transformers has implausible sizes or names of functions and dtypes, which
    Transformers does not check.

    Args:
        name (`str`):
            Name of the configuration in the error message, empty for that of the whole model.
        fields (`Mapping[str, Any]`):
            The fields of the configuration, with those of its sub-configurations.
    """
    for field, value in fields.items():
        path = f"{name}.{field}" if name else str(field)
        if field in ("dtype", "torch_dtype"):
            check_dtype(path, value)
        elif isinstance(value, Mapping):
            check_library_fields(path, value)
        elif field == "rope_theta":
            check(isinstance(value, int | float) and value > 0, f"`{path}` must be more than 0, got {shown(value)}.")
        elif field in _ACTIVATIONS and isinstance(value, str):
            check_choice(path, value, ACT2FN)
        elif isinstance(value, int) and not isinstance(value, bool):
            smallest = int(field in _NOT_ZERO) if field in _SIZES else -_MAX_INTEGER
            check_integer(path, value, at_least=smallest, at_most=_SIZES.get(field, _MAX_INTEGER))


def _check_lists(fields: Mapping[str, Any], name: str = "") -> None:
    """
    Raises `ValueError` if a list that Transformers makes while it creates a configuration, of layers or labels, would
    fill the memory. The text configuration of our architecture checks its number of layers itself.
    """
    for field, value in fields.items():
        if isinstance(value, Mapping):
            path = f"{name}[{field!r}]" if name == "modality_encoders" else f"{name}.{field}".removeprefix(".")
            _check_lists(value, path)
            continue
        limit = MAX_LABELS if field == "num_labels" else MAX_LAYERS if field in _DEPTHS else None
        is_checked_later = fields.get("model_type") == "sparse_moe_vlm_text" and field != "num_labels"
        if limit is not None and isinstance(value, int) and value > limit and not is_checked_later:
            check_integer(f"{name}.{field}".removeprefix("."), value, at_most=limit)


# Errors about wrong values that models of Transformers raise while they are created.
OBSCURE_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError)


@contextmanager
def errors_of_config(name: str, kinds: tuple = (*OBSCURE_ERRORS, RuntimeError, TypeError)) -> Iterator[None]:
    """
    Context manager for creating a model of Transformers. Errors of any kind about wrong values become a `ValueError`.

    Args:
        name (`str`):
            Name of the class of the model in the error message.
        kinds (`tuple`, *optional*):
            Classes of the errors.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except kinds as error:
        if "unexpected keyword argument" in str(error):  # not about the configuration
            raise
        raise ValueError(
            f"the configuration does not describe a {name}, creating it failed ({type(error).__name__}: {error})."
        ) from error


def build_config(make: Callable[[dict[str, Any]], Any], fields: dict[str, Any]) -> Any:
    """
    Creates a configuration from its fields. Errors of Transformers about wrong values, which can be of any kind, become
    errors that name the field.

    Args:
        make (`Callable[[dict[str, Any]], Any]`):
            Creates the configuration.
        fields (`dict[str, Any]`):
            The fields.

    Returns:
        `Any`: What `make` returns.

    Raises:
        ValueError: If a field is invalid. The message names the field.
    """
    _check_lists(fields)
    try:
        return make(dict(fields))
    except Exception as error:
        if isinstance(error, OSError | ImportError) or (isinstance(error, ValueError) and "`" in str(error)):
            raise
        named = _wrong_field(make, fields)
        if named is None:
            field = re.search(r"[Ff]ield '(\w+)'", str(error))  # as the data classes of Transformers name it
            what = "the configuration" if field is None else f"`{field[1]}`"
        else:
            what = f"`{named[0]}` ({shown(named[1])})"
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{what} is invalid: {reason[-1].strip()}") from error


def _wrong_field(make: Callable[[dict[str, Any]], Any], fields: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Returns the path and value of the field without which a configuration can be created, or `None`."""
    for path, value in _fields_from_inside(fields):
        try:
            make(_without(fields, path))
        except Exception:
            continue
        return ".".join(path), value
    return None


def _fields_from_inside(
    fields: Mapping[str, Any], before: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the path and value of each field, those of sub-configurations before the sub-configurations."""
    for name, value in fields.items():
        path = (*before, str(name))
        if isinstance(value, Mapping) and len(before) < 3:
            yield from _fields_from_inside(value, path)
        yield path, value


def _without(fields: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    name, *rest = path
    kept = {key: value for key, value in fields.items() if str(key) != name}
    return kept | {name: _without(fields[name], rest)} if rest else kept
