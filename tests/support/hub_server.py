"""A small Hub in a process of its own (`hub_handler`): who may what there, what it was asked, what goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITER, READER, STRANGER = ("hf_" + letter * 34 for letter in "wrs")
USERS = {
    WRITER: {"name": "me", "orgs": ["org"], "write": True},
    READER: {"name": "reader", "orgs": ["org"], "write": False},
    STRANGER: {"name": "stranger", "orgs": [], "write": True},
}


class Hub:
    """Starts the server; `close` ends it."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        (root / "users.json").write_text(json.dumps(USERS))
        command = [sys.executable, str(Path(__file__).with_name("hub_handler.py")), str(root)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def add(self, repo_id: str, source: Path, ref: str = "main", **values: Any) -> str:
        """A commit with the folder's files, and a ref that points to it. Returns the commit."""
        commit = hashlib.sha1(f"{repo_id} {ref}".encode()).hexdigest()
        shutil.copytree(source, self.root / repo_id / commit)
        repo = self.repo(repo_id)
        self.configure(repo_id, refs={**repo["refs"], ref: commit}, **values)
        return commit

    def repo(self, repo_id: str) -> dict[str, Any]:
        file = self.root / repo_id / "repo.json"
        return json.loads(file.read_text()) if file.exists() else {"refs": {}, "gated": False}

    def folder(self, repo_id: str, ref: str = "main") -> Path:
        """The files that a ref points to."""
        return self.root / repo_id / str(self.repo(repo_id)["refs"][ref])

    def configure(self, repo_id: str, **values: Any) -> None:
        (self.root / repo_id / "repo.json").write_text(json.dumps({**self.repo(repo_id), **values}))

    def fail(self, request: str, what: str, times: int = -1, skip: int = 0) -> None:
        """Lets requests go wrong from now on; -1 means all.

        Args:
            request: a regular expression for `METHOD PATH`.
            what: a status (`500`), `cut` (the line, half-way), `stall` (half-way, for a minute), `lost` (the answer).
            skip: how many are to succeed before.
        """
        fault = {"request": request, "what": what, "times": times, "skip": skip}
        (self.root / "faults.json").write_text(json.dumps([fault]))

    def heal(self) -> None:
        (self.root / "faults.json").unlink(missing_ok=True)

    def requests(self, matching: Callable[[str], bool] = bool) -> list[str]:
        """What was asked for so far."""
        log = self.root / "requests.log"
        return [line for line in (log.read_text().splitlines() if log.exists() else []) if matching(line)]

    def environment(self, home: Path, **changes: str) -> dict[str, str]:
        """For a process that is to use this Hub and a cache of its own, and does not pause between its tries."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(Path(__file__).with_name("hurried")),
        }
        return {**kept, **own, **changes}
