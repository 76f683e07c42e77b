"""`export --format gguf`, with scripts in place of llama.cpp's converter; the real one is in test_engines.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from btx_merge import InputError, MergeError, MergeInterrupted, MergeRecipe, Options, Reporter, export, merge
from btx_merge.exporting.gguf import find_converter
from tests.checkpoints.test_staging import ctrl_c_after
from tests.cli.test_app import btx
from tests.support.common import Told, files_of, grow, problems_of, save_seed

WORKS = """
model, outfile, path, outtype, kind = sys.argv[1:]
assert (outfile, outtype) == ("--outfile", "--outtype")
config = json.loads((pathlib.Path(model) / "config.json").read_text())
print("converting", config["model_type"])
pathlib.Path(path).write_text(json.dumps({"name": pathlib.Path(model).name, "type": config["model_type"], "as": kind}))
"""
FAILS = 'print("first line"); pathlib.Path(sys.argv[3]).write_text("half"); sys.exit("\\x1b[2Jno room for it")'


def converter(folder: Path, code: str, name: str = "convert_hf_to_gguf.py") -> Path:
    """A folder with a script in place of the converter."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\nimport json, os, pathlib, signal, sys\n{code}")
    (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """An empty folder, beside which are no converters."""
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    seed = save_seed(folder / "seed")
    merge(MergeRecipe(str(seed), {"e": str(grow(seed, folder / "e"))}), folder / "merged")
    return folder / "merged"


def test_the_converter_that_is_named(merged: Path, room: Path, tmp_path: Path) -> None:
    llama_cpp = converter(tmp_path / "llama.cpp", WORKS)
    report = export(str(merged), room / "new" / "model.gguf", format="gguf", llama_cpp=llama_cpp)
    made = room / "new" / "model.gguf"
    assert json.loads(made.read_text()) == {"name": "merged", "type": "mixtral", "as": "f32"}
    assert (report.output, report.files, report.nbytes) == (made, ("model.gguf",), made.stat().st_size)
    assert files_of(room).keys() == {"new/model.gguf"}


def test_the_command_finds_it_on_path(merged: Path, room: Path, tmp_path: Path) -> None:
    folder = converter(tmp_path / "bin", WORKS)
    words = ["export", merged, "-o", room / "model.gguf", "--format", "gguf", "--json"]
    done = btx(*words, PATH=str(folder), LLAMA_CPP="", level="package")
    assert done.returncode == 0
    assert json.loads(done.stdout)["files"] == ["model.gguf"]


def test_which_converter_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_converter(None) == []
    package = converter(tmp_path / "bin", WORKS, "convert-hf-to-gguf") / "convert-hf-to-gguf"
    assert find_converter(None) == [str(package)]
    script = converter(tmp_path / "bin", WORKS) / "convert_hf_to_gguf.py"
    assert find_converter(None) == [str(script)]
    monkeypatch.setenv("LLAMA_CPP", str(converter(tmp_path / "own", WORKS)))
    assert find_converter(None) == [sys.executable, str(tmp_path / "own/convert_hf_to_gguf.py")]
    assert find_converter(converter(tmp_path / "named", WORKS))[1] == str(tmp_path / "named/convert_hf_to_gguf.py")
    assert find_converter(tmp_path) == []  # what is named is not replaced by another


def test_a_file_that_is_there(merged: Path, room: Path, tmp_path: Path) -> None:
    fails, works = converter(tmp_path / "fails", FAILS), converter(tmp_path / "works", WORKS)
    (room / "my.gguf").write_text("years of work")
    with pytest.raises(InputError, match=r"my\.gguf: there already; expected a new file\. Give another --output, or "):
        export(str(merged), room / "my.gguf", format="gguf", llama_cpp=works)
    with pytest.raises(MergeError):
        export(str(merged), room / "my.gguf", Options(overwrite=True), format="gguf", llama_cpp=fails)
    assert files_of(room) == {"my.gguf": b"years of work"}
    export(str(merged), room / "my.gguf", Options(overwrite=True), format="gguf", llama_cpp=works)
    assert b"mixtral" in files_of(room)["my.gguf"]


def test_without_a_converter_the_commands_are_given(merged: Path, room: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    commands = (
        f"Give llama.cpp's folder by --llama-cpp, or run: btx export {merged} {room}/my-mixtral && python "
        f"LLAMA_CPP_FOLDER/convert_hf_to_gguf.py {room}/my-mixtral --outfile {room}/my.gguf --outtype f32"
    )
    for llama_cpp, found in (
        (None, "--format gguf: no convert_hf_to_gguf.py on PATH; expected llama.cpp's converter"),
        (tmp_path, f"--llama-cpp: no convert_hf_to_gguf.py in {tmp_path}; expected llama.cpp's folder"),
    ):
        lines = problems_of(export, str(merged), room / "my.gguf", format="gguf", llama_cpp=llama_cpp)
        assert lines == [f"command: {found}. {commands}"]
        assert list(room.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (FAILS, "ended with status 1. Its last lines: first line | \\x1b[2Jno room for it"),
        ("print('done')", "wrote no file. Its last lines: done"),
        ("os.kill(os.getpid(), 9)", "ended with status -9. Its last lines: "),
    ],
)
def test_a_converter_that_fails(merged: Path, room: Path, tmp_path: Path, code: str, reason: str) -> None:
    llama_cpp = converter(tmp_path / "llama.cpp", code)
    with pytest.raises(MergeError) as caught:
        export(str(merged), room / "model.gguf", format="gguf", llama_cpp=llama_cpp)
    assert str(caught.value).startswith(f"llama.cpp's converter, {sys.executable} {llama_cpp}/convert_hf_to_gguf.py ")
    assert str(caught.value).endswith(f"/result.gguf --outtype f32, {reason}")
    assert list(room.iterdir()) == []


def test_interrupted(merged: Path, room: Path, tmp_path: Path) -> None:
    """While the Mixtral is written, and while the converter runs."""
    calls = converter(tmp_path / "llama.cpp", "os.kill(os.getppid(), signal.SIGINT); __import__('time').sleep(30)")
    for reporter in (Told(bytes_done=ctrl_c_after(100_000)), Reporter()):
        with pytest.raises(MergeInterrupted, match=r"Nothing of it is kept: the same command begins anew\."):
            export(str(merged), room / "my.gguf", Options(workers=1), reporter, format="gguf", llama_cpp=calls)
        assert list(room.iterdir()) == []


def test_places_where_no_file_can_be(merged: Path, room: Path, tmp_path: Path) -> None:
    llama_cpp = converter(tmp_path / "llama.cpp", WORKS)
    (room / "file").touch()
    for output, found in (
        (room, "a folder; expected a file"),
        (room / "file" / "my.gguf", "a file; expected a folder"),
    ):
        with pytest.raises(InputError, match=found):
            export(str(merged), output, Options(overwrite=True), format="gguf", llama_cpp=llama_cpp)
    if os.getuid():
        room.chmod(0o500)
        with pytest.raises(MergeError, match="Permission denied"):
            export(str(merged), room / "my.gguf", format="gguf", llama_cpp=llama_cpp)
