"""The verb as a whole: what it writes, what it refuses, and what it leaves behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from btx_merge import InputError, MergeError, MergeInterrupted, MergeRecipe, Options, RoutingRecipe, merge, routing
from btx_merge.cli.app import app
from btx_merge.inspecting import session
from btx_merge.inspecting.run import NUMBERS, PICTURES
from btx_merge.model.files import REPORT
from tests.support.browser import CHROMIUM, Browser
from tests.support.common import Told, edit_json, files_of, load_float32, tiny_tokenizer
from tests.support.pictures import painted

in_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")


def recipe_of(model: Path | str, texts: dict[str, str], **changes: Any) -> RoutingRecipe:
    return RoutingRecipe(str(model), texts, **{"tokens": 300, "window": 32, "page_tokens": 100, **changes})


def payload(page: Path) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


@pytest.fixture(scope="module")
def written(merged: Path, texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("routing") / "report"
    heard: list[tuple[int, int]] = []
    reporter = Told(text_done=lambda done, of: heard.append((done, of)))
    with painted():
        report = routing(recipe_of(merged, texts), out, reporter=reporter)
    assert heard[0][0] == 0
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert len({of for _, of in heard}) == 1
    assert heard[-1][0] == heard[-1][1] > 0
    assert heard[-1][1] % 7 == 0  # the model's own pass, and two for each of three experts
    return out, report


def test_what_is_written(written: tuple[Path, Any], merged: Path) -> None:
    out, report = written
    assert sorted(file.name for file in out.iterdir()) == sorted([REPORT, NUMBERS, *PICTURES])
    assert sorted(file.name for file in out.parent.iterdir()) == ["report"]
    numbers = json.loads((out / NUMBERS).read_text())
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == {
        "output": str(out),
        "seconds": plain["seconds"],
        **{key: numbers[key] for key in ("model", "against")},
    }
    assert numbers["recipe"]["tokens"] == 300
    assert [text["references"] for text in numbers["recipe"]["data"]] == [["code.jsonl"], ["math.jsonl"]]
    assert numbers["model"]["experts"] == ["seed", "code", "math"]
    for domain in numbers["model"]["domains"]:
        assert domain["tokens"] <= 300
        assert len(domain["share"]) == 2
        assert sum(domain["share"][0]) == pytest.approx(1)
        assert set(domain["without"]) == set(domain["alone"]) == {"seed", "code", "math"}
        assert domain["regret"] >= 0 or domain["regret"] == pytest.approx(0, abs=0.1)
    assert str(merged.parent) not in "".join(file.read_text("utf-8", "replace") for file in out.iterdir())


def test_the_page_shows_the_users_text(written: tuple[Path, Any], texts: dict[str, str]) -> None:
    out, _ = written
    shown = payload(out / REPORT)["texts"]
    assert [text["domain"] for text in shown] == ["code", "math"]
    for text in shown:
        first = json.loads(Path(texts[text["domain"]]).read_text().splitlines()[0])["text"]
        assert len(text["tokens"]) == 50
        assert first.startswith("".join(text["tokens"][: len(first.split())]).strip())


def test_pictures_are_pictures(written: tuple[Path, Any]) -> None:
    out, _ = written
    assert (out / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "routing.svg").read_text(encoding="utf-8")


def test_against_another_model(merged: Path, family: Any, texts: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "two"
    merge(MergeRecipe(str(family.seed), {"code": str(family.code)}), other)
    heard: list[tuple[int, int]] = []
    reporter = Told(text_done=lambda done, of: heard.append((done, of)))
    recipe = recipe_of(merged, texts, against=str(other), ablation=False, page_tokens=0)
    report = routing(recipe, tmp_path / "out", reporter=reporter)
    assert heard[-1][0] == heard[-1][1]
    assert report.against
    assert report.against.experts == ("seed", "code")
    assert [d.tokens for d in report.against.domains] == [d.tokens for d in report.model.domains]
    assert all(not domain.alone for figures in (report.model, report.against) for domain in figures.domains)
    data = payload(tmp_path / "out" / REPORT)
    assert data["against"]["model"] == "two"
    assert [text["tokens"] for text in data["texts"]] == [[], []]


def test_a_model_beside_itself_has_the_same_figures(merged: Path, texts: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(merged, texts, against=str(merged), ablation=False)
    report = routing(recipe, tmp_path / "out")
    assert report.against == report.model


def test_the_order_of_batches_is_not_seen(
    written: tuple[Path, Any], merged: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    """Windows are sorted by length within a batch's worth; the page has them in the order of the text again."""
    out, report = written
    again = routing(recipe_of(merged, texts, batch_size=1), tmp_path / "out")
    for one, other in zip(report.model.domains, again.model.domains, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.share == tuple(pytest.approx(row) for row in one.share)
        assert other.regret == pytest.approx(one.regret, abs=1e-5)
    first, second = (payload(folder / REPORT)["texts"] for folder in (out, tmp_path / "out"))
    assert [text["tokens"] for text in first] == [text["tokens"] for text in second]
    assert [text["first"] for text in first] == [text["first"] for text in second]


def test_everything_is_checked_before_the_model_is_loaded(
    merged: Path, texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "load_folder", lambda *_: pytest.fail("loaded"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    recipe = recipe_of(merged, {**texts, "law": str(tmp_path / "no.jsonl")}, against=str(tmp_path / "no"), window=4096)
    with pytest.raises(InputError) as error:
        routing(recipe, tmp_path / "out", Options(device="nonsense"))
    found = [(problem.source, problem.where) for problem in error.value.problems]
    assert found == [
        ("output", str(tmp_path / "out")),
        ("model", "window"),
        ("against", str(tmp_path / "no")),
        ("law", str(tmp_path / "no.jsonl")),
        ("command", "--device"),
    ]
    (tmp_path / "empty.jsonl").write_text(json.dumps({"text": " "}) + "\n")
    with pytest.raises(InputError, match="law: text: not a single token"):
        routing(recipe_of(merged, {"law": str(tmp_path / "empty.jsonl")}), tmp_path / "new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty.jsonl", "out"]


def test_a_second_model_may_read_other_tokens(merged: Path, texts: dict[str, str], tmp_path: Path) -> None:
    """The text is the same, and every byte of it is scored by both."""
    copy = tmp_path / "copy"
    shutil.copytree(merged, copy)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["w"])  # the id 128, at the beginning of every word
    tokenizer.save_pretrained(copy)
    recipe = recipe_of(merged, texts, against=str(copy), ablation=False)
    with pytest.raises(InputError, match="against: tokenizer: gives the id 128; expected below 128, the embedding"):
        routing(recipe, tmp_path / "out")
    model = load_float32(merged)
    model.resize_token_embeddings(140)
    model.save_pretrained(copy)
    heard: list[tuple[int, int]] = []
    reporter = Told(text_done=lambda done, of: heard.append((done, of)))
    report = routing(recipe, tmp_path / "out", reporter=reporter)
    assert heard[-1][0] == heard[-1][1]
    assert report.against
    counts = [[domain.tokens for domain in figures.domains] for figures in (report.model, report.against)]
    assert all(other > 1.5 * one for one, other in zip(*counts, strict=True))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"tokens": -1}, "tokens: -1; expected at least 0"),
        ({"window": 0}, "window: 0; expected at least 1"),
        ({"batch_size": 0}, "batch_size: 0; expected at least 1"),
        ({"page_tokens": -1}, "page_tokens: -1; expected at least 0"),
        ({"dtype": "int8"}, "dtype: 'int8'; expected one of"),
        ({"ablation": "no"}, "ablation: 'no'; expected true or false"),
    ],
)
def test_values_that_cannot_be_meant(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(InputError) as error:
        RoutingRecipe("m", {"code": "t"}, **changes)
    assert str(error.value).startswith(f"recipe: {found}")


def test_no_text() -> None:
    with pytest.raises(InputError, match="recipe: data: missing; expected at least one domain, --data NAME=TEXT"):
        RoutingRecipe("m")


def test_a_report_is_replaced_when_the_new_one_is_complete(
    merged: Path, texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "routing.json").write_text("old")
    (out / "old").write_text("old")
    recipe = recipe_of(merged, texts, ablation=False)
    with monkeypatch.context() as patched:
        patched.setattr("btx_merge.inspecting.page.embedded", lambda data: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            routing(recipe, out, Options(overwrite=True))
    assert files_of(tmp_path) == {"out/routing.json": b"old", "out/old": b"old"}
    routing(recipe, out, Options(overwrite=True))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]
    assert not (out / "old").exists()


def test_ctrl_c_and_a_full_disk_leave_nothing(merged: Path, texts: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(merged, texts)

    def stop(done: int, of: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(MergeInterrupted, match=r"^Interrupted\. Nothing was written\.$"):
        routing(recipe, tmp_path / "out", reporter=Told(text_done=stop))
    assert list(tmp_path.iterdir()) == []

    def full(done: int, of: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "out"))

    with pytest.raises(
        MergeError, match=r"out: No space left on device\. Make room\. The same command begins anew\.$"
    ):
        routing(recipe, tmp_path / "out", reporter=Told(text_done=full))
    assert list(tmp_path.iterdir()) == []


def test_the_page_holds_fewer_tokens_of_a_model_with_many_experts(
    merged: Path, texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_PAGE_GATES", 2 * 3 * 40)  # layers, experts, tokens
    routing(recipe_of(merged, texts, ablation=False), tmp_path / "out")
    assert [len(text["tokens"]) for text in payload(tmp_path / "out" / REPORT)["texts"]] == [20, 20]


@in_chromium
def test_the_page_of_a_real_run_works(written: tuple[Path, Any], tmp_path: Path) -> None:
    out, _ = written
    with Browser(tmp_path / "chromium") as browser:
        browser.open(out / REPORT)
        browser.wait("document.getElementById('text').getAttribute('aria-busy') === 'false'")
        words = payload(out / REPORT)["texts"][0]["tokens"]
        assert browser.value("spans.map((span) => span.textContent)") == words
        browser.hover("[data-token='3']")
        browser.wait("!document.getElementById('about').hidden")
        assert browser.complaints == []


def test_the_command(merged: Path, texts: dict[str, str], tmp_path: Path) -> None:
    words = ["routing", str(merged), *(f"--data={name}={text}" for name, text in texts.items())]
    words += ["-o", str(tmp_path / "out"), "--tokens", "200", "--window", "32", "--batch-size", "2"]
    done = CliRunner().invoke(app, [*words, "--page-tokens", "20"])
    assert done.exit_code == 0, done.output
    assert "own expert" in done.stdout
    assert str(tmp_path / "out") in done.stdout
    assert f"next: python -m webbrowser {(tmp_path / 'out' / REPORT).as_uri()}" in done.stderr
    done = CliRunner().invoke(app, [*words, "--no-ablation", "--overwrite", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["model"]["domains"][0]["alone"] == {}


def test_dead_experts_are_named(merged: Path, texts: dict[str, str], tmp_path: Path) -> None:
    """With a router that knows one expert alone, the others get what Top-1 leaves them: nothing."""
    copy = tmp_path / "copy"
    shutil.copytree(merged, copy)
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("mlp.gate.weight"):
                tensor.zero_()  # ties go to the first
        save_file(tensors, file, {"format": "pt"})
    edit_json(copy / "config.json", num_experts_per_tok=1)
    words = ["routing", str(copy), f"--data=code={texts['code']}", "-o", str(tmp_path / "out"), "--no-ablation"]
    done = CliRunner().invoke(app, [*words, "--tokens", "100"])
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if line.startswith(("dead", "cold"))]
    assert lines == [f"dead  {name} in layers 0, 1 of copy: at most 0.00% of the choices" for name in ("code", "math")]


def test_text_of_which_no_token_is_routed_is_refused(merged: Path, tmp_path: Path) -> None:
    """Otherwise every expert would be called dead."""
    (tmp_path / "short.jsonl").write_text('{"text": "w1"}\n{"text": ""}\n{"text": "w2"}\n')
    with pytest.raises(InputError, match="code: text: one token in each document; expected a document of two tokens"):
        routing(recipe_of(merged, {"code": str(tmp_path / "short.jsonl")}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
