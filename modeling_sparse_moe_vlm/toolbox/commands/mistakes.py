"""Mistakes in the user's input, which are reported in one line and without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Mistake(SystemExit):
    """
    Ends the command with exit code 2.

    Args:
        message (`str`):
            What is wrong and what to do. `mistakes_in_one_line` has printed it already.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 2


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """
    Reports errors as mistakes in the input. Used around code that reads the user's input: recipes, models, images and
    memory budgets.

    Raises:
        Mistake: In place of `ValueError`, `OSError` and `StrictDataclassError` (which configurations raise for values
            of a wrong type). Its message is printed to stderr.
    """
    try:
        yield
    except Exception as error:
        from huggingface_hub.errors import StrictDataclassError

        if not isinstance(error, ValueError | OSError | StrictDataclassError):
            raise
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        raise Mistake(message) from error
