"""How a result gets its name, what is refused before it, and what helps where a disk refuses."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from btx_merge import (
    DomainText,
    FitRecipe,
    InputError,
    MergeError,
    MergeRecipe,
    Options,
    TrainRecipe,
    export,
    extract,
    fit,
    merge,
    train,
)
from btx_merge.cli.app import app
from btx_merge.editing.recipe import EditRecipe
from btx_merge.editing.run import edit
from btx_merge.files import placing
from btx_merge.files.disk_errors import disk_error, remedy_of
from btx_merge.files.scratch import scratch_folder
from tests.support import warm
from tests.support.common import Told, files_of, grow, save_seed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    seed = save_seed(root / "seed")
    for number, name in enumerate(("code", "math"), 1):
        grow(seed, root / name, random_seed=number)
    merge(recipe_of(root), root / "btx")
    return root


@pytest.fixture
def sources(saved, tmp_path):
    """Copies that a test may change."""
    return shutil.copytree(saved, tmp_path / "sources")


def recipe_of(root: Path, **options) -> MergeRecipe:
    return MergeRecipe(str(root / "seed"), {name: str(root / name) for name in ("code", "math")}, **options)


def old_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "old.safetensors").write_text("precious")
    return folder


# It dies before or after the exchange, or looks whether the output is there at every event that Python reports.
WATCHED = """
import os, signal, sys
from btx_merge.files import placing
from btx_merge import MergeRecipe, Options, merge

root, out, moment = sys.argv[1:]
exchange = placing._exchange

def dying(one, other):
    if moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    exchanged = exchange(one, other)
    assert exchanged
    if moment == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return exchanged

def look(event, args):
    try:
        os.lstat(out)
    except FileNotFoundError:
        print("absent at", event, flush=True)

placing._exchange = dying
sys.addaudithook(look)
merge(MergeRecipe(f"{root}/seed", {"code": f"{root}/code", "math": f"{root}/math"}), out, Options(overwrite=True))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux exchanges two folders")
@pytest.mark.parametrize("moment", ["before", "after", "never"])
def test_the_output_is_never_absent_while_it_is_replaced(saved, tmp_path, moment):
    out = old_model(tmp_path / "out")
    done = warm.run([sys.executable, "-c", WATCHED, saved, out, moment])
    assert (done.returncode, done.stdout) == (0 if moment == "never" else -signal.SIGKILL, ""), done.stderr
    if moment == "before":
        assert files_of(out) == {"old.safetensors": b"precious"}
    else:
        assert files_of(saved / "btx").items() <= files_of(out).items()
    merge(recipe_of(saved), out, Options(overwrite=True))
    assert files_of(out) == files_of(saved / "btx")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_nothing_can_be_exchanged_the_next_run_brings_the_old_model_back(saved, tmp_path, monkeypatch):
    out = old_model(tmp_path / "out")
    monkeypatch.setattr(placing, "_exchange", lambda one, other: False)
    merge(recipe_of(saved), out, Options(overwrite=True))
    assert files_of(out) == files_of(saved / "btx")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    out.rename(placing.old_of(out))  # as a run leaves it that is killed between its two renames
    with pytest.raises(InputError, match=r"was there until a run was ended.*out\.btx-old.*--overwrite"):
        merge(recipe_of(saved), out)
    notes: list[str] = []
    merge(recipe_of(saved), out, Options(overwrite=True), reporter=Told(note=notes.append))
    assert len(notes) == 1
    assert "is back" in notes[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_name_that_the_disk_does_not_store_is_no_reason_to_repeat(saved, tmp_path, monkeypatch, can_exchange):
    out, real = old_model(tmp_path / "out"), os.fsync

    def fsync(descriptor):
        if os.fstat(descriptor).st_ino == tmp_path.stat().st_ino:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if not can_exchange:
        monkeypatch.setattr(placing, "_exchange", lambda one, other: False)
    with pytest.raises(MergeError) as caught:
        merge(recipe_of(saved), out, Options(overwrite=True))
    assert re.search(r"complete and in its place.*What it replaced is .*out\.btx-old\.$", str(caught.value))
    assert not re.search("again|continues|same command|finishes", str(caught.value))
    assert files_of(out) == files_of(saved / "btx")
    assert files_of(placing.old_of(out)) == {"old.safetensors": b"precious"}

    monkeypatch.setattr(os, "fsync", real)
    merge(recipe_of(saved), out, Options(overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_next_run_names_and_clears_what_was_replaced(saved, tmp_path):
    out = shutil.copytree(saved / "btx", tmp_path / "out")
    old_model(placing.old_of(out))
    notes: list[str] = []
    merge(recipe_of(saved), out, Options(overwrite=True), reporter=Told(note=notes.append))
    assert notes == [f"Removed {out}.btx-old, which an earlier run replaced before it was ended."]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_cleared_is_a_note_and_no_failure(saved, tmp_path, monkeypatch):
    out = old_model(tmp_path / "out")
    real = shutil.rmtree

    def refusing(folder, *args, **options):
        if Path(folder).name.endswith(".btx-old"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(folder))
        real(folder, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", refusing)
    notes: list[str] = []
    merge(recipe_of(saved), out, Options(overwrite=True), reporter=Told(note=notes.append))
    assert len(notes) == 1
    assert "out.btx-old could not be removed" in notes[0]
    assert files_of(out) == files_of(saved / "btx")


@pytest.mark.parametrize("changed", ["code/model.safetensors", "seed/config.json", "seed/tokenizer.json"])
def test_a_source_that_changes_while_it_is_merged_is_refused(sources, tmp_path, changed):
    out = old_model(tmp_path / "out")

    def change(nbytes: int) -> None:
        os.utime(sources / changed, ns=(1, 1))

    with pytest.raises(InputError, match=rf"{changed}: changed while it was read"):
        merge(recipe_of(sources), out, Options(overwrite=True), reporter=Told(bytes_done=change))
    assert files_of(out) == {"old.safetensors": b"precious"}
    merge(recipe_of(sources), out, Options(overwrite=True))
    assert files_of(out) == files_of(sources / "btx")


def edited(model: Path, out: Path, change: Callable[[], None]) -> None:
    edit(EditRecipe(str(model), drop=("math",)), out, reporter=Told(bytes_done=lambda nbytes: change()))


def exported(model: Path, out: Path, change: Callable[[], None]) -> None:
    export(str(model), out, reporter=Told(bytes_done=lambda nbytes: change()))


def extracted(model: Path, out: Path, change: Callable[[], None]) -> None:
    extract(str(model), "code", out, reporter=Told(bytes_done=lambda nbytes: change()))


def fitted(model: Path, out: Path, change: Callable[[], None]) -> None:
    recipe = FitRecipe(str(model), method="prompts", prompts={"code": ["w1 w2"], "math": ["w3 w4"]})
    fit(recipe, out, reporter=Told(layer_done=lambda done, layers: change()))


def trained(model: Path, out: Path, change: Callable[[], None]) -> None:
    (out.parent / "text.txt").write_text("w1 w2 w3 w4 " * 200)
    arguments = {"max_steps": 1, "logging_steps": 1, "use_cpu": True, "report_to": "none"}
    data = (DomainText("text", (str(out.parent / "text.txt"),)),)
    recipe = TrainRecipe(str(model), data, train="routers", max_length=16, holdout=0, arguments=arguments)
    train(recipe, out, reporter=Told(line=lambda line: change()))


@pytest.mark.parametrize("how", ["touched", "rewritten", "removed"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "btx_recipe.yaml"])
@pytest.mark.parametrize("verb", [edited, exported, extracted, fitted, pytest.param(trained, marks=pytest.mark.slow)])
def test_a_model_that_changes_while_it_is_used_is_refused(sources, tmp_path, verb, name, how):
    file, out = sources / "btx" / name, tmp_path / "out"

    def change() -> None:
        if how == "touched":
            os.utime(file, ns=(1, 1))
        elif how == "removed":
            file.unlink(missing_ok=True)
        elif file.stat().st_mtime_ns != 1:
            changed = file.with_name("changed")  # a whole file in its place, as a download puts it there
            changed.write_bytes(file.read_bytes()[:-1] + b" ")
            changed.rename(file)

    with pytest.raises(InputError, match=rf"{name}: changed while it was read") as caught:
        verb(sources / "btx", out, change)
    assert len(caught.value.problems) == 1
    assert not out.exists()
    assert not placing.partial_of(out).exists()


def test_a_model_that_changes_while_it_is_trained_is_refused(sources, tmp_path):
    file = sources / "btx" / "model.safetensors"
    with pytest.raises(InputError, match=r"model\.safetensors: changed while it was read"):
        trained(sources / "btx", tmp_path / "out", lambda: os.utime(file, ns=(1, 1)))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def unfinished(saved, tmp_path, monkeypatch):
    """What a merge into `out` leaves when the disk is full after its first jobs."""
    written = []

    def fill_the_disk(nbytes: int) -> None:
        written.append(nbytes)
        if len(written) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(MergeError, match="No space left"):
        merge(recipe_of(saved), tmp_path / "out", Options(workers=1), reporter=Told(bytes_done=fill_the_disk))
    return placing.partial_of(tmp_path / "out")


def link_to(path: Path, other: Path, kind: str) -> None:
    """Put something in the place of an entry that leads elsewhere, or that no result holds."""
    if path.exists():
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "hard link":
        os.link(other, path)
    else:
        path.symlink_to({"link": other, "dangling": other.with_name("new"), "folder": other.parent}[kind])


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "hard link", "pipe"])
@pytest.mark.parametrize("name", ["btx_journal.jsonl", "btx_lock", "model.safetensors", "config.json", "btx_files"])
def test_unfinished_work_that_leads_elsewhere_is_not_written(saved, unfinished, tmp_path, name, kind):
    """As in an unpacked archive: a link would let the result be written over somebody's file."""
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "elsewhere" / "precious"
    other.write_bytes((unfinished / name).read_bytes() if name == "btx_journal.jsonl" else b"years of work")
    before = files_of(tmp_path / "elsewhere")
    link_to(unfinished / name, other, kind)
    expected = {"hard link": "a hard link", "pipe": "neither a file nor a folder"}.get(kind, "a link to")
    with pytest.raises(InputError, match=rf"btx-partial/{name}: {expected}.*Remove .*begins anew") as caught:
        merge(recipe_of(saved), tmp_path / "out")
    assert len(caught.value.problems) == 1
    assert files_of(tmp_path / "elsewhere") == before
    shutil.rmtree(unfinished)
    merge(recipe_of(saved), tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(saved / "btx")


@pytest.mark.parametrize("verb", ["merge", "edit", "export", "fit"])
def test_unfinished_work_that_is_a_link_is_not_written(saved, unfinished, tmp_path, verb):
    elsewhere = unfinished.rename(tmp_path / "elsewhere")
    unfinished.symlink_to(elsewhere)
    (elsewhere / "dangling").symlink_to("nowhere")
    before = files_of(elsewhere)
    model, out = str(saved / "btx"), tmp_path / "out"
    calls = {
        "merge": lambda: merge(recipe_of(saved), out),
        "edit": lambda: edit(EditRecipe(model, drop=("math",)), out),
        "export": lambda: export(model, out),
        "fit": lambda: fit(FitRecipe(model, method="prompts", prompts={"code": ["w1"], "math": ["w2"]}), out),
    }
    with pytest.raises(InputError, match=r"out\.btx-partial: a link to .*Remove the link"):
        calls[verb]()
    assert files_of(elsewhere) == before


@pytest.mark.parametrize("name", ["lock", "run.json", "checkpoint-1", "."])
def test_an_unfinished_training_that_leads_elsewhere_is_not_written(saved, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("years of work")
    work = tmp_path / "out.btx-training"
    if name == ".":
        work.symlink_to("elsewhere")
    else:
        work.mkdir()
        (work / "run.json").write_text("{}")
        link_to(work / name, tmp_path / "elsewhere" / "precious", "folder" if name == "checkpoint-1" else "link")
    with pytest.raises(InputError, match=r"out\.btx-training.*: a link to .*Remove"):
        trained(saved / "btx", tmp_path / "out", lambda: None)
    assert files_of(tmp_path / "elsewhere") == {"precious": b"years of work"}
    assert not (tmp_path / "out").exists()


def test_what_was_replaced_may_hold_links_but_be_none(saved, tmp_path):
    out = old_model(tmp_path / "out")
    (out / "link").symlink_to(tmp_path / "sources")
    merge(recipe_of(saved), out, Options(overwrite=True))
    placing.old_of(out).symlink_to(saved)
    with pytest.raises(InputError, match=r"out\.btx-old: a link to"):
        merge(recipe_of(saved), out, Options(overwrite=True))
    assert (saved / "seed" / "config.json").exists()


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"plan": ' * 50_000, b"\xff", b"", b'{"plan": {}}', b"1" * 10_000]
)
def test_a_journal_that_cannot_be_read_is_begun_anew(saved, unfinished, tmp_path, content):
    (unfinished / placing.JOURNAL).write_bytes(content)
    notes: list[str] = []
    report = merge(recipe_of(saved), tmp_path / "out", reporter=Told(note=notes.append))
    assert report.kept_bytes == 0
    assert len(notes) == 1
    assert "starting over" in notes[0]
    assert files_of(tmp_path / "out") == files_of(saved / "btx")


def test_a_line_of_the_journal_that_cannot_be_read_is_passed_over(saved, unfinished, tmp_path):
    with (unfinished / placing.JOURNAL).open("ab") as journal:
        journal.write(b"[" * 100_000 + b"\n" + b'{"job": [], "crc32": 1}\n')
    assert merge(recipe_of(saved), tmp_path / "out").kept_bytes > 0
    assert files_of(tmp_path / "out") == files_of(saved / "btx")


def test_a_small_file_of_which_a_part_was_written_is_written_again(saved, unfinished, tmp_path):
    """A run that is killed while it copies the model's code leaves a part of it, which still looks like code."""
    whole = files_of(saved / "btx")
    for name in ("routing_btx.py", "tokenizer.json", "config.json", "README.md"):
        (unfinished / name).write_bytes(whole[name][: len(whole[name]) // 2])
    merge(recipe_of(saved), tmp_path / "out")
    assert files_of(tmp_path / "out") == whole


def test_a_journal_without_end_is_not_read(saved, unfinished, tmp_path):
    os.truncate(unfinished / placing.JOURNAL, 1 << 40)  # takes no room: there is nothing in it
    merge(recipe_of(saved), tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(saved / "btx")


def test_a_leftover_folder_whose_lock_is_a_link_is_left_alone(saved, tmp_path):
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / "btx-scratch-x").mkdir()
    (tmp_path / "btx-scratch-x" / "in-use.lock").symlink_to(tmp_path / "precious")
    with scratch_folder(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "years of work"


def test_a_scratch_folder_that_cannot_be_removed_is_no_error(tmp_path, monkeypatch):
    """What was made in it is in its place by then; the next run removes the folder."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken, scratch_folder(tmp_path) as folder:
        (folder / "made").write_text("a large file")
        broken.setattr(os, "rmdir", refused)
        broken.setattr(os, "unlink", refused)
    assert list(tmp_path.iterdir())
    with scratch_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_mount_point_is_refused_before_anything_is_written(saved, tmp_path, monkeypatch):
    out = tmp_path / "disk"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(out))
    with pytest.raises(InputError, match=r"a mount point.*Give a folder in it"):
        merge(recipe_of(saved), out, Options(overwrite=True))
    assert [path.name for path in tmp_path.rglob("*")] == ["disk"]


def test_a_file_system_without_renames_or_locks_is_refused_before_anything_is_written(saved, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    for owner, name, expected in (
        (Path, "rename", "a folder cannot be renamed there"),
        (placing.fcntl, "flock", "cannot be locked"),
    ):
        with monkeypatch.context() as poor:
            poor.setattr(owner, name, refuse)
            with pytest.raises(InputError, match=rf"{expected}.*Write to a local disk"):
                merge(recipe_of(saved), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "expected", "continues"),
    [
        (errno.ENOSPC, "Make room.", True),
        (errno.EDQUOT, "quota", True),
        (errno.EIO, "Check the disk.", True),
        (errno.EROFS, "another disk", False),
        (errno.EACCES, "permission", False),
        (errno.EPERM, "permission", False),
        (errno.EXDEV, "Write to a local disk", False),
        (errno.ENOSYS, "Write to a local disk", False),
        (errno.EOPNOTSUPP, "Write to a local disk", False),
        (errno.ENAMETOOLONG, "shorter name", False),
        (errno.EBUSY, "another --output", False),
        (errno.EFBIG, "--max-shard-size", False),
    ],
)
def test_the_remedy_fits_the_cause(code, expected, continues):
    """Where the same command must fail again, nobody is told to repeat it."""
    remedy = remedy_of(OSError(code, os.strerror(code)))
    assert expected in remedy
    assert ("the same command continues" in remedy) == continues


def test_of_two_files_the_one_that_is_written_is_named():
    error = OSError(errno.ENOSPC, "No space left on device", "read", None, "written")
    assert isinstance(disk_error(error, Path("out")), MergeError)
    assert str(disk_error(error, Path("out"))).startswith("written: No space left on device. Make room.")


PRESSED = """
import os, signal, sys
def press(event, args):
    if event in ("import", "open") and str(args[0]).endswith({started!r}):
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(press)
sys.argv = {words}
import runpy
runpy.run_module("btx_merge", run_name="__main__")
"""


CHECK = ["btx", "check", "--seed", "nowhere", "--expert", "a=nowhere"]


@pytest.mark.parametrize("started", ["btx_merge.cli.app", "typer", "numpy", "yaml", "btx_merge.checkpoints.stored"])
def test_ctrl_c_while_the_command_is_imported_is_one_line(started):
    script = PRESSED.format(started=started, words=CHECK)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "error: Interrupted.\n"


def test_ctrl_c_while_the_arguments_are_read_is_one_line():
    """Not of a command yet: typer would end without a word."""
    script = PRESSED.format(started="METADATA", words=["btx", "--version"])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: Interrupted.\n")


def test_ctrl_c_stays_ignored_where_it_was():
    """As of a command that a shell script starts in the background."""
    script = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + PRESSED.format(
        started="typer", words=CHECK
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2  # of the seed that is not there
    assert "Interrupted" not in done.stderr


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_result_takes_the_place_of_a_home_or_of_the_folder_of_the_command(saved, tmp_path, monkeypatch, overwrite):
    """`-o ~ --overwrite` would remove all that somebody has. Both folders are this test's own here."""
    home, here = tmp_path / "users" / "me", tmp_path / "work" / "here"
    for folder in (home, here):
        folder.mkdir(parents=True)
        (folder / "thesis.txt").write_text("years of work")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    before = files_of(tmp_path)
    options = Options(overwrite=overwrite)
    for output, found in (
        (home, "is your home folder"),
        (home.parent, "holds your home folder"),
        (here, "is the folder"),
    ):
        with pytest.raises(InputError, match=found):
            merge(recipe_of(saved), output, options)
        with pytest.raises(InputError, match=found):
            export(str(saved / "btx"), output, options)
    with pytest.raises(InputError, match="holds your home folder"):
        placing.check_target(Path("/"), overwrite)
    assert files_of(tmp_path) == before
    merge(recipe_of(saved), here / "out", options)


def test_an_output_that_no_path_can_be_made_of(saved, tmp_path, monkeypatch):
    """A home of nobody ended in a traceback, and so did links in a circle."""
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    runner, before = CliRunner(), os.listdir(tmp_path)
    model, text = str(saved / "btx"), f"code={tmp_path / 'no.jsonl'}"
    for words in (
        ["merge", "--seed", str(saved / "seed"), "--expert", f"code={saved / 'seed'}"],
        ["fit", model, "--domain-text", text],
        ["train", model, "--data", text, "--max-steps", "1"],
        ["branch", str(saved / "seed"), "--data", text, "--max-steps", "1"],
        ["edit", model, "--drop", "code"],
        ["export", model],
        ["extract", model, "code"],
        ["routing", model, "--data", text],
        ["eval", model, "--data", text],
    ):
        for output in ("~nobody-of-this-name/out", "circle"):
            done = runner.invoke(app, [*words, "-o", output])
            assert done.exit_code in (1, 2), (words, output, done.exception)
            assert isinstance(done.exception, SystemExit), (words, output, done.exception)
            assert done.stderr.startswith("error: "), (words, output, done.stderr)
    assert os.listdir(tmp_path) == before
