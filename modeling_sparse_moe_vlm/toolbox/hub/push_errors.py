"""Errors of uploads, each with one message that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

AGAIN = "Run it again: files that were uploaded completely are not uploaded again."


class PushError(ValueError):
    """The checkpoint cannot be uploaded. The message says what to change."""


class PushInterruptedError(PushError):
    """The upload failed for a reason that can pass, such as a lost connection. Upload again to complete it."""


@contextmanager
def errors_of_the_hub(repo_id: str) -> Iterator[None]:
    """
    Replaces the errors of `huggingface_hub`, and of the libraries that it uses.

    Args:
        repo_id (`str`):
            Name of the repository, for the messages.

    Raises:
        PushError: If the token or the repository does not allow the upload.
        PushInterruptedError: If the upload can be repeated.
    """
    try:
        yield
    except PushError:
        raise
    except Exception as error:
        raise _replaced(error, repo_id) from error


def _replaced(error: Exception, repo_id: str) -> PushError:
    if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
        return PushError(
            f"{repo_id}: {_line(error)}"
        )  # such as metadata of the model card that the Hub does not accept
    # `huggingface_hub` wraps errors of uploads of large files.
    of_server = next((one for one in _chain(error) if isinstance(one, HfHubHTTPError)), None)
    if of_server is not None and of_server.response is not None:
        return _of_status(of_server, repo_id)
    if any(isinstance(one, LocalTokenNotFoundError) for one in _chain(error)):
        return PushError("You are not logged in: run `hf auth login`, or set HF_TOKEN to a token with write access.")
    if isinstance(error, OfflineModeIsEnabled):
        return PushError("HF_HUB_OFFLINE is set, so nothing can be uploaded.")
    if isinstance(error, HTTPError | OSError | RuntimeError):
        return PushInterruptedError(
            f"The connection to {constants.ENDPOINT} failed while uploading to {repo_id} ({_line(error)}). {AGAIN}"
        )
    raise error


def _of_status(error: HfHubHTTPError, repo_id: str) -> PushError:
    status = error.response.status_code
    says = error.server_message or error.response.headers.get("X-Error-Message") or ""
    says = f" ({' '.join(says.split())})" if says else ""
    if isinstance(error, RevisionNotFoundError):
        return PushError(f"{repo_id} does not have this revision{says}.")
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return PushError(
            f"The Hub does not accept your token, which may have expired{says}: run `hf auth login`, or set HF_TOKEN "
            "to a token with write access."
        )
    if isinstance(error, RepositoryNotFoundError):
        return PushError(f"{repo_id} does not exist, or your token has no access to it{says}.")
    if status == 403:
        return PushError(f"Your token has no write access to {repo_id}{says}.")
    if status in (409, 412):
        return PushInterruptedError(f"{repo_id} was changed by someone else during the upload{says}. {AGAIN}")
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        when = f"in {wait} seconds" if wait else "in a few minutes"
        return PushInterruptedError(f"The Hub limits the rate of requests, try again {when}{says}. {AGAIN}")
    return PushInterruptedError(
        f"The Hub answered with the status {status} while uploading to {repo_id}{says}. {AGAIN}"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
