"""Mistakes of the user's: one line that says what is wrong, and no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Mistake(SystemExit):
    """
    Ends the command with exit code 2.

    Args:
        message (`str`): What is wrong and what to do. It is printed where the mistake is found.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 2


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """
    To be held around what reads the user's input: recipes, models, images, budgets. An error there is a mistake in the
    input, not in the code.

    Raises:
        Mistake: In place of `ValueError`, `OSError`, and what configurations raise at values of a wrong type.
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
