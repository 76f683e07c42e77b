"""Interrupted, killed, out of disk, twice at once: what is there afterwards, and that running again repairs it."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from btx_merge import InputError, MergeError, MergeInterrupted, MergeRecipe, NonFiniteError, Options, merge
from tests.support import warm
from tests.support.common import Told, assert_complete, files_of, grow, save_seed

RECIPES = {
    "one file": {},
    "shards, blended experts": {"expert_mode": "blend", "max_shard_size": "4MB"},
    "another dtype, folded norms": {"dtype": "bfloat16", "fold_norms": True},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """7 MB a source: enough for jobs of several blocks, and for several jobs to be under way at once."""
    root = tmp_path_factory.mktemp("sources")
    seed = save_seed(root / "seed", hidden_size=256, intermediate_size=768, vocab_size=1500)
    return (
        seed,
        grow(seed, root / "code", random_seed=1),
        grow(seed, root / "math", random_seed=2, max_shard_size="2MB"),
    )


def recipe_of(sources: tuple[Path, ...], **options) -> MergeRecipe:
    seed, code, math = sources
    return MergeRecipe(str(seed), {"code": str(code), "math": str(math)}, **options)


@pytest.fixture(scope="module")
def uninterrupted(sources, tmp_path_factory) -> Callable[..., dict[str, bytes]]:
    """The files of a merge that nobody disturbed."""
    root = tmp_path_factory.mktemp("uninterrupted")
    done: dict[str, dict[str, bytes]] = {}

    def files(**options):
        key = json.dumps(options)
        if key not in done:
            merge(recipe_of(sources, **options), root / str(len(done)))
            done[key] = files_of(root / str(len(done)))
        return done[key]

    return files


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".btx-partial")


def assert_not_a_model(folder: Path) -> None:
    """It has no config. transformers 5.0 would take a default one, of 7 B parameters, and fail on the weights."""
    assert folder.is_dir()
    assert not (folder / "config.json").exists()
    if Version(transformers.__version__) >= Version("5.23"):
        with pytest.raises((OSError, ValueError), match=r"config\.json"):
            AutoModelForCausalLM.from_pretrained(folder)


def ctrl_c_after(nbytes: int) -> Callable[[int], None]:
    """A progress that presses Ctrl-C when so much is written, and then slows down until that has arrived."""
    total = 0

    def progress(count: int) -> None:
        nonlocal total
        before, total = total, total + count
        if before < nbytes <= total:
            os.kill(os.getpid(), signal.SIGINT)
        if total >= nbytes:
            time.sleep(0.05)

    return progress


def interrupted(recipe: MergeRecipe, out: Path, nbytes: int = 8_000_000) -> Path:
    """A merge that was stopped in the middle."""
    with pytest.raises(MergeInterrupted, match="continues"):
        merge(recipe, out, Options(workers=1), reporter=Told(bytes_done=ctrl_c_after(nbytes)))
    assert not out.exists()
    return partial(out)


# A process that kills itself with SIGKILL, when so many bytes are written and a while after, or in the moment before
# the n-th event of a kind (of those that Python reports to audit hooks) behind the last byte.
KILLED = """
import json, os, signal, sys, threading
from btx_merge import MergeRecipe, Options, Reporter, merge

recipe, out, nbytes, delay, event, number = json.loads(sys.argv[1])
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
total = seen = 0

class Watch(Reporter):
    def bytes_done(self, count):
        global total
        total += count
        if event is None and total >= nbytes:
            threading.Timer(delay, die).start() if delay else die()

def on_event(name, args):
    global seen
    if total >= nbytes and name == event:
        seen += 1
        if seen == number:
            die()

sys.addaudithook(on_event)
merge(MergeRecipe.from_dict(recipe), out, Options(workers=2, overwrite=True), Watch())
"""


def run_and_die(
    recipe: MergeRecipe, out: Path, nbytes: int, delay: float = 0, event: str | None = None, number: int = 1
) -> bool:
    """Whether the process was killed before it was done."""
    arguments = json.dumps([recipe.to_dict(), str(out), nbytes, delay, event, number])
    done = warm.run([sys.executable, "-c", KILLED, arguments])
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("number", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in range(1, 20))])
def test_killed_at_random_points_and_run_again(sources, uninterrupted, tmp_path, name, number):
    recipe, expected = recipe_of(sources, **RECIPES[name]), uninterrupted(**RECIPES[name])
    size = sum(len(content) for file, content in expected.items() if file.endswith(".safetensors"))
    rng = random.Random(f"{name} {number}")
    out = tmp_path / "out"
    for fraction in sorted(rng.uniform(0.02, 0.9) for _ in range(4)):
        killed = run_and_die(recipe, out, int(fraction * size), rng.uniform(0, 0.003))
        assert killed or fraction > 0.5
        if not killed:
            break
        assert not out.exists()
        assert_not_a_model(partial(out))
    if not out.exists():
        report = merge(recipe, out)
        assert report.kept_bytes > 0
    assert files_of(out) == expected
    assert not partial(out).exists()


@pytest.mark.parametrize(
    ("event", "number"),
    [("os.rename", 1), ("os.remove", 1), ("os.remove", 2), ("shutil.rmtree", 1), ("open", 9)],
)
def test_killed_while_finishing(sources, uninterrupted, tmp_path, event, number):
    """An old model lies there. At every moment it or the new one has the name, whole."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.safetensors").write_text("precious")
    recipe, expected = recipe_of(sources), uninterrupted()
    total = len(expected["model.safetensors"]) - 100_000  # less its header: when the last block is written
    assert run_and_die(recipe, out, total, event=event, number=number)
    assert files_of(out) == {"old.safetensors": b"precious"} or expected.items() <= files_of(out).items()
    merge(recipe, out, Options(overwrite=True))
    assert files_of(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# The command itself, which gets a signal when so many bytes are written or when a file is opened.
SIGNALLED = """
import os, sys, time
from btx_merge.__main__ import main
from btx_merge.cli.printing import Lines

number, nbytes, name = int(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)
total, sent = 0, False

def send():
    global sent
    if not sent:
        sent = True
        os.kill(os.getpid(), number)

def advance(self, count):
    global total
    total += count
    if total >= nbytes and not name:
        send()
        time.sleep(0.1)

def on_event(event, args):
    if event == "open" and name and str(args[0]).endswith(name):
        send()

Lines.bytes_done = advance
sys.addaudithook(on_event)
main()
"""


def signalled(number: int, sources: tuple[Path, ...], out: Path, *, nbytes: int = 0, opened: str = ""):
    seed, code, math = sources
    script = [sys.executable, "-c", SIGNALLED, str(int(number)), str(nbytes), opened]
    command = ["merge", "--seed", seed, "--expert", f"code={code}", "--expert", f"math={math}", "-o", out]
    return warm.run([*script, *command])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_one_line_and_what_is_finished(sources, uninterrupted, tmp_path, number):
    done = signalled(number, sources, tmp_path / "out", nbytes=8_000_000)
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr == ("error: Interrupted. Nothing is lost: the same command continues where this one stopped.\n")
    assert not (tmp_path / "out").exists()
    notes = []
    report = merge(recipe_of(sources), tmp_path / "out", reporter=Told(note=notes.append))
    assert files_of(tmp_path / "out") == uninterrupted()
    assert 4_000_000 < report.kept_bytes < 20_000_000
    assert len(notes) == 1
    assert re.match(r"Continuing: \d+\.\d\d MB were written before", notes[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("opened", ["seed/config.json", "README.md"])
def test_a_signal_while_reading_or_finishing_is_one_line_too(sources, uninterrupted, tmp_path, number, opened):
    """Before the first byte is written (the seed's config is opened), and behind the last (the model card is)."""
    done = signalled(number, sources, tmp_path / "out", opened=opened)
    assert done.returncode == 130, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: Interrupted.")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    merge(recipe_of(sources), tmp_path / "out")
    assert files_of(tmp_path / "out") == uninterrupted()


def test_what_is_finished_is_verified_before_it_is_kept(sources, uninterrupted, tmp_path):
    left = interrupted(recipe_of(sources), tmp_path / "whole")
    shutil.copytree(left, partial(tmp_path / "spoilt"))
    shutil.copytree(left, partial(tmp_path / "cut"))
    expected = uninterrupted()
    weights = partial(tmp_path / "spoilt") / "model.safetensors"
    content = bytearray(weights.read_bytes())
    place = 8 + int.from_bytes(content[:8], "little") + 12_345  # in the embedding, the first tensor
    assert content[place] == expected["model.safetensors"][place]
    content[place] ^= 1
    weights.write_bytes(content)
    os.truncate(partial(tmp_path / "cut") / "model.safetensors", 3_000_000)

    kept = {}
    for name in ("whole", "spoilt", "cut"):
        kept[name] = merge(recipe_of(sources), tmp_path / name).kept_bytes
        assert files_of(tmp_path / name) == expected
    embedding = 1500 * 256 * 4
    assert kept["spoilt"] == kept["whole"] - embedding
    assert embedding <= kept["cut"] < 3_000_000
    assert kept["whole"] > 4_000_000


def test_a_missing_shard_is_made_again(sources, uninterrupted, tmp_path):
    options = RECIPES["shards, blended experts"]
    left = interrupted(recipe_of(sources, **options), tmp_path / "out")
    shards = sorted(left.glob("model-*"))
    assert len(shards) > 3
    shards[0].unlink()
    assert merge(recipe_of(sources, **options), tmp_path / "out").kept_bytes > 0
    assert files_of(tmp_path / "out") == uninterrupted(**options)


@pytest.mark.parametrize("torn", [10, 1, 60])
def test_a_journal_with_a_torn_last_line(sources, uninterrupted, tmp_path, torn):
    """The process died while it wrote down that a part is finished. Twice: the next line must not suffer."""
    left = interrupted(recipe_of(sources), tmp_path / "out")
    [journal] = left.glob("*.jsonl")
    lines = journal.read_text().splitlines()
    os.truncate(journal, journal.stat().st_size - torn)
    left = interrupted(recipe_of(sources), tmp_path / "out", nbytes=14_000_000)
    finished = [json.loads(line)["job"] for line in lines[1:]]
    assert len(finished) > 3
    report = merge(recipe_of(sources), tmp_path / "out")
    assert report.kept_bytes > 8_000_000
    assert files_of(tmp_path / "out") == uninterrupted()


def test_progress_of_a_continued_merge_adds_up_too(sources, tmp_path):
    interrupted(recipe_of(sources), tmp_path / "out")
    moved = []
    plan = merge(recipe_of(sources), tmp_path / "out", reporter=Told(bytes_done=moved.append)).checked.plan
    assert sum(moved) == sum(tensor.nbytes for tensor in plan.tensors)


def test_a_changed_recipe_starts_over_and_says_so(sources, uninterrupted, tmp_path):
    interrupted(recipe_of(sources, max_shard_size="3MB"), tmp_path / "out")
    notes = []
    report = merge(recipe_of(sources, random_seed=1), tmp_path / "out", reporter=Told(note=notes.append))
    assert notes == ["Something unfinished of another recipe or of changed sources was there: starting over."]
    assert report.kept_bytes == 0
    assert files_of(tmp_path / "out") == uninterrupted(random_seed=1)


@pytest.mark.parametrize("changed", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_changed_source_starts_over_and_says_so(sources, tmp_path, changed):
    copies = tuple(shutil.copytree(folder, tmp_path / "sources" / folder.name) for folder in sources)
    interrupted(recipe_of(copies), tmp_path / "out")
    content = bytearray((copies[0] / changed).read_bytes())
    if changed == "model.safetensors":
        content[-3] ^= 1  # in the norm's last value
    else:
        content += b"\n"
    (copies[0] / changed).write_bytes(content)
    notes = []
    merge(recipe_of(copies), tmp_path / "out", reporter=Told(note=notes.append))
    assert notes == ["Something unfinished of another recipe or of changed sources was there: starting over."]
    merge(recipe_of(copies), tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_everything_is_on_the_disk_before_it_gets_the_name(sources, tmp_path, monkeypatch):
    """A power cut must not leave a folder with the target's name and empty files."""
    synced, later = set(), set()
    real = os.fsync

    def fsync(descriptor):
        (later if (tmp_path / "out").exists() else synced).add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    merge(recipe_of(sources, max_shard_size="4MB"), tmp_path / "out")
    files = list((tmp_path / "out").iterdir())
    assert len(files) > 12
    assert {file.stat().st_ino for file in [*files, tmp_path / "out"]} <= synced
    assert later == {tmp_path.stat().st_ino}  # the name itself


def test_an_untouched_merge_says_nothing(sources, uninterrupted, tmp_path):
    notes = []
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    merge(recipe_of(sources), tmp_path / "out", reporter=Told(note=notes.append))
    assert notes == []
    assert files_of(tmp_path / "out") == uninterrupted()


def test_overwrite_replaces_all_that_was_there(sources, uninterrupted, tmp_path):
    merge(recipe_of(sources, max_shard_size="3MB"), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*"))) > 5
    merge(recipe_of(sources), tmp_path / "out", Options(overwrite=True))
    assert files_of(tmp_path / "out") == uninterrupted()  # no shard of the old one
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_overwrite_that_fails_leaves_the_old_model(sources, tmp_path):
    def spoil(model):
        model.model.layers[1].mlp.down_proj.weight.data[7, 3] = float("inf")

    bad = grow(sources[0], tmp_path / "bad", change=spoil)
    merge(recipe_of(sources), tmp_path / "out")
    before = files_of(tmp_path / "out")
    recipe = MergeRecipe(str(sources[0]), {"bad": str(bad)})
    expected = r"bad: model.safetensors: model.layers.1.mlp.down_proj.weight holds inf at row 7, column 3"
    with pytest.raises(NonFiniteError, match=expected):
        merge(recipe, tmp_path / "out", Options(overwrite=True))
    assert files_of(tmp_path / "out") == before
    assert_not_a_model(partial(tmp_path / "out"))
    with pytest.raises(MergeInterrupted):
        merge(
            recipe_of(sources, random_seed=1),
            tmp_path / "out",
            Options(overwrite=True),
            reporter=Told(bytes_done=ctrl_c_after(5_000_000)),
        )
    assert files_of(tmp_path / "out") == before


def test_a_value_that_leaves_the_range_of_the_dtype(sources, tmp_path):
    def enlarge(model):
        model.model.layers[0].mlp.up_proj.weight.data[300, 77] = 70_000.0  # fp16 ends at 65504

    large = grow(sources[0], tmp_path / "large", change=enlarge)
    recipe = MergeRecipe(str(sources[0]), {"large": str(large)}, dtype="float16")
    with pytest.raises(NonFiniteError, match=r"model.layers.0.mlp.experts.gate_up_proj: .*range of F16.*--dtype"):
        merge(recipe, tmp_path / "out")
    merge(MergeRecipe(str(sources[0]), {"large": str(large)}, dtype="bfloat16"), tmp_path / "out")
    assert_complete(tmp_path / "out")


def test_the_disk_is_checked_first(sources, uninterrupted, tmp_path, monkeypatch):
    needed = sum(len(content) for name, content in uninterrupted().items() if name.endswith(".safetensors"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1_000_000))
    with pytest.raises(InputError, match=r"MB free; expected .* MB for the result.*Make room"):
        merge(recipe_of(sources), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed + 100_000))
    merge(recipe_of(sources), tmp_path / "out")
    assert files_of(tmp_path / "out") == uninterrupted()


def test_what_is_written_already_needs_no_room_again(sources, uninterrupted, tmp_path, monkeypatch):
    interrupted(recipe_of(sources), tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    merge(recipe_of(sources), tmp_path / "out")  # its room was reserved when it began
    assert files_of(tmp_path / "out") == uninterrupted()


def test_a_disk_that_fills_up_meanwhile(sources, uninterrupted, tmp_path, monkeypatch):
    """Another program took the room. Every way to write of a worker fails from then on."""
    calls = 0

    def failing(real):
        def write(*args, **kwargs):
            nonlocal calls
            if threading.current_thread() is not threading.main_thread():
                calls += 1
                if calls > 20:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return write

    with monkeypatch.context() as full:
        for name in ("write", "pwrite", "writev", "pwritev", "copy_file_range", "sendfile"):
            full.setattr(os, name, failing(getattr(os, name)))
        with pytest.raises(MergeError, match="No space left on device"):
            merge(recipe_of(sources), tmp_path / "out", Options(workers=1))
    assert calls == 21  # the first failure stops the merge
    assert not (tmp_path / "out").exists()
    report = merge(recipe_of(sources), tmp_path / "out")
    assert report.kept_bytes > 1_000_000
    assert files_of(tmp_path / "out") == uninterrupted()


@pytest.mark.parametrize("stage", ["reserving", "the small files"])
def test_a_disk_that_refuses_before_and_after_the_weights(sources, uninterrupted, tmp_path, monkeypatch, stage):
    """A file system without room for so large a file (as FAT has none), and one that is full at the very end."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as full:
        if stage == "reserving":
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))
        else:
            full.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        try:
            with pytest.raises(MergeError, match=r"File too large|No space left"):
                merge(recipe_of(sources), tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()
    merge(recipe_of(sources), tmp_path / "out")
    assert files_of(tmp_path / "out") == uninterrupted()


def test_an_output_that_somebody_fills_meanwhile(sources, uninterrupted, tmp_path):
    """Nothing of theirs is touched, and nothing of ours is lost."""

    def fill(nbytes):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "thesis.txt").write_text("years of work")

    with pytest.raises((InputError, MergeError), match=r"out"):
        merge(recipe_of(sources), tmp_path / "out", reporter=Told(bytes_done=fill))
    assert files_of(tmp_path / "out") == {"thesis.txt": b"years of work"}
    shutil.rmtree(tmp_path / "out")
    report = merge(recipe_of(sources), tmp_path / "out")
    assert report.kept_bytes == sum(tensor.nbytes for tensor in report.checked.plan.tensors)
    assert files_of(tmp_path / "out") == uninterrupted()


def test_two_merges_into_one_output_at_once(sources, uninterrupted, tmp_path):
    begun, go_on = threading.Event(), threading.Event()

    def wait(nbytes):
        begun.set()
        go_on.wait(30)

    recipe = recipe_of(sources)
    first = threading.Thread(target=lambda: merge(recipe, tmp_path / "out", reporter=Told(bytes_done=wait)))
    first.start()
    try:
        assert begun.wait(30)
        with pytest.raises(InputError, match="another merge is writing it now"):
            merge(recipe, tmp_path / "out")
    finally:
        go_on.set()
        first.join(60)
    assert files_of(tmp_path / "out") == uninterrupted()
    assert not partial(tmp_path / "out").exists()


def test_a_folder_of_somebody_else_with_the_name_is_not_deleted(sources, tmp_path):
    partial(tmp_path / "out").mkdir()
    (partial(tmp_path / "out") / "model.safetensors").write_text("not ours")
    for _ in range(2):
        with pytest.raises(InputError, match=r"holds files, but no unfinished merge.*Move it away"):
            merge(recipe_of(sources), tmp_path / "out")
        assert (partial(tmp_path / "out") / "model.safetensors").read_text() == "not ours"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_size_of_jobs_and_blocks_does_not_matter(sources, uninterrupted, tmp_path, monkeypatch, name):
    expected = uninterrupted(**RECIPES[name])
    monkeypatch.setattr("btx_merge.merging.mixture.JOB_BYTES", 100_000)
    monkeypatch.setattr("btx_merge.checkpoints.layout.BLOCK_BYTES", 7_000)
    merge(recipe_of(sources, **RECIPES[name]), tmp_path / "out", Options(workers=3))
    assert files_of(tmp_path / "out") == expected


# `python -O` takes out every `assert`. A job that nothing fills, or only in part, must fail all the same.
UNFILLED = """
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from btx_merge import MergeError
from btx_merge.checkpoints.copying import fill_copy
from btx_merge.checkpoints.layout import Extent, Job, Layout, lay_out
from btx_merge.checkpoints.staging import Staging
from btx_merge.files.changes import ReadFiles
from btx_merge.reporting import Reporter

assert False, "-O is not in effect"


class OneJob(Layout):
    @property
    def jobs(self):
        (tensor,) = self.tensors
        return (Job(tensor, (Extent(tensor.start, tensor.nbytes),), 0, 4),)


fills = {
    "nothing": lambda job: iter(()),
    "half": lambda job: iter([(0, np.zeros(job.nbytes // 2, np.uint8))]),
    "of another kind": fill_copy,
}
layout = OneJob(*lay_out([("weight", "F32", (4, 4))], 10**9))
with Staging(Path(sys.argv[1]), layout, fills[sys.argv[2]], ReadFiles([], {}), reporter=Reporter()) as staging:
    try:
        staging.write()
    except (MergeError, TypeError) as error:
        print("refused:", error, (staging.folder / "btx_journal.jsonl").read_text().count("weight@"))
"""


@pytest.mark.parametrize("fill", ["nothing", "half", "of another kind"])
def test_a_job_that_is_not_filled_is_never_done(tmp_path, fill):
    command = [sys.executable, "-O", "-c", UNFILLED, str(tmp_path / "out"), fill]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"refused: weight@\d+[: ].* 0\n", done.stdout), done.stdout
    assert not (tmp_path / "out").exists()
