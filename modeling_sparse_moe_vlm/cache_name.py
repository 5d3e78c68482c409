"""The name of the key/value cache: Transformers 5.24 renamed the argument `past_key_values` to `cache`.

The models accept the cache under the name that the installed release uses for `generate`, layers and outputs. If that
is `cache`, calls with `past_key_values=` get the deprecation warning of Transformers. With older releases, the models
have no argument `cache`, because continuous batching uses this name for something else there.
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
    """
    Returns whether a cache is the paged cache of continuous batching, which contains several texts and therefore has no
    single length.
    """
    return cache is not None and not hasattr(cache, "get_seq_length")


def takes_cache_by_name(forward: Callable) -> Callable:
    """
    Decorator for methods with an argument `past_key_values`. The method also accepts the argument as `cache` if that is
    its name in the installed release of Transformers.

    Args:
        forward (`Callable`):
            The method.

    Returns:
        `Callable`: The method. It raises `ValueError` if a call passes both names. If `cache` is the new name, calls
        with `past_key_values=` log the same deprecation warning as Transformers models.
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

    # `generate` inspects the signature of `forward`.
    signature = inspect.signature(forward)
    *named, variadic = signature.parameters.values()
    by_name = inspect.Parameter(CACHE_NAME, inspect.Parameter.KEYWORD_ONLY, default=None)
    by_either_name.__signature__ = signature.replace(parameters=[*named, by_name, variadic])  # type: ignore[attr-defined]
    return by_either_name
