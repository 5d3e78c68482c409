"""Batches, generation arguments and stop strings of the requests of lmms-eval."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from transformers import GenerationConfig

# lmms-eval fills this in for tasks that set no stop string. Answers of chat models may have several paragraphs.
FILLED_IN_STOP = "\n\n"


def batches(requests: Sequence[tuple[Any, ...]], batch_size: int) -> Iterator[list[int]]:
    """
    Yields the numbers of the requests of each batch. The requests of a batch have the same generation arguments. For
    each set of arguments, the longest texts come first.

    Args:
        requests (`Sequence[tuple]`):
            The arguments of each request: a text, a function, generation arguments, and others.
        batch_size (`int`):
            Maximum number of requests per batch.

    Returns:
        `Iterator[list[int]]`: Positions of requests in `requests`.
    """

    def arguments(number: int) -> str:
        return repr(sorted(requests[number][2].items()))

    order = sorted(range(len(requests)), key=lambda number: (arguments(number), -len(requests[number][0])))
    for _, group in groupby(order, arguments):
        numbers = list(group)
        yield from (numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size))


def generation_options(arguments: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """
    Makes arguments of `generate` of those of a task. Where a task does not set `do_sample`, a positive temperature
    means sampling. A temperature of 0 means greedy decoding.

    Args:
        arguments (`Mapping[str, Any]`):
            The `generation_kwargs` of the task.
        max_new_tokens (`int`):
            Maximum number of new tokens if the task does not set it.

    Returns:
        `dict[str, Any]`: Arguments of `generate`.
    """
    known = GenerationConfig().to_dict().keys()
    given = {name: value for name, value in arguments.items() if name != "until" and value is not None}
    if unknown := sorted(given.keys() - known):
        warnings.warn(f"`generate` has no {unknown}: these generation arguments have no effect.", stacklevel=2)
    options = {"max_new_tokens": max_new_tokens} | {name: given[name] for name in given.keys() & known}
    temperature = given.get("temperature")
    options["do_sample"] = temperature != 0 and bool(given.get("do_sample", temperature))
    if not options["do_sample"]:
        options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
    return options


def cut(text: str, stops: str | Iterable[str] | None) -> str:
    """
    Cuts an answer before the first stop string.

    Args:
        text (`str`):
            The answer.
        stops (`str` or `Iterable[str]`, *optional*):
            Stop strings. Two line breaks do not stop answers, since lmms-eval fills them in.

    Returns:
        `str`: The answer up to the first stop string.
    """
    for stop in [stops] if isinstance(stops, str) else stops or ():
        if stop and stop != FILLED_IN_STOP:
            text = text.split(stop, 1)[0]
    return text
