"""What comes from a file, a path or a user is shown as it is: it can neither rewrite the terminal nor forge a line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from btx_merge.errors import InputError, Problem
from btx_merge.reporting import printable, short
from tests.cli.test_app import BTX, btx, errors_of, sources
from tests.conftest import Family
from tests.support import warm
from tests.support.common import edit_json, without_next

HOSTILE = "a\x1b[2J\x1b]0;owned\x07\u202e\nerror: a forged line\r\x9b31m\u2028\ud800[bold]:cat:"
SHOWN = r"a\x1b[2J\x1b]0;owned\x07\u202e\nerror: a forged line\r\x9b31m\u2028\ud800[bold]:cat:"


def test_a_problem_is_one_line_that_can_be_seen() -> None:
    problem = Problem(*[HOSTILE] * 5)
    assert str(problem) == f"{SHOWN}: {SHOWN}: {SHOWN}; expected {SHOWN}. {SHOWN}"
    assert str(InputError([problem, problem])).splitlines() == [str(problem)] * 2


@given(st.text(st.characters(), max_size=50))
def test_any_text_is_shown_on_one_line(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()
    assert str(Problem(text, text, text)).isprintable()


def test_long_texts_and_values_are_cut() -> None:
    assert len(printable("x" * 10**6)) < 4100
    assert short(10**5000) == "a whole number of 16610 bits"
    nested: object = "x"
    for _ in range(9):
        nested = [nested] * 9
    assert len(short(nested)) < 2000
    assert str(InputError([Problem("a", "b", "c")] * 5000)).splitlines()[-1] == "4,900 more problems"


def test_names_of_folders_are_no_markup(family: Family, tmp_path: Path) -> None:
    seed, out = tmp_path / "seed[bold red]:cat:\x1b[2Jx", tmp_path / "out[" / "x]\u202e"
    shutil.copytree(family.seed, seed)
    arguments = ["--seed", seed, "--expert", f"code={family.code}"]
    done = btx("check", *arguments, COLUMNS="300")
    assert done.returncode == 0
    assert r"seed[bold red]:cat:\x1b[2Jx" in done.stdout
    done = btx("merge", *arguments, "-o", out, COLUMNS="300")
    assert (done.returncode, without_next(done.stderr)) == (0, "")
    assert r"out[/x]\xe2\x80\xae" in done.stderr  # the bytes of it, as bash takes them
    assert rf"{tmp_path}/out[/x]\u202e: " in done.stdout
    done = btx("export", out, "-o", tmp_path / "export[/x]", COLUMNS="300", level="package")
    assert f"{tmp_path}/export[/x]: " in done.stdout


def test_a_tensor_forges_no_line(family: Family, tmp_path: Path) -> None:
    tensors = load_file(family.seed / "model.safetensors")
    shutil.copytree(family.seed, tmp_path / "odd")
    name = HOSTILE.replace("\ud800", "")
    save_file({**tensors, name: tensors["model.norm.weight"].clone()}, tmp_path / "odd/model.safetensors")
    done = btx("check", "--seed", family.seed, "--expert", f"odd={tmp_path / 'odd'}")
    (line,) = errors_of(done)
    assert SHOWN.replace(r"\ud800", "") in line
    done = btx("check", "--seed", family.seed, "--expert", f"odd={tmp_path / 'odd'}", "--json")
    assert json.loads(done.stdout)["problems"] == [line]


@pytest.mark.parametrize(("variables", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_on_a_terminal(family: Family, tmp_path: Path, variables: dict[str, str], is_coloured: bool) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(family.seed, twin)
    edit_json(twin / "config.json", max_position_embeddings=64)

    def stderr_of(*arguments: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
        environment |= {"TERM": "xterm-256color", "COLUMNS": "300", **variables}
        return warm.run_on_terminal([BTX, *arguments], env=environment).stderr

    refused = stderr_of("check", "--seed", str(tmp_path / "nowhere"), "--expert", "a=b/c/d")
    assert refused.startswith("\x1b[31merror:\x1b[0m seed: " if is_coloured else "error: seed: ")
    warned = stderr_of("check", "--seed", str(family.seed), "--expert", f"twin={twin}")
    assert warned.startswith("\x1b[33mwarning:\x1b[0m twin: " if is_coloured else "warning: twin: ")
    assert ("\x1b" in refused + warned) == is_coloured


def test_no_colours_in_a_pipe(family: Family, tmp_path: Path) -> None:
    done = btx("check", "--seed", tmp_path / "nowhere", "--expert", "a=b/c/d", TERM="xterm-256color")
    assert "\x1b" not in done.stderr
    assert btx("check", *sources(family)).stderr == ""


def test_a_stream_that_is_ascii_alone() -> None:
    done = btx("merge", "--print-recipe", "--seed", "org/n\u00f6", "--expert", "a=b", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"seed: org/n\xf6" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([f"--{HOSTILE}"], "No such option: --"),
        ([HOSTILE], "No such command '"),
        (["merge", f"--{HOSTILE}"], "No such option: --"),
        (["info", "model", HOSTILE], "Got unexpected extra argument"),
        (["merge", "--workers", HOSTILE], "Invalid value for '--workers': "),
    ],
)
def test_a_wrong_command_line(arguments: list[str], said: str) -> None:
    arguments = [argument.replace("\ud800", "") for argument in arguments]
    done = btx(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Error: {said}" in done.stderr
    assert all(line.isprintable() and not line.startswith("error: a forged") for line in done.stderr.split("\n"))
