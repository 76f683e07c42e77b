"""The public verb `push`: a model becomes a repository on the Hub, in one commit.

All checks come first. Weights are uploaded file by file, and the Hub keeps what it has: an interrupted push continues.
The commit at the end brings everything, and takes away what belonged to an earlier model; so nobody ever sees half of
one.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx_merge.errors import BTXError, InputError, MergeInterrupted, Problem
from btx_merge.publishing.checks import Publishable, examine
from btx_merge.publishing.errors import explained
from btx_merge.publishing.repository import Target, patiently
from btx_merge.reporting import Reporter, first_line
from btx_merge.sources.locate import bars_on_terminals_only

if TYPE_CHECKING:
    from huggingface_hub import HfApi


_LOG_IN = "Run `hf auth login`, or set HF_TOKEN."


@dataclass(frozen=True)
class PushReport:
    """What a push did."""

    repo_id: str
    """The repository, `org/name`."""
    url: str
    """The repository's address, at its branch; that of the pull request where there is one."""
    commit: str
    """The commit that now holds the model, 40 hexadecimal digits."""
    pull_request: str | None
    """The pull request's address; None where the branch was committed to."""
    files: tuple[str, ...]
    """Files that are new or changed. Empty where the repository held this very model: then nothing was committed."""
    deleted: tuple[str, ...]
    """Files of an earlier model that this one does not have."""
    nbytes: int
    """Size of the new or changed files, in bytes."""
    seconds: float
    """Wall time in seconds, checks included."""
    warnings: tuple[Problem, ...]
    """What deserves a look, though it stopped nothing."""
    adapted: tuple[str, ...]
    """Files that were published otherwise than they lie in the folder: the card, whose code now names the repository,
    and an adapter's config, where its base has another name on the Hub."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `--json` prints them."""
        return {**asdict(self), "warnings": [str(warning) for warning in self.warnings]}


def push(
    model: str | Path,
    repo_id: str,
    reporter: Reporter = Reporter(),
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
) -> PushReport:
    """Publish a model's folder on the Hub, as one commit to `repo_id`, which is created if need be.

    It is a merged model, what `export` or `extract` made of one, or an adapter that `train` wrote.

    Args:
        repo_id: `org/name`.
        private: whether a new repository is private. One that is there must be.
        revision: a branch; it is created from main where there is none of that name.
        create_pr: open a pull request instead of committing to the branch.
        token: by default that of HF_TOKEN or `hf auth login`.
        base_model: of an adapter, `org/name` or `org/name@revision`: its base on the Hub, where it was trained on a
            folder.

    Raises:
        InputError: every reason not to publish this folder, or why the Hub refuses.
        MergeError: the network or the Hub failed; the same call continues. `MergeInterrupted` for Ctrl-C.
    """
    began = time.perf_counter()
    checked, token = _check(Path(os.path.expanduser(model)), repo_id, revision, token, base_model)
    for warning in checked.warnings:
        reporter.warn(str(warning))
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    target = Target(api, repo_id, revision, create_pr, private)
    with bars_on_terminals_only(), _told(api, repo_id, token):
        patiently(lambda: _validate_card(api, checked))
        changes, commit, pull_request = target.send(checked, commit_message)
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")
    return PushReport(
        repo_id,
        pull_request or url,
        commit,
        pull_request,
        tuple(operation.path_in_repo for operation in changes.added),
        changes.deleted,
        sum(operation.upload_info.size for operation in changes.added),
        time.perf_counter() - began,
        checked.warnings,
        tuple(checked.changed),
    )


def _check(
    folder: Path, repo_id: str, revision: str | None, token: str | None, base_model: str | None
) -> tuple[Publishable, str]:
    """Check all that can be found out without the Hub.

    Returns:
        What is to be published, and the token to do it with.

    Raises:
        InputError: every problem, in one report.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    problems = []
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        found = f"no name that a repository can have ({first_line(error).rstrip('.')})"
        problems.append(Problem("push", repo_id, found, "org/name", "A branch is given by --revision."))
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        problems.append(Problem("push", f"--revision {revision}", "a commit", "a branch, such as main"))
    if constants.HF_HUB_OFFLINE:
        problems.append(Problem("push", "HF_HUB_OFFLINE", "set", "a way to the Hub", "Unset it."))
    token = token or get_token()
    if not token:
        problems.append(Problem("push", "token", "there is none", f"one that may write to {repo_id}", _LOG_IN))
    try:
        checked = examine(folder, repo_id, base_model)
    except InputError as error:
        raise InputError([*problems, *error.problems]) from None
    if problems or not token:
        raise InputError(problems)
    return checked, token


def _validate_card(api: HfApi, checked: Publishable) -> None:
    """Ask the Hub, whose rules are more than ours, before an upload of hours ends with its no.

    Raises:
        InputError: what the Hub does not accept in the card.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status

    card = checked.content("README.md")
    text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
    asked = {"repoType": "model", "content": text}
    response = get_session().post(f"{api.endpoint}/api/validate-yaml", json=asked)
    if response.status_code == 400:
        said = [str(error.get("message")) for error in response.json().get("errors", [])]
        if said:
            raise InputError([Problem("model", "README.md", f"the Hub does not accept it ({line})") for line in said])
    hf_raise_for_status(response)


@contextmanager
def _told(api: HfApi, repo_id: str, token: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into our errors.

    Args:
        token: is kept out of their texts.
    """
    try:
        yield
    except BTXError:
        raise
    except KeyboardInterrupt:
        text = "Interrupted. What is uploaded is kept: the same command continues."
        raise MergeInterrupted(text) from None
    except Exception as error:
        raise explained(error, api.endpoint, repo_id, token) from error
