"""A small Hub, a script: enough of its protocol for downloads and pushes. All that it has is files.

ROOT/users.json                {TOKEN: {"name": ..., "orgs": [...], "write": true}}
ROOT/org/name/repo.json        {"refs": {"main": COMMIT}, "gated": false, "private": false, "hidden": false}
ROOT/org/name/COMMIT/...       the files of a commit
ROOT/lfs/SHA256                uploaded large files
ROOT/faults.json               what goes wrong on purpose, see `hub_server.Hub.fail`
ROOT/requests.log              what was asked for, a line each: METHOD PATH STATUS [RANGE]
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LICENCES = ("apache-2.0", "mit", "llama3.2", "other")
_lock = threading.RLock()


class Refused(Exception):
    """An answer of the Hub that is no success."""

    def __init__(self, status: int, code: str = "", message: str = "", body: Any = None):
        self.status, self.body = status, json.dumps(body if body is not None else {"error": message}).encode()
        self.headers = {"X-Error-Code": code} if code else {}
        self.headers |= {"X-Error-Message": message} if message else {}


class Cut(Exception):
    """The line is cut, and there is no answer."""


class Handler(BaseHTTPRequestHandler):
    """Requests as the Hub answers them."""

    protocol_version = "HTTP/1.1"
    root: Path

    def _handle(self) -> None:
        path = urlsplit(self.path).path
        parts = [unquote(part) for part in path.strip("/").split("/")]
        self.fault = self._next_fault(f"{self.command} {path}")
        try:
            length = int(self.headers.get("Content-Length") or 0)
            if self.fault in ("cut", "stall") and self.command in ("PUT", "POST"):
                self.rfile.read(length // 2)
                if self.fault == "stall":
                    self._log("stalled")
                    time.sleep(60)
                raise Cut
            body = self.rfile.read(length)
            if self.fault.isdigit():
                raise Refused(int(self.fault), message="This went wrong on purpose")
            with _lock:
                self._route(parts, body)
        except Refused as refused:
            self._answer(refused.status, refused.body, refused.headers)
        except Cut:
            self._log("cut")
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = _handle  # noqa: N815

    def _route(self, parts: list[str], body: bytes) -> None:
        verb = "GET" if self.command == "HEAD" else self.command
        if verb == "GET" and parts[:2] == ["api", "models"]:
            self._about("/".join(parts[2:4]), *parts[4:6])
        elif verb == "GET" and "resolve" in parts[2:3]:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        elif verb == "PUT" and parts[0] == "lfs":
            if hashlib.sha256(body).hexdigest() != parts[1]:
                raise Refused(400, message="not the content that was announced")
            (self.root / "lfs").mkdir(exist_ok=True)
            (self.root / "lfs" / parts[1]).write_bytes(body)
            self._answer(200, b"")
        elif verb == "POST" and parts == ["api", "validate-yaml"]:
            self._validate(json.loads(body)["content"])
        elif verb == "POST" and parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif verb == "POST" and parts[2:] == ["info", "lfs", "objects", "batch"]:
            self._batch(f"{parts[0]}/{parts[1].removesuffix('.git')}", json.loads(body))
        elif verb == "POST" and parts == ["lfs", "verify"]:
            self._json({}) if (self.root / "lfs" / json.loads(body)["oid"]).exists() else self._json({}, 404)
        elif verb == "POST" and parts[:2] == ["api", "models"] and len(parts) == 6:
            repo_id, kind, revision = "/".join(parts[2:4]), parts[4], parts[5]
            {"preupload": self._preupload, "branch": self._branch, "commit": self._commit}[kind](
                repo_id, revision, body
            )
        else:
            raise Refused(404, message="No such page")

    # Who may what

    @property
    def _user(self) -> dict[str, Any] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        users = json.loads((self.root / "users.json").read_text())
        if token and token not in users:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return users.get(token)

    def _is_of(self, repo_id: str, user: dict[str, Any] | None) -> bool:
        return user is not None and repo_id.split("/")[0] in (user["name"], *user["orgs"])

    def _repository(self, repo_id: str, revision: str, write: bool = False) -> tuple[dict[str, Any], str, Path]:
        folder, user = self.root / repo_id, self._user
        repo = json.loads((folder / "repo.json").read_text()) if (folder / "repo.json").exists() else None
        if repo is None or repo.get("hidden") or (repo.get("private") and not self._is_of(repo_id, user)):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not (self._is_of(repo_id, user) and user and user["write"]):
            raise Refused(401 if user is None else 403, message="You have no write access to this repository")
        commit = repo["refs"].get(revision, revision)
        if not (folder / commit).is_dir():
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit, folder / commit

    # Reading

    def _about(self, repo_id: str, kind: str = "revision", revision: str = "main") -> None:
        repo, commit, folder = self._repository(repo_id, revision)
        files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if kind == "tree":
            self._json(
                [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": etag(file)}
                    for name, file in files.items()
                ]
            )
            return
        siblings = []
        for name, file in files.items():
            sibling: dict[str, Any] = {"rfilename": name, "size": file.stat().st_size, "blobId": git_hash(file)}
            if is_large(name):
                sibling["lfs"] = {"sha256": etag(file), "size": file.stat().st_size, "pointerSize": 100}
            siblings.append(sibling)
        about = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
        self._json({**about, "gated": repo["gated"], "private": repo.get("private", False)})

    def _file(self, repo_id: str, revision: str, name: str) -> None:
        repo, commit, folder = self._repository(repo_id, revision)
        if repo["gated"] and not self._is_of(repo_id, self._user):
            raise Refused(403, "GatedRepo", f"Access to model {repo_id} is restricted")
        file = folder / name
        if not file.is_file():
            raise Refused(404, "EntryNotFound", "Entry not found")
        content, headers = file.read_bytes(), {"ETag": f'"{etag(file)}"', "X-Repo-Commit": commit}
        begin, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        first, last = int(begin), int(end or len(content) - 1)
        if self.headers.get("Range"):
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._answer(206 if "Range" in self.headers else 200, content[first : last + 1], headers)

    # Writing

    def _validate(self, text: str) -> None:
        match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        licence = (yaml.safe_load(match[1]) if match else {}).get("license", "mit")
        if licence not in LICENCES:
            raise Refused(400, body={"errors": [{"message": f'"license" must be one of {list(LICENCES)}'}]})
        self._json({"errors": [], "warnings": []})

    def _create(self, asked: dict[str, Any]) -> None:
        user = self._user
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        repo_id = f"{asked['organization'] or user['name']}/{asked['name']}"
        if not (self._is_of(repo_id, user) and user["write"]):
            raise Refused(403, message=f"You don't have the rights to create a model under the namespace {repo_id}")
        folder = self.root / repo_id
        if folder.exists():
            raise Refused(409, message="You already created this model repo", body={"url": f"{self._url}/{repo_id}"})
        first = "0" * 40
        (folder / first).mkdir(parents=True)
        (folder / first / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = {"refs": {"main": first}, "gated": False, "private": private}
        (folder / "repo.json").write_text(json.dumps(repo))
        self._json({"url": f"{self._url}/{repo_id}"})

    def _branch(self, repo_id: str, branch: str, body: bytes) -> None:
        repo, commit, _ = self._repository(repo_id, json.loads(body).get("startingPoint") or "main", write=True)
        if branch in repo["refs"]:
            raise Refused(409, message="Reference already exists")
        if not re.fullmatch(r"[\w./-]+", branch):
            raise Refused(400, message=f"Invalid reference name: {branch}")
        repo["refs"][branch] = commit
        (self.root / repo_id / "repo.json").write_text(json.dumps(repo))
        self._json({})

    def _preupload(self, repo_id: str, revision: str, body: bytes) -> None:
        _, _, folder = self._repository(repo_id, revision, write="create_pr" not in self.path)
        answers = []
        for asked in json.loads(body)["files"]:
            name, mode = asked["path"], "lfs" if is_large(asked["path"]) else "regular"
            oid = etag(folder / name) if (folder / name).exists() else None
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def _batch(self, repo_id: str, asked: dict[str, Any]) -> None:
        self._repository(repo_id, "main")
        answers = []
        for item in asked["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if not (self.root / "lfs" / item["oid"]).exists():
                upload, verify = f"{self._url}/lfs/{item['oid']}", f"{self._url}/lfs/verify"
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            answers.append(answer)
        self._json({"transfer": "basic", "objects": answers})

    def _commit(self, repo_id: str, revision: str, body: bytes) -> None:
        as_pull_request = "create_pr=1" in self.path
        repo, parent, folder = self._repository(repo_id, revision, write=not as_pull_request)
        header, *lines = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit", parent) != parent:
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        commit = uuid.uuid4().hex + "0" * 8
        new = self.root / repo_id / commit
        shutil.copytree(folder, new)
        for line in lines:
            value, file = line["value"], new / line["value"]["path"]
            file.parent.mkdir(exist_ok=True)
            if line["key"] == "file":
                file.write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                shutil.copyfile(self.root / "lfs" / value["oid"], file)
            else:
                file.unlink()
        number = sum(ref.startswith("refs/pr/") for ref in repo["refs"]) + 1
        repo["refs"][f"refs/pr/{number}" if as_pull_request else revision] = commit
        repo["messages"] = {**repo.get("messages", {}), commit: header["value"]["summary"]}
        (self.root / repo_id / "repo.json").write_text(json.dumps(repo))
        page = f"{self._url}/{repo_id}"
        answer = {"commitOid": commit, "commitUrl": f"{page}/commit/{commit}"}
        self._json({**answer, "pullRequestUrl": f"{page}/discussions/{number}" if as_pull_request else None})

    # Answering

    @property
    def _url(self) -> str:
        return f"http://{self.headers['Host']}"

    def _next_fault(self, request: str) -> str:
        """What is to go wrong with this request; nothing for an empty string."""
        with _lock:
            file = self.root / "faults.json"
            faults = json.loads(file.read_text()) if file.exists() else []
            for fault in faults:
                if not re.search(fault["request"], request) or fault["times"] == 0:
                    continue
                passes = fault["skip"] > 0
                fault["skip" if passes else "times"] -= 1
                file.write_text(json.dumps(faults))
                return "" if passes else str(fault["what"])
        return ""

    def _json(self, answer: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        if self.fault == "lost":
            raise Cut  # all was done, but nobody will know
        self._log(str(status))
        self.send_response(status)
        for key, value in {**(headers or {}), "Accept-Ranges": "bytes", "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        cut = self.fault == "cut"
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    def _log(self, status: str) -> None:
        line = " ".join([self.command, urlsplit(self.path).path, status, self.headers.get("Range", "")]).strip()
        with (self.root / "requests.log").open("a") as log:
            log.write(line + "\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def git_hash(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if is_large(file.name) else git_hash(file)


if __name__ == "__main__":
    Handler.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
