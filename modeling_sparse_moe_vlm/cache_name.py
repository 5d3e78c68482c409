"""The key/value cache and its name: Transformers 5.24 renamed the argument `past_key_values` to `cache`.

The models take the cache by the name that the installed release gives it, which `generate`, the layers and the outputs
use, too. Where that is `cache`, calls with `past_key_values=` get the library's own deprecation warning. Older releases
leave `cache` free, because continuous batching has another use for it there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

CACHE_NAME = "cache" if "cache" in {field.name for field in fields(MoeModelOutputWithPast)} else "past_key_values"


def is_paged(cache: Any) -> bool:
    """Whether a cache is that of continuous batching: it holds the tokens of many texts, and so has no one length."""
    return cache is not None and not hasattr(cache, "get_seq_length")


def takes_cache_by_name(forward: Callable) -> Callable:
    """
    Lets a method with an argument `past_key_values` take it as `cache`, where that is the library's name.

    Args:
        forward (`Callable`):
            The method.

    Returns:
        `Callable`: the method by either name. A call with `past_key_values=` warns as the library's own models do.

    Raises:
        ValueError: If a call gives both.
    """
    if CACHE_NAME == "past_key_values":
        return forward

    @functools.wraps(forward)
    def by_library_name(*args, **kwargs):
        if CACHE_NAME in kwargs:
            kwargs["past_key_values"] = kwargs.pop(CACHE_NAME)
        return forward(*args, **kwargs)

    by_deprecated_name = deprecate_kwarg("past_key_values", "5.40.0", new_name=CACHE_NAME)(by_library_name)

    @functools.wraps(forward)
    def by_either_name(*args, **kwargs):
        if kwargs.get(CACHE_NAME) is not None and kwargs.get("past_key_values") is not None:
            raise ValueError(f"`{CACHE_NAME}` and `past_key_values` are the same argument: pass only one of them.")
        return by_deprecated_name(*args, **kwargs)

    # `generate` looks up which arguments a model takes.
    signature = inspect.signature(forward)
    *named, variadic = signature.parameters.values()
    by_name = inspect.Parameter(CACHE_NAME, inspect.Parameter.KEYWORD_ONLY, default=None)
    by_either_name.__signature__ = signature.replace(parameters=[*named, by_name, variadic])  # type: ignore[attr-defined]
    return by_either_name
