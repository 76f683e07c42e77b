"""An evaluation: every figure against a plain loop in float64, gaps by hand, refusals, and what is written."""

from __future__ import annotations

import errno
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from btx_merge import (
    EvalRecipe,
    FitRecipe,
    InputError,
    MergeError,
    MergeInterrupted,
    MergeRecipe,
    NonFiniteError,
    Options,
    evaluate,
    export,
    fit,
    merge,
)
from btx_merge.evaluation import run
from btx_merge.evaluation.report import AGAINST, MODEL, ROUTED, SOUP, SOURCE, Row, Score, oracle_of, with_gaps
from tests.support.common import VOCAB, WORDS, Told, files_of, force_expert, grow, load_float32, tiny_tokenizer

BOS = 126


def lines_of(file: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(file).read_text().splitlines()]


def slow_bits(model, file: str, documents: int | None = None) -> tuple[float, float]:
    """Bits per byte and perplexity of documents that each fit into a window, one after the other."""
    loss, tokens, nbytes = 0.0, 0, 0
    with torch.no_grad():
        for text in lines_of(file)[:documents]:
            ids = [BOS, *(WORDS.index(word) for word in text.split())]
            logits = model(torch.tensor([ids])).logits[0].double()
            for place in range(1, len(ids)):
                loss += float(torch.logsumexp(logits[place - 1], 0) - logits[place - 1, ids[place]])
            tokens += len(ids) - 1
            nbytes += len(text.encode())
    return loss / math.log(2) / nbytes, math.exp(loss / tokens)


def scores(report, kind: str, name: str | None = None) -> dict[str, Score]:
    (row,) = [row for row in report.rows if row.kind == kind and name in (None, row.name)]
    return dict(row.scores)


@pytest.fixture(scope="module")
def found(measured, texts, family):
    against = {"other": str(family.math)}
    return evaluate(EvalRecipe(str(measured), texts, soup=True, against=against, routing="domain", tokens=400))


def test_every_row_is_what_a_plain_loop_gives(found, measured, texts, family):
    states = [load_float32(folder).state_dict() for folder in (family.seed, family.code, family.math)]
    soup = load_float32(family.seed)
    soup.load_state_dict({name: sum(state[name] for state in states) / 3 for name in states[0]})
    models = {
        (MODEL, "merged"): load_float32(measured),
        (SOURCE, "seed"): load_float32(family.seed),
        (SOURCE, "code"): load_float32(family.code),
        (SOURCE, "math"): load_float32(family.math),
        (SOUP, "soup"): soup,
        (AGAINST, "other"): load_float32(family.math),
    }
    assert [row.kind for row in found.rows] == [MODEL, ROUTED, SOURCE, SOURCE, SOURCE, SOUP, AGAINST]
    for (kind, name), model in models.items():
        for domain, score in scores(found, kind, name).items():
            bits, perplexity = slow_bits(model, texts[domain], found.domains[domain].documents)
            assert score.bits_per_byte == pytest.approx(bits, rel=1e-5)  # float32 logits, summed in float64
            assert score.perplexity == pytest.approx(perplexity, rel=1e-4)
            assert score.same_tokens


def test_routed_by_domain_each_token_meets_its_own_expert_alone(found, measured, texts):
    for domain in texts:
        model = load_float32(measured)
        force_expert(model, model.config.expert_names.index(domain))
        bits, _ = slow_bits(model, texts[domain], found.domains[domain].documents)
        assert scores(found, ROUTED)[domain].bits_per_byte == pytest.approx(bits, rel=1e-5)


def test_all_chunks_of_a_split_expert_are_its_source(family, texts, tmp_path):
    """Every shared weight is the seed's, so the merge with all chunks of an expert is that expert."""

    def only_feed_forward(model):
        with torch.no_grad():
            for (name, ours), theirs in zip(model.named_parameters(), seed.parameters(), strict=True):
                if ".mlp." not in name:
                    ours.copy_(theirs)

    seed = load_float32(family.seed)
    code = grow(family.seed, tmp_path / "code", change=only_feed_forward)
    recipe = MergeRecipe(str(family.seed), {"code": str(code)}, expert_mode="split", num_chunks=2)
    merge(recipe, tmp_path / "merged")
    report = evaluate(EvalRecipe(str(tmp_path / "merged"), {"code": texts["code"]}, no_sources=True, routing="domain"))
    bits, _ = slow_bits(load_float32(code), texts["code"])
    assert scores(report, ROUTED)["code"].bits_per_byte == pytest.approx(bits, rel=1e-5)


def test_blended_experts_are_of_no_domain(family, texts, tmp_path):
    """Whatever the domains are called: by the name of such an expert, too."""
    merge(MergeRecipe(str(family.seed), family.experts, expert_mode="blend"), tmp_path / "blend")
    for name in ("code", "blend.0"):
        with pytest.raises(InputError) as error:
            evaluate(EvalRecipe(str(tmp_path / "blend"), {name: texts["code"]}, no_sources=True, routing="domain"))
        (line,) = error.value.lines
        assert line.endswith("each a part of every source; expected an expert of each domain. Leave --routing out.")
    recipe = FitRecipe(str(tmp_path / "blend"), domain_text=texts)
    with pytest.raises(InputError, match=r"blend: every expert is a part of all sources.* btx train --train routers"):
        fit(recipe, tmp_path / "fitted")


def test_counts_are_those_of_the_text(measured, texts):
    report = evaluate(EvalRecipe(str(measured), texts, no_sources=True))
    for domain, amount in report.domains.items():
        lines = lines_of(texts[domain])
        assert amount.documents == amount.windows == len(lines)
        assert amount.tokens == sum(len(line.split()) for line in lines)
        assert amount.nbytes == sum(len(line.encode()) for line in lines)


def row(kind: str, name: str, **bits: float) -> Row:
    return Row(name, kind, {domain: Score(value, 1.0, 1) for domain, value in bits.items()}, {})


def test_gaps_by_hand():
    rows = [
        row(MODEL, "merged", code=1.4, math=2.0, web=1.0, wiki=3.0),
        row(SOURCE, "seed", code=2.0, math=2.0, web=0.9, wiki=2.0),
        row(SOURCE, "a", code=1.0, math=2.1, web=1.5, wiki=1.9985),
        row(SOURCE, "b", code=1.8, math=1.6, web=0.9, wiki=2.1),
    ]
    oracle = oracle_of(rows)
    assert {domain: (best.source, best.bits_per_byte) for domain, best in oracle.items()} == {
        "code": ("a", 1.0),
        "math": ("b", 1.6),
        "web": ("seed", 0.9),  # as good as b: no source is better
        "wiki": ("a", 1.9985),  # better, but by less than a thousandth
    }
    merged, _, a, _ = with_gaps(rows, oracle)
    assert merged.closed == {"code": pytest.approx(0.6), "math": 0.0, "web": None, "wiki": None}
    assert merged.mean_closed == pytest.approx(0.3)
    assert a.closed["math"] == pytest.approx(-0.25)


def test_part_of_a_domain_in_smaller_windows(measured, texts):
    values = {"tokens": 100, "window": 8, "batch_size": 1, "no_sources": True}
    report = evaluate(EvalRecipe(str(measured), texts, **values))
    for amount in report.domains.values():
        assert 92 < amount.tokens <= 100
    assert report.window == 8
    assert report.oracle == {}
    assert "gap_closed" not in report.to_dict()["rows"][0]


def test_a_model_that_reads_other_tokens_has_the_same_bytes(measured, texts, tmp_path, family):
    joined = tiny_tokenizer(["w1 w2", "w3 w"])
    grown = {"change": lambda model: model.resize_token_embeddings(VOCAB + 2), "tokenizer": joined}
    other = grow(family.seed, tmp_path / "other", **grown)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "w5 w1 w2 w7 " * 10}))
    recipe = EvalRecipe(
        str(measured),
        {"code": str(tmp_path / "text.jsonl")},
        no_sources=True,
        against={"other": str(other)},
        tokens=30,
        window=8,
    )
    report = evaluate(recipe)
    score = scores(report, AGAINST)["code"]
    assert report.domains["code"].tokens == 24
    assert (score.tokens, score.same_tokens) == (18, False)
    assert "Read other tokens" in "\n".join(
        __import__("btx_merge.evaluation.tables").evaluation.tables.lines_of(report)
    )


def test_everything_wrong_is_said_at_once(measured, texts, tmp_path):
    recipe = EvalRecipe(
        str(measured),
        {"code": texts["code"], "web": str(tmp_path / "gone.jsonl")},
        sources={"coed": "somewhere"},
        against={"other": str(tmp_path / "nothing")},
        routing="domain",
        window=8,
    )
    with pytest.raises(InputError) as error:
        evaluate(recipe, options=Options(device="abacus"))
    text = "\n".join(error.value.lines)
    for part in ("gone.jsonl", "no source coed", "nothing: no such folder", "no expert web", "--device"):
        assert part in text
    with pytest.raises(InputError, match=r"window: 5000; expected at most 128, the model's positions"):
        evaluate(EvalRecipe(str(measured), texts, window=5000))
    with pytest.raises(InputError, match=r"against: the name 'a \| b'; expected letters"):
        EvalRecipe(str(measured), texts, against={"a | b": "somewhere"})
    with pytest.raises(InputError, match="against: the name code, which another row has; expected a name of its own"):
        evaluate(EvalRecipe(str(measured), texts, against={"code": str(measured)}))
    with pytest.raises(InputError) as error:
        EvalRecipe(str(measured), {}, soup=True, no_sources=True, dtype="float8", routing="best", tokens=0)
    assert [problem.where for problem in error.value.problems] == ["routing", "tokens", "dtype", "data", "soup"]


def test_a_model_that_was_not_merged_is_measured_alone(found, measured, texts, family, tmp_path):
    """A dense Llama, and an export; each as where it stands beside a merged model."""
    report = evaluate(EvalRecipe(str(family.math), texts, tokens=400), tmp_path / "report")
    ((name, kind, alone),) = [(row.name, row.kind, row.scores) for row in report.rows]
    assert (name, kind, report.oracle) == ("model", MODEL, {})
    assert alone == scores(found, SOURCE, "math")
    assert "| model |" in (tmp_path / "report" / "eval.md").read_text()
    export(str(measured), tmp_path / "mixtral")
    against = {"other": str(family.code)}
    report = evaluate(EvalRecipe(str(tmp_path / "mixtral"), texts, against=against, tokens=400))
    for domain, score in scores(report, MODEL).items():
        assert score.bits_per_byte == pytest.approx(scores(found, MODEL)[domain].bits_per_byte, rel=1e-6)
    assert scores(report, AGAINST) == scores(found, SOURCE, "code")


def test_an_adapter_is_no_whole_model(texts, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    expected = "a PEFT adapter; expected a whole model. Give its base, and it beside that: --against NAME=ADAPTER"
    with pytest.raises(InputError, match=expected):
        evaluate(EvalRecipe(str(tmp_path), texts))


def test_what_needs_sources_is_refused_for_a_model_without(texts, family):
    recipe = EvalRecipe(
        str(family.seed), texts, sources={"code": "x"}, soup=True, routing="domain", btm=1, btm_text=texts, window=500
    )
    with pytest.raises(InputError) as error:
        evaluate(recipe)
    remedy = "Leave it out, or give a merged model."
    assert [str(problem) for problem in error.value.problems] == [
        *(f"recipe: {what}: given, and the model was not merged. {remedy}" for what in ("sources", "soup")),
        *(f"recipe: {what}: given, and the model was not merged. {remedy}" for what in ("routing", "btm")),
        "recipe: window: 500; expected at most 128, the model's positions",
    ]


def test_a_moved_source_is_given(measured, texts, family, tmp_path):
    copy = shutil.copytree(measured, tmp_path / "merged")
    with pytest.raises(InputError) as error:
        evaluate(EvalRecipe(str(copy), texts))
    for name, line in zip(("seed", "code", "math"), error.value.lines, strict=True):
        assert line.endswith(f"Give --source {name}=MODEL where it lies now, or --no-sources.")
    sources = {"seed": str(family.seed), **family.experts}
    report = evaluate(EvalRecipe(str(copy), texts, sources=sources, tokens=50))
    assert [row.name for row in report.rows if row.kind == SOURCE] == ["seed", "code", "math"]


def test_a_source_that_cannot_be_opened_has_the_remedy_of_its_reason(measured, texts, family, tmp_path):
    """And the two that an evaluation has beside it."""
    holder = tmp_path / "holder"
    shutil.copytree(family.code, holder / "checkpoint-5")
    broken = shutil.copytree(family.math, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    where = {"seed": "org/name", "code": str(holder), "math": str(broken)}
    with pytest.raises(InputError) as error:
        evaluate(EvalRecipe(str(measured), texts, sources=where))
    seed, *lines = error.value.lines
    assert "not a folder, not in the Hub's cache" in seed
    assert "or give a folder. Or give --source seed=MODEL, another copy of it, or --no-sources." in seed
    code = next(line for line in lines if line.startswith("code: "))
    assert f"Give {holder / 'checkpoint-5'}. Or give --source code=MODEL, another" in code
    math = next(line for line in lines if line.startswith("math: "))
    assert "config.json" in math
    assert "download it again. Or give --source math=MODEL, another copy of it, or --no-sources." in math


def test_progress_ends_with_all_of_the_text(measured, texts):
    told: list[tuple[int, int]] = []
    reporter = Told(text_done=lambda done, of: told.append((done, of)))
    report = evaluate(EvalRecipe(str(measured), texts, tokens=60), reporter=reporter)
    whole = 4 * sum(amount.nbytes for amount in report.domains.values())
    assert told[0] == (0, whole)
    assert told[-1] == (whole, whole)


def test_ctrl_c_writes_nothing(measured, texts, tmp_path):
    def stop(done: int, of: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(MergeInterrupted, match="No report was written"):
        evaluate(EvalRecipe(str(measured), texts), tmp_path / "report", reporter=Told(text_done=stop))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("role", "name"), [("sources", "math"), ("against", "other")])
def test_no_model_beside_the_merged_one_is_overwritten(measured, texts, family, tmp_path, role, name):
    moved = shutil.copytree(family.math, tmp_path / "place" / "math")
    before = files_of(tmp_path)
    for out in (moved, tmp_path / "place"):
        recipe = EvalRecipe(str(measured), texts, **{role: {name: str(moved)}})
        with pytest.raises(InputError, match=f"is the folder of {name}, or holds it"):
            evaluate(recipe, out, Options(overwrite=True))
    with pytest.raises(InputError, match=f"is the folder of {name}, or holds it"):
        evaluate(recipe, options=Options(overwrite=True), lm_eval_tasks=moved)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("tasks", ["report", "report/tasks", "."])
def test_report_and_tasks_need_a_folder_each(measured, texts, tmp_path, tasks):
    out = tmp_path / "new" / "report"
    with pytest.raises(InputError, match=r"--lm-eval-tasks: overlaps with .*, the folder of the report"):
        evaluate(EvalRecipe(str(measured), texts), out, lm_eval_tasks=out.parent / tasks)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_is_no_figure(measured, texts, family, tmp_path):
    """A NaN would be the best of all sources, or none, and is no JSON."""
    broken = grow(family.seed, tmp_path / "broken", change=lambda model: model.model.norm.weight.data.fill_(math.nan))
    recipe = EvalRecipe(str(measured), texts, sources={"seed": str(broken)}, tokens=60)
    with pytest.raises(NonFiniteError, match=r"seed: its loss on .* is not finite. No report was written"):
        evaluate(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_found_before_anything_is_measured(measured, texts, tmp_path, monkeypatch):
    def refuse(parent: Path):
        raise PermissionError(errno.EACCES, "Permission denied", str(parent))

    def measured_yet(done: int, of: int) -> None:
        raise AssertionError

    monkeypatch.setattr(run, "scratch_folder", refuse)
    recipe = EvalRecipe(str(measured), texts, no_sources=True)
    calls = ({"output": tmp_path / "report"}, {"lm_eval_tasks": tmp_path / "tasks"}, {"card": True})
    for call, parent in zip(calls, (tmp_path, tmp_path, measured.parent), strict=True):
        with pytest.raises(MergeError, match=f"{parent}: Permission denied"):
            evaluate(recipe, **call, reporter=Told(text_done=measured_yet))


def test_a_card_that_is_a_folder_is_refused_before_anything_is_measured(measured, texts, tmp_path):
    model = shutil.copytree(measured, tmp_path / "model")
    (model / "README.md").unlink()
    (model / "README.md").mkdir()
    told: list[int] = []
    reporter = Told(text_done=lambda done, of: told.append(done))
    with pytest.raises(InputError, match=r"README.md: a folder; expected a plain file"):
        evaluate(EvalRecipe(str(model), texts, no_sources=True), reporter=reporter, card=True)
    assert not told
