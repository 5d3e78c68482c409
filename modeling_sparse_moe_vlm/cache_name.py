"""The name of the cache of keys and values: Transformers 5.24 calls `cache` what was `past_key_values` before.

The models take it as `past_key_values` in every release, and by the library's own name, which `generate`, the layers
and the outputs use. In older releases `cache` stays free, since continuous batching has another use for it there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields

from transformers.modeling_outputs import MoeModelOutputWithPast

CACHE_NAME = "cache" if "cache" in {field.name for field in fields(MoeModelOutputWithPast)} else "past_key_values"


def takes_cache_by_name(forward: Callable) -> Callable:
    """Lets a `forward` with an argument `past_key_values` take it by the library's name, too.

    Raises:
        ValueError: If a call gives both.
    """
    if CACHE_NAME == "past_key_values":
        return forward

    @functools.wraps(forward)
    def by_either_name(*args, **kwargs):
        if CACHE_NAME in kwargs:
            if kwargs.get("past_key_values") is not None:
                raise ValueError(f"`{CACHE_NAME}` and `past_key_values` are the same argument: pass only one of them.")
            kwargs["past_key_values"] = kwargs.pop(CACHE_NAME)
        return forward(*args, **kwargs)

    # `generate` looks the arguments up that a model takes.
    signature = inspect.signature(forward)
    *named, variadic = signature.parameters.values()
    by_name = inspect.Parameter(CACHE_NAME, inspect.Parameter.KEYWORD_ONLY, default=None)
    by_either_name.__signature__ = signature.replace(parameters=[*named, by_name, variadic])  # type: ignore[attr-defined]
    return by_either_name
