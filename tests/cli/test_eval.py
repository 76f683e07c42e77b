"""`btx eval`: tables for a person, JSON for a program, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

from btx_merge import MergeRecipe, merge
from btx_merge.cli.display import print_evaluation
from btx_merge.cli.printing import Lines
from btx_merge.evaluation.report import BTM, MODEL, EvalReport, Row, Score
from btx_merge.measuring.windows import Amount
from tests.cli.test_app import btx, errors_of
from tests.conftest import Family


def test_an_evaluation(family: Family, texts: dict[str, str], tmp_path: Path) -> None:
    merged = family.seed.parent / "evaluated-by-command"
    merge(MergeRecipe(str(family.seed), family.experts), merged)
    data = [part for name, text in texts.items() for part in ("--data", f"{name}={text}")]
    words = ["eval", merged, *data, "--tokens", "60", "--soup", "--routing", "domain", "-o", tmp_path / "report"]
    done = btx(*words, COLUMNS="200", level="torch")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    rows = {line.strip().split("  ")[0] for line in lines}
    for name in ("merged", "merged, own expert", "seed", "code", "math", "soup"):
        assert name in rows
    report = json.loads((tmp_path / "report" / "eval.json").read_text())
    assert f"{report['rows'][0]['scores']['code']['bits_per_byte']:.3f}" in done.stdout
    done = btx("eval", merged, *data, "--tokens", "60", "--no-sources", "--json", level="package")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["rows"][0]["scores"] == report["rows"][0]["scores"]
    done = btx("eval", merged, *data, "--tokens", "60", "--no-sources", "-q", level="package")
    assert (done.returncode, done.stdout.splitlines()[0], done.stderr) == (0, "Bits per byte", "")


def test_no_name_is_shortened_on_a_narrow_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    score = {name: Score(1.5, 20.0, 100) for name in ("code", "english", "math")}
    rows = (Row("merged", MODEL, score, {}), Row("Branch-Train-Merge, top 1", BTM, score, {}))
    amounts = {name: Amount(1, 1, 100, 400, 400, 7, "") for name in score}
    print_evaluation(EvalReport("model", amounts, rows, {}, 128, "float32", "cpu", 1.0))
    out = capsys.readouterr().out
    assert "…" not in out
    first = "".join(line.strip().split("  ")[0] for line in out.splitlines())  # of the cells of each line
    assert first.replace(" ", "").count("Branch-Train-Merge,top1") == 2
    assert "Perplexity per token" in out.splitlines()  # as wide as it is, and not as its table


def test_a_mistake_is_one_line(family: Family, texts: dict[str, str]) -> None:
    data = ("--data", f"code={texts['code']}")
    assert errors_of(btx("eval", family.seed, *data, "--soup")) == [
        "recipe: soup: given, and the model was not merged. Leave it out, or give a merged model."
    ]
    (line,) = errors_of(btx("eval", family.seed, *data, "--btm", "1", "--btm", "two"))
    assert line == "command: --btm: 1 two; expected a whole number each time"
    (line,) = errors_of(btx("eval", family.seed))
    assert "data: missing" in line


def test_how_far_it_is_every_ten_seconds(capsys, monkeypatch) -> None:
    times = iter([0.0, 4.0, 10.0, 15.0, 25.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    lines = Lines()
    for done in (0, 100, 250, 300, 500):
        lines.text_done(done, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "measured 25%, about 30 s left",
        "measured 50%, about 25 s left",
    ]
    times = iter([0.0, 11.0, 22.0, 23.0])
    for done in range(4):
        lines.layer_done(done, 4)
    assert capsys.readouterr().err.splitlines() == [
        "fitted 1 of 4 layers, about 33 s left",
        "fitted 2 of 4 layers, about 22 s left",
    ]
