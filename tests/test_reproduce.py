"""The study of examples/reproduce.py: what it computes, what it and the demos do once, and all of it in small."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from btx_merge.finetuning.work_folder import COMPLETE, work_folder

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DOMAINS = ("english", "code", "math", "german")


@pytest.fixture(scope="module")
def modules():
    """The modules of the study, imported as its script does."""
    before = dict(os.environ)
    sys.path.insert(0, str(EXAMPLES))
    try:
        import reproduce_tables
        import reproduce_texts
        import steps

        yield steps, reproduce_tables, reproduce_texts
    finally:
        sys.path.remove(str(EXAMPLES))
        os.environ.clear()
        os.environ.update(before)


def save_wheel(file: Path, messages: dict[str, str]) -> Path:
    """Save a catalog of translations as pretix has it."""
    header = {"": "Content-Type: text/plain; charset=UTF-8\n"}
    items = sorted((header | messages).items())
    keys, values = ([text.encode() for text in texts] for texts in zip(*items, strict=True))
    tables = 28 + 16 * len(items)  # behind the header of the format and its two tables
    places, blob = [], b""
    for text in (*keys, *values):
        places += [len(text), tables + len(blob)]
        blob += text + b"\0"
    numbers = (0x950412DE, 0, len(items), 28, 28 + 8 * len(items), 0, tables)
    with zipfile.ZipFile(file, "w") as archive:
        catalog = struct.pack(f"<7I{len(places)}I", *numbers, *places) + blob
        archive.writestr("pretix/locale/de/LC_MESSAGES/django.mo", catalog)
    return file


def row(name: str, run: int, *bits: float) -> dict:
    values = dict(zip(DOMAINS, bits, strict=True))
    return {"name": name, "table": "main", "run": run, "bits_per_byte": values, "tokens": 2e6, "flops": 3e12} | {
        "cpu_seconds": 4.0
    }


def test_the_gap_is_closed_as_far_as_computed_by_hand(modules):
    _, tables, _ = modules
    rows = [
        row("seed", 0, 2.0, 4.0, 3.0, 5.0),
        row("code", 0, 2.5, 3.0, 3.5, 6.0),
        row("math", 0, 2.5, 4.5, 2.0, 6.0),
        row("german", 0, 2.5, 4.5, 3.5, 5.5),  # no better than the seed: of this domain there is no gap
        row("BTX", 0, 2.1, 3.5, 2.75, 5.1),
        *(row(name, 1, 2.0, 4.0, 3.0, 5.0) for name in ("seed", "german")),
        *(row(name, 1, 2.0, 3.0, 2.0, 5.0) for name in ("code", "math")),
        row("BTX", 1, 2.3, 3.0, 2.25, 5.2),
    ]
    assert tables.gap_closed(rows[4], rows) == pytest.approx((0.5 + 0.25) / 2)
    table = tables.table_of(rows, "main")
    (line,) = [line for line in table.splitlines() if line.startswith("| BTX ")]
    means = "2.200 ± 0.141 | 3.250 ± 0.354 | 2.500 ± 0.354 | 5.150 ± 0.071 | 3.275 ± 0.124"
    assert line == f"| BTX | {means} | 62 ± 35 % | 2.00 M | 3.0 T | 4 | 2 |"


def test_claims_are_judged_run_by_run(modules):
    _, tables, _ = modules
    rows = [row("BTX Top-2", run, *[bits] * 4) for run, bits in enumerate((2.0, 2.1, 2.6))]
    rows += [row("dense", run, *[bits] * 4) for run, bits in enumerate((2.2, 2.5, 2.5))]
    rows.append(row("blend", 1, *[2.2] * 4))  # an ablation of one run
    lines = tables.claims_table(rows).splitlines()
    (dense,) = [line for line in lines if "one dense model" in line]
    assert dense.endswith("| +0.1667 ± 0.2517 | 2 of 3 |")
    (blend,) = [line for line in lines if "blended" in line]
    assert blend.endswith("| +0.1000 | 1 of 1 |")
    assert not [line for line in lines if "Switch" in line]  # neither was measured


def test_the_pages_show_every_table_of_the_study(modules):
    _, tables, _ = modules
    docs = EXAMPLES.parent / "docs"
    figures = json.loads((docs / "reproduction.json").read_text(encoding="utf-8"))
    pages = [page.read_text(encoding="utf-8") for page in (docs / "reproduction.md", docs.parent / "README.md")]
    marks = re.findall("<!-- table: (.+?) -->", "".join(pages))
    assert sorted(marks) == sorted(tables.blocks(figures))
    measured = {found["name"] for found in figures["rows"]}
    assert {name for claim in tables.CLAIMS for name in (claim.better, claim.worse)} <= measured


def test_a_step_is_done_once_and_again_when_what_it_reads_has_changed(modules, tmp_path):
    steps_module, _, _ = modules
    done = []

    def build(steps, name: str, what: object, *reads: str) -> Path:
        output = steps.folder / name

        def make() -> None:
            output.mkdir(exist_ok=True)
            done.append(name)

        return steps.step(output, what, make, reads)

    words = [f"code={tmp_path / 'seed' / 'config.json'}"]
    for what in (1, 1, 2):
        steps = steps_module.Steps(tmp_path)
        build(steps, "seed", what)
        build(steps, "branches/code", "the same", *words)
    assert done == ["seed", "branches/code"] * 2
    build(steps_module.Steps(tmp_path, "another wheel"), "seed", 2)
    assert done[4:] == ["seed"]
    assert steps.cost([tmp_path / "seed"]).seconds >= 0
    assert set(json.loads((tmp_path / "steps.json").read_text())) == {"seed", "branches/code"}
    with pytest.raises(ZeroDivisionError):
        steps.step(tmp_path / "seed", 3, lambda: 1 / 0)
    build(steps_module.Steps(tmp_path), "seed", 2)  # what failed may have left the folder in pieces
    assert done[5:] == ["seed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["branches", "seed", "steps.json"]


def test_only_the_training_that_was_begun_is_gone_on_with(modules, tmp_path, monkeypatch):
    steps_module, _, _ = modules
    ran = []
    model, is_killed = tmp_path / "model", True

    def app(words, standalone_mode):
        ran.append(words)
        checkpoint = work_folder(model) / "checkpoint-5"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / COMPLETE).touch()
        if is_killed:
            raise KeyboardInterrupt
        model.mkdir(exist_ok=True)
        shutil.rmtree(work_folder(model))

    monkeypatch.setattr(steps_module, "app", app)
    for word in ("--one", "--another"):
        with pytest.raises(KeyboardInterrupt):
            steps_module.Steps(tmp_path).btx(model, "train", word)
    is_killed = False
    for _ in range(2):
        steps_module.Steps(tmp_path).btx(model, "train", "--another")
    line = ["-o", str(model), "--overwrite"]
    expected = [["train", "--one", *line], ["train", "--another", *line], ["train", "--another", *line, "--resume"]]
    assert ran == expected


def test_a_demo_shows_every_command_and_the_study_those_that_run(modules, tmp_path, monkeypatch, capsys):
    steps_module, _, _ = modules
    from reproduce_run import Study

    output = tmp_path / "model"
    said = []

    def app(words, standalone_mode):
        output.mkdir(exist_ok=True)
        said.append(words[-1])

    monkeypatch.setattr(steps_module, "app", app)
    for steps in (steps_module.Steps, steps_module.Steps, Study, Study):
        if steps is Study and "--quiet" not in said:
            shutil.rmtree(output)
        steps(tmp_path).btx(output, "info")
    command = f"$ btx info -o {output}"
    shown = [line for line in capsys.readouterr().out.splitlines() if line]
    assert shown == [command, "0 s", command, "finished by an earlier run", command]
    assert said == ["--overwrite", "--quiet"]


def test_german_comes_in_documents_of_neighbours(modules, tmp_path):
    _, _, texts = modules
    messages = {
        f"Message {number:03}": f"Dies ist die Nachricht {number:03}, und sie ist lang." for number in range(90)
    }
    messages |= {"Link": 'Ein <a href="x">Verweis</a>, der nicht vorkommen darf', "Short": "Zu kurz"}
    documents = [read() for _, read in texts.german_files(save_wheel(tmp_path / "pretix.whl", messages))]
    assert [document.count("Nachricht") for document in documents] == [40, 40, 10]
    assert documents[0].startswith("Dies ist die Nachricht 000, und sie ist lang.\n\nDies ist die Nachricht 001")
    assert not any("<a" in document or "kurz" in document for document in documents)


@pytest.mark.slow
def test_the_whole_study_in_small_goes_on_after_a_kill(tmp_path):
    """Some fifty commands of btx, with one seed and a few steps each; German that is made up, not downloaded."""
    random.seed(0)
    words = ["".join(random.choices("abcdefghijklmnoprstuwäöü", k=random.randint(3, 9))) for _ in range(500)]
    messages = {f"{number:05}": " ".join(random.choices(words, k=12)).capitalize() + "." for number in range(4000)}
    wheel = save_wheel(tmp_path / "pretix-1.whl", messages)
    command = [sys.executable, str(EXAMPLES / "reproduce.py"), "--quick", "--wheel", str(wheel)]
    command += ["--folder", str(tmp_path / "study")]
    interrupted = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    record = tmp_path / "study" / "0" / "steps.json"
    while interrupted.poll() is None and not (record.exists() and len(json.loads(record.read_text())) > 4):
        time.sleep(0.2)
    os.killpg(interrupted.pid, signal.SIGKILL)
    interrupted.communicate()
    kept = json.loads(record.read_text())
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    finished = json.loads(record.read_text())
    assert {name: finished[name] for name in kept} == kept  # not done again
    figures = json.loads((tmp_path / "study" / "figures.json").read_text())
    names = [row["name"] for row in figures["rows"]]
    assert len(names) == len(set(names)) > 25
    for found in figures["rows"]:
        assert all(0 < bits < 20 for bits in found["bits_per_byte"].values())
        assert (found["flops"] > 0) == (found["tokens"] > 0)
    assert set(figures["throughput"]) == {"two branches side by side", "one model on two ranks"}
    (routing,) = figures["routing"]
    assert "BTX Top-2, no balancing" in routing
