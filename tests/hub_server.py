"""A small Hub: enough of its protocol for downloads, in a process of its own. Files come from a folder.

ROOT/org/name/repo.json        {"refs": {"main": COMMIT}, "gated": false, "faults": {"FILE": "403" or "cut"}}
ROOT/org/name/COMMIT/...       the files of a commit
ROOT/requests.log              what was asked for, a line each: METHOD PATH STATUS
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Refused(Exception):
    """An answer of the Hub that is no success."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message} if code else {}


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD as the Hub answers them."""

    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        try:
            if parts[:2] == ["api", "models"]:
                self._about("/".join(parts[2:4]), *parts[4:6])
            elif "resolve" in parts[2:3]:
                self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                raise Refused(404)
        except Refused as refused:
            self._answer(refused.status, b"", refused.headers)

    do_HEAD = do_GET  # noqa: N815

    def _repository(self, repo_id: str, revision: str) -> tuple[dict[str, Any], str, Path]:
        folder = self.root / repo_id
        if not (folder / "repo.json").exists():
            raise Refused(401, "RepoNotFound", "Repository not found")  # as for somebody who has not logged in
        repo = json.loads((folder / "repo.json").read_text())
        commit = repo["refs"].get(revision, revision)
        if not (folder / commit).is_dir():
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit, folder / commit

    def _about(self, repo_id: str, kind: str = "revision", revision: str = "main") -> None:
        repo, commit, folder = self._repository(repo_id, revision)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [str(file.relative_to(folder)) for file in files]
        if kind == "tree":
            answer: Any = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(file)}
                for name, file in zip(names, files, strict=True)
            ]
        else:
            siblings = [{"rfilename": name} for name in names]
            answer = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "gated": repo["gated"]}
        self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, repo_id: str, revision: str, name: str) -> None:
        repo, commit, folder = self._repository(repo_id, revision)
        if repo["gated"]:
            raise Refused(403, "GatedRepo", f"Access to model {repo_id} is restricted")
        file, fault = folder / name, repo["faults"].get(name)
        if not file.is_file():
            raise Refused(404, "EntryNotFound", "Entry not found")
        if fault == "403":
            raise Refused(403, message="This repository has been blocked")
        content, headers = file.read_bytes(), {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": commit}
        begin, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        first, last = int(begin), int(end or len(content) - 1)
        if self.headers.get("Range"):
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._answer(206 if "Range" in self.headers else 200, content[first : last + 1], headers, fault == "cut")

    def _answer(self, status: int, content: bytes, headers: dict[str, str], cut: bool = False) -> None:
        with (self.root / "requests.log").open("a") as log:
            log.write(f"{self.command} {urlsplit(self.path).path} {status}\n")
        self.send_response(status)
        for key, value in {**headers, "Accept-Ranges": "bytes", "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


class Hub:
    """The server as a test sees it."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, str(root)]
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
        return json.loads(file.read_text()) if file.exists() else {"refs": {}, "gated": False, "faults": {}}

    def configure(self, repo_id: str, **values: Any) -> None:
        (self.root / repo_id / "repo.json").write_text(json.dumps({**self.repo(repo_id), **values}))

    def requests(self, matching: Callable[[str], bool] = bool) -> list[str]:
        """What was asked for so far."""
        log = self.root / "requests.log"
        return [line for line in (log.read_text().splitlines() if log.exists() else []) if matching(line)]

    def environment(self, home: Path, **changes: str) -> dict[str, str]:
        """For a process that is to use this Hub and a cache of its own."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return {**kept, **own, **changes}


if __name__ == "__main__":
    Handler.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
