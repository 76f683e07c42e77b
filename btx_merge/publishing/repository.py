"""The repository that a model is pushed to: looked at, created if need be, changed in one commit."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from btx_merge.errors import InputError, MergeError, Problem
from btx_merge.publishing.checks import Publishable
from btx_merge.publishing.errors import is_passing
from btx_merge.publishing.kinds import ADAPTER_CONFIG, Kind, kind_of

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling


_PAUSES = (1.0, 2.0, 4.0)  # seconds, before what failed in passing is tried again
_NEW_REPOSITORY = re.compile(r"\.gitattributes|README\.md|LICENSE", re.IGNORECASE)  # what one is created with
_T = TypeVar("_T")


@dataclass(frozen=True)
class Changes:
    """What a commit has to do, so that the repository holds the folder's model and nothing of another."""

    added: tuple[CommitOperationAdd, ...]
    deleted: tuple[str, ...]


class Target:
    """A repository, at the branch that is to be committed to."""

    def __init__(self, api: HfApi, repo_id: str, revision: str | None, create_pr: bool, private: bool):
        self.api, self.repo_id, self.revision = api, repo_id, revision
        self.create_pr, self.private = create_pr, private

    def send(self, checked: Publishable, message: str | None) -> tuple[Changes, str, str | None]:
        """Upload and commit what has changed; return the changes, the commit and the pull request's URL."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        head = self._prepared(checked.kind)
        operations = {
            name: CommitOperationAdd(path_in_repo=name, path_or_fileobj=checked.content(name))
            for name in checked.files
        }
        first = changes = _changes_of(operations, head, checked.kind)
        for operation in changes.added:
            if operation.path_in_repo.endswith(".safetensors"):
                self.api.preupload_lfs_files(
                    self.repo_id,
                    [operation],
                    revision=self.revision,
                    create_pr=self.create_pr,
                    free_memory=False,
                )
        for pause in (*_PAUSES, None):
            # an answer can be lost on its way though the commit was made, so each try looks at the repository again
            if not changes.added and not changes.deleted:  # nothing to do; or it is done, and the answer was lost
                return first, str(head.sha), None
            try:
                done = self.api.create_commit(
                    self.repo_id,
                    [*changes.added, *(CommitOperationDelete(path_in_repo=name) for name in changes.deleted)],
                    commit_message=message or f"Upload a model by btx-merge {version('btx-merge')}",
                    revision=self.revision,
                    create_pr=self.create_pr,
                    parent_commit=head.sha,
                )
            except Exception as error:
                if pause is None or self.create_pr or not is_passing(error):  # there might be two pull requests
                    raise
                time.sleep(pause)
                found, _ = self._find()
                if found is None:
                    text = f"{self.repo_id} has disappeared during the push. The same command creates it again."
                    raise MergeError(text) from error
                head = found
                changes = _changes_of(operations, head, checked.kind)
            else:
                return first, str(done.oid), done.pr_url
        raise AssertionError("the last try returns or raises")

    def _find(self) -> tuple[ModelInfo | None, bool]:
        """Return the repository as it is, and whether its branch is missing; then as main is."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        def info(revision: str | None) -> ModelInfo:
            return patiently(lambda: self.api.model_info(self.repo_id, revision=revision, files_metadata=True))

        try:
            return info(self.revision), False
        except RevisionNotFoundError:
            return info(None), True
        except RepositoryNotFoundError:
            return None, False

    def _prepared(self, kind: Kind) -> ModelInfo:
        """Create what is missing, and refuse a repository that a model should not be pushed to."""
        found, needs_branch = self._find()
        if found is None and not self.create_pr:
            private = self.private or None  # None: as the organisation has it
            patiently(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))
            found, needs_branch = self._find()
        if found is None:
            text = "there is no such repository to open a pull request on"
            if not self.create_pr:
                text = "it exists, but this token cannot see it"
            raise self._refusal(text, "", "Give another name, or a token that may read it.")
        if self.private and not found.private:
            remedy = "Leave out --private, give another name, or make it private in its settings first."
            raise self._refusal("the repository is public", "a private one, as --private says", remedy)
        self._check_content(found, kind)
        if needs_branch:
            branch = str(self.revision)
            if self.create_pr:
                raise self._refusal(f"there is no branch {branch}", "one, for a pull request", "Leave out --revision.")
            patiently(lambda: self.api.create_branch(self.repo_id, branch=branch, exist_ok=True))
        return found

    def _check_content(self, found: ModelInfo, kind: Kind) -> None:
        """Refuse to put a model in the place of what is no earlier one of its kind."""
        names = {sibling.rfilename for sibling in found.siblings or ()}
        if self.create_pr or all(_NEW_REPOSITORY.fullmatch(name) for name in names):
            return
        name: object = "adapter"
        card = ""
        with tempfile.TemporaryDirectory(prefix="btx-push-") as scratch:

            def text_of(file: str) -> str:
                path = self.api.hf_hub_download(self.repo_id, file, revision=found.sha, local_dir=scratch)
                return Path(path).read_text(encoding="utf-8", errors="replace")

            if ADAPTER_CONFIG not in names:
                try:
                    name = json.loads(text_of("config.json"))["model_type"] if "config.json" in names else None
                except (ValueError, KeyError, TypeError):
                    name = None
            if "README.md" in names:
                card = text_of("README.md")
        if kind_of(name, names, card) is not kind:
            text = f"the repository holds a model of type {name!r}" if name else "the repository holds something else"
            if name == "adapter":
                text = "the repository holds an adapter"
            elif name == kind.name:
                text += " that is not of btx-merge"
            remedy = "Give another name, or --create-pr to propose it there."
            raise self._refusal(text, f"none, or an empty one, or one with {kind.text}", remedy)

    def _refusal(self, found: str, expected: str, remedy: str) -> InputError:
        return InputError([Problem("push", self.repo_id, found, expected, remedy)])


def _changes_of(operations: Mapping[str, CommitOperationAdd], head: ModelInfo, kind: Kind) -> Changes:
    """Return what the repository as it is lacks, and what it has too much."""
    there = {sibling.rfilename: sibling for sibling in head.siblings or ()}
    added = [operation for name, operation in operations.items() if not _is_same(operation, there.get(name))]
    deleted = [name for name in there if kind.has(name) and name not in operations]
    return Changes(tuple(added), tuple(deleted))


def _is_same(operation: CommitOperationAdd, there: RepoSibling | None) -> bool:
    """Return whether the Hub has the file with these bytes. Hashes only what has the right size."""
    if there is None or there.size != operation.upload_info.size:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == operation.upload_info.sha256.hex()
    with operation.as_file() as file:
        content = file.read()
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git names it


def patiently(call: Callable[[], _T]) -> _T:
    """Try again what failed for a reason that may pass. (huggingface_hub does so itself while it uploads files.)"""
    for pause in _PAUSES:
        try:
            return call()
        except Exception as error:
            if not is_passing(error):
                raise
            time.sleep(pause)
    return call()
