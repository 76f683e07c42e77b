"""Processes of their own that need not import torch first: forks of one that has.

An import of torch and transformers takes longer than most of what a test asks of a process. So the first test that
starts one starts a server, too, which imports what is always imported and forks itself for each process that is
wanted. The fork has its own arguments, environment, working folder and files, and ends as the process would. One
server is common to all workers of a test run; it ends with the last of them.

BTX_TESTS_COLD=1 in the environment, or a system without pidfd, and each process is started from nothing.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

BTX = Path(sys.executable).with_name("btx")
KEPT = ("HF_", "TRANSFORMERS_")
"""So begin environment variables that are read while transformers is imported."""
CODE_CACHE = "HF_MODULES_CACHE"
"""But this one of them may differ: it is set in the one module that reads it."""
COMMAND = [
    *("btx_merge.__main__", "btx_merge.cli.app", "btx_merge.cli.display", "btx_merge.merging.run"),
    *("btx_merge.exporting.run", "btx_merge.model.info"),
    *(["pydantic.type_adapter", "pydantic.types"] if find_spec("pydantic") else []),  # which newer typers import
]
LEVELS = {
    "python": ["numpy", "rich.console", "typer", "yaml"],
    "command": COMMAND,
    "torch": ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.export"],
    "transformers": [
        "transformers.models.llama.modeling_llama",
        "transformers.models.mixtral.modeling_mixtral",
        "transformers.trainer",
        "peft",
    ],
    "package": [*COMMAND, "btx_merge.modeling", "btx_merge.finetuning.run", "matplotlib.figure"],
}
"""What the processes of a level find imported, beside what those of the level before it do."""
BEFORE = {"command": "python", "torch": "python", "transformers": "torch", "package": "transformers"}
Command = Sequence[Any]
_connections: dict[str, socket.socket] = {}
_folder: list[Path] = []


def use_folder(folder: Path) -> None:
    """Name the folder, common to all workers, in which the servers are found."""
    _folder[:] = [folder]


# What tests call


class Process:
    """A started process, with as much of subprocess.Popen as the tests use."""

    def __init__(
        self, command: Command, level: str, cwd: Path | None, env: Mapping[str, str] | None, files: list[int]
    ):
        request = {
            "command": [str(word) for word in command],
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
        }
        self.returncode: int | None = None
        self._connection = _connect(level)
        socket.send_fds(self._connection, [json.dumps(request).encode() + b"\n"], files)
        self._answers = self._connection.makefile("r")
        self.pid = int(self._answers.readline())

    def wait(self, timeout: float = 120) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = os.waitstatus_to_exitcode(int(self._answers.readline()))
            except TimeoutError:
                os.kill(self.pid, signal.SIGKILL)
                raise
            self._connection.close()
        return self.returncode


def run(
    command: Command,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    level: str = "command",
) -> subprocess.CompletedProcess[str]:
    """Run `btx ...`, `python -c ...` or `python -m ...` to its end, with its output as text.

    Args:
        level: what the process finds imported, one of LEVELS: of large packages none that it would not import itself.
    """
    if is_cold() or "PYTHONIOENCODING" in (env or {}):  # which is read when Python starts
        return subprocess.run(
            list(map(str, command)), cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True
        )
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, open(os.devnull) as nothing:
        process = Process(command, level, cwd, env, [nothing.fileno(), out.fileno(), err.fileno()])
        code = process.wait(timeout)
        return subprocess.CompletedProcess(list(command), code, _read(out), _read(err))


@contextmanager
def started(
    command: Command, *, env: Mapping[str, str] | None = None, level: str = "command"
) -> Iterator[tuple[Process | subprocess.Popen[str], IO[str]]]:
    """Start a process, and give it with what it writes to stderr."""
    if is_cold():
        run = subprocess.Popen(list(map(str, command)), env=env, stderr=subprocess.PIPE, text=True)
        assert run.stderr is not None
        with run:
            yield run, run.stderr
        return
    read, write = os.pipe()
    with open(os.devnull, "r+") as nothing, os.fdopen(read) as stderr:
        process = Process(command, level, None, env, [nothing.fileno(), nothing.fileno(), write])
        os.close(write)
        yield process, stderr


def run_on_terminal(
    command: Command, *, env: Mapping[str, str] | None = None, level: str = "command"
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with a pseudo-terminal as its stderr, and return what it wrote there, too."""
    leader, follower = os.openpty()
    with tempfile.TemporaryFile("w+") as out, open(os.devnull) as nothing:
        process: Process | subprocess.Popen[str]
        if is_cold():
            words = list(map(str, command))
            process = subprocess.Popen(words, stdin=nothing, stdout=out, stderr=follower, env=env, text=True)
        else:
            process = Process(command, level, None, env, [nothing.fileno(), out.fileno(), follower])
        os.close(follower)
        written = b""
        with suppress(OSError):  # the end, on Linux
            while part := os.read(leader, 100_000):
                written += part
        os.close(leader)
        code = process.wait(120)
        return subprocess.CompletedProcess(list(command), code, _read(out), written.decode())


def torchrun(level: str | None, *words: Any) -> list[str]:
    """Return the command that starts `python WORDS` twice by torchrun, each as a fork of the level's server if any."""
    local = ["--nproc_per_node=2", "--local_addr=127.0.0.1", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    start = [sys.executable, "-m", "torch.distributed.run", *local]
    if is_cold() or level is None:
        return [*start, *map(str, words)]
    _connect(level)  # starts the server
    return [*start, "--no_python", *_forwarding(level), sys.executable, *map(str, words)]


def command_in(folder: Path, level: str) -> Path:
    """Put a command `btx` into a folder, for the path of a script: what it does, a fork of a level's server does."""
    command = folder / "btx"
    if is_cold():
        command.symlink_to(BTX)
    else:
        _connect(level)  # starts the server
        words = shlex.join([*_forwarding(level), str(BTX)])
        command.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        command.chmod(0o755)
    return command


def _forwarding(level: str) -> list[str]:
    return [sys.executable, str(Path(__file__)), str(_folder[0]), level]


def _forward(folder: str, level: str, *command: str) -> int:
    """Be a process that has a server's fork do its work, with its own environment and files."""
    use_folder(Path(folder))
    process = Process(command, level, None, None, [0, 1, 2])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(process.pid, number))
    code = process.wait(600)
    if code < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return code


def is_cold() -> bool:
    return bool(os.environ.get("BTX_TESTS_COLD")) or not hasattr(os, "pidfd_open")


def _read(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()


def _connect(level: str) -> socket.socket:
    """Return a new connection to a level's server, which is started if there is none yet."""
    file = str(_folder[0] / level)
    if level not in _connections:  # one is kept: a server ends when nobody is connected any longer
        with FileLock(f"{file}.lock"):
            try:
                _connections[level] = _dial(file)
            except OSError:
                _start(level)
                _connections[level] = _dial(file)
    return _dial(file)


def _dial(file: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(file)
    return connection


def _start(level: str) -> None:
    """Start a level's server, as a fork of the one before it."""
    file = _folder[0] / level
    file.unlink(missing_ok=True)
    command = [sys.executable, "-c", f"from tests.support.warm import serve\nserve({str(file)!r}, {level!r})"]
    root = Path(__file__).parents[2]
    with open(f"{file}.log", "w") as log, open(os.devnull) as nothing:
        if level in BEFORE:
            env = {**os.environ, "PYTHONPATH": str(root)}
            Process(command, BEFORE[level], root, env, [nothing.fileno(), log.fileno(), log.fileno()])
        else:
            subprocess.Popen(command, cwd=root, stdin=nothing, stdout=log, stderr=log, start_new_session=True)
    end = time.monotonic() + 120
    while not file.exists():
        said = Path(f"{file}.log").read_text()
        assert "Error" not in said, said
        assert time.monotonic() < end, said
        time.sleep(0.02)


# The server


def serve(file: str, level: str) -> None:
    """Fork a process for each request until nobody is connected any longer."""
    for module in LEVELS[level]:
        importlib.import_module(module)
    if level not in ("transformers", "package"):
        assert "huggingface_hub" not in sys.modules  # it would not see a process's environment
    assert threading.active_count() == 1  # a fork has no other threads
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{file}.new")
    listener.listen(64)
    os.rename(f"{file}.new", file)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ, None)
    connected = 0
    first = time.monotonic()
    while connected or time.monotonic() < first + 60:
        for key, _ in waiting.select(timeout=10):
            if key.fileobj is listener:
                connection, _ = listener.accept()
                waiting.register(connection, selectors.EVENT_READ, None)
                connected += 1
            elif key.data is None:
                connection = key.fileobj
                pid = _answer(connection)
                waiting.unregister(connection)
                if pid is None:
                    connection.close()
                    connected -= 1
                else:
                    waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
            else:
                waiting.unregister(key.fileobj)
                os.close(key.fileobj)
                pid, connection = key.data
                _tell(connection, os.waitpid(pid, 0)[1])
                connection.close()
                connected -= 1
    os.unlink(file)


def _tell(connection: socket.socket, number: int) -> None:
    with suppress(OSError):  # who asked is gone
        connection.sendall(f"{number}\n".encode())


def _answer(connection: socket.socket) -> int | None:
    """Return the process that was asked for, or None where the connection has ended."""
    text, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    if not text:
        return None
    connection.setblocking(True)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 20)
    pid = os.fork()
    if pid == 0:
        _become(json.loads(text), files)
    for number in files:
        os.close(number)
    _tell(connection, pid)
    return pid


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Be the process that was asked for, to its end."""
    code = 1
    try:
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.closerange(3, 4096)
        os.setsid()
        if "transformers" in sys.modules:
            _use_environment(request["env"])
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        code = _exit_code(request["command"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _use_environment(wanted: dict[str, str]) -> None:
    """Use what transformers read of the environment before this process was asked for."""
    for name in {*wanted, *os.environ} - {CODE_CACHE}:
        same = wanted.get(name) == os.environ.get(name)
        assert same or not name.startswith(KEPT), f"{name} differs: ask for the level torch"
    if CODE_CACHE in wanted:
        sys.modules["transformers.dynamic_module_utils"].HF_MODULES_CACHE = wanted[CODE_CACHE]


def _exit_code(command: list[str]) -> int:
    """Run a command as Python would, and return its exit status."""
    try:
        try:
            _execute(command)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
            raise
        except BaseException:
            traceback.print_exc()
            code = 1
        threading._shutdown()
        atexit._run_exitfuncs()
        return code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _execute(command: list[str]) -> None:
    program, *words = command
    for number, folder in enumerate(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))):
        sys.path.insert(number + 1, folder)
        if (Path(folder) / "sitecustomize.py").exists():
            runpy.run_path(str(Path(folder) / "sitecustomize.py"), run_name="sitecustomize")
    while words[:1] == ["-W"]:
        warnings._setoption(words[1])
        del words[:2]
    if program == str(BTX):
        sys.path[0], sys.argv = str(BTX.parent), command
        from btx_merge.__main__ import main

        main()
    elif words[0] == "-c":
        sys.path[0], sys.argv = "", ["-c", *words[2:]]
        main_module = type(sys)("__main__")
        sys.modules["__main__"] = main_module
        exec(compile(words[1], "<string>", "exec"), main_module.__dict__)
    else:
        assert words[0] == "-m", command
        sys.path[0], sys.argv = "", ["-m", *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.exit(_forward(*sys.argv[1:]))
