"""The Hub's errors during a push, each as one line that says what to do."""

from __future__ import annotations

from btx_merge.errors import BTXError, InputError, MergeError, Problem
from btx_merge.sources.locate import LOG_IN_AGAIN

_CONTINUE = "What is uploaded is kept: the same command continues."


def is_passing(error: Exception) -> bool:
    """Return whether the same request may succeed in a moment: the line was cut, or the Hub has a bad time."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, HTTPError)  # httpx's own, under the name that it has in this version


def explained(error: Exception, endpoint: str, repo_id: str, token: str) -> BTXError:
    """Turn the error into ours: `InputError` if another input helps, `MergeError` if time or the network does."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # an upload's failure is wrapped
    message = _first_line(error).replace(token, "***")
    if isinstance(error, HfHubHTTPError):
        return _answered(error.response.status_code, message, endpoint, repo_id)
    if isinstance(error, HTTPError):
        found = f"{repo_id}: the Hub at {endpoint} cannot be reached ({message})"
        return MergeError(f"{found}. Check the network. {_CONTINUE}")
    return MergeError(f"{repo_id}: the push failed ({type(error).__name__}: {message}). {_CONTINUE}")


def _answered(status: int, message: str, endpoint: str, repo_id: str) -> BTXError:
    owner = repo_id.split("/")[0]
    if status == 401:
        found, expected = "the Hub does not know this token", f"one that may write to {repo_id}"
        return InputError([Problem("push", "token", found, expected, LOG_IN_AGAIN)])
    if status in (403, 404):
        found = f"this token may not write there ({status}: {message})"
        remedy = f"Is {owner} you or an organisation of yours, and does the token have write access?"
        return InputError([Problem("push", repo_id, found, "a token that may", remedy)])
    if status in (409, 412):
        return MergeError(f"{repo_id}: it was changed by somebody else meanwhile ({message}). {_CONTINUE}")
    if status in (408, 429) or status >= 500:
        return MergeError(f"{repo_id}: the Hub at {endpoint} failed ({status}: {message}). {_CONTINUE}")
    return InputError([Problem("push", repo_id, f"the Hub refuses ({status}: {message})")])


def _first_line(error: Exception) -> str:
    """Return what the Hub itself said, or else the first line that says something."""
    said = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
    return " ".join(said.splitlines()[0].split()).rstrip(".")
