"""Branch-Train-Merge against a case computed by hand, scikit-learn's own tf-idf, and transformers' own generation."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from btx_merge import BranchTrainMerge, DomainText, EvalRecipe, InputError, evaluate
from btx_merge.evaluation.ensemble import BLOCK
from btx_merge.evaluation.report import BTM
from btx_merge.measuring.windows import windows_of
from tests.evaluation.test_run import lines_of
from tests.support.common import load_float32, problems_of, tiny_tokenizer


@pytest.fixture
def apples(tmp_path: Path) -> tuple[DomainText, DomainText]:
    """By hand: 3 documents, of which w1 and w2 are part of two, w3 of one."""
    (tmp_path / "a.jsonl").write_text('{"text": "w1 w2"}\n{"text": "w1"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "w2 w3"}\n')
    return DomainText("a", str(tmp_path / "a.jsonl")), DomainText("b", str(tmp_path / "b.jsonl"))


def ensemble(texts: Any, experts: dict[str, Any] | None = None, top_k: int = 1, **options: Any) -> BranchTrainMerge:
    return BranchTrainMerge(experts or {"a": None, "b": None}, texts, tiny_tokenizer(), top_k, **options)


def test_shares_by_hand(apples):
    """idf = ln((1 + 3) / (1 + documents)) + 1; each document has length 1; an expert is the mean of its own."""
    two, one = math.log(4 / 3) + 1, math.log(4 / 2) + 1
    half = 1 / math.sqrt(2)  # "w1 w2": both words have the same idf
    a = np.array([half + 1, half, 0.0])  # twice the mean of (half, half, 0) and (1, 0, 0)
    b = np.array([0.0, two, one]) / math.hypot(two, one)
    a /= np.linalg.norm(a)
    context = np.array([0.0, half, 0.0]) * 2 * half  # "w2"
    context /= np.linalg.norm(context)
    cosines = {"a": context @ a, "b": context @ b}
    shares = np.exp(list(cosines.values()))
    shares /= shares.sum()
    assert cosines["b"] > cosines["a"] > 0
    assert ensemble(apples).weights("w2") == {"b": 1.0}
    assert ensemble(apples, top_k=2).weights("w2") == {"b": 0.5, "a": 0.5}
    found = ensemble(apples, top_k=2, is_weighted=True).weights("w2")
    assert found == pytest.approx({"a": shares[0], "b": shares[1]})
    assert ensemble(apples).weights("w1 w1 w3 w1") == {"a": 1.0}
    assert ensemble(apples).weights("") == ensemble(apples).weights("w50") == {"a": 0.5, "b": 0.5}


def test_cosines_are_those_of_scikit_learn(texts):
    given = {name: lines_of(file) for name, file in texts.items()}
    vectorizer = TfidfVectorizer().fit([line for lines in given.values() for line in lines])
    ours = BranchTrainMerge(dict.fromkeys(texts), texts, tiny_tokenizer())
    for context in (given["code"][3], given["math"][5], "w10 w70 w70 w3"):
        embedded = vectorizer.transform([context]).toarray()[0]
        for name, lines in given.items():
            mean = np.asarray(vectorizer.transform(lines).mean(axis=0)).ravel()
            expected = embedded @ mean / np.linalg.norm(embedded) / np.linalg.norm(mean)
            assert ours._embedding.cosines(context)[name] == pytest.approx(expected, abs=1e-9)


def test_the_next_token_is_that_of_the_mean_distribution(family, apples):
    models = {"a": load_float32(family.code), "b": load_float32(family.math)}
    tokenizer, prompt = tiny_tokenizer(), "w2 w1 w2"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        both = [model(ids).logits[0, -1].double().softmax(-1) for model in models.values()]
    found = ensemble(apples, models, 2).probabilities(prompt)
    torch.testing.assert_close(found.double(), (both[0] + both[1]) / 2, rtol=1e-5, atol=1e-8)


def test_one_expert_generates_as_transformers_has_it(family, apples):
    model, tokenizer = load_float32(family.math), tiny_tokenizer()
    ids = tokenizer("w2 w3", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    ours = ensemble(apples, {"a": load_float32(family.code), "b": model})
    assert ours.generate("w2 w3", 12) == tokenizer.decode(expected, skip_special_tokens=True)


def test_two_experts_generate_by_the_mean_of_what_each_says(family, apples):
    models = {"a": load_float32(family.code), "b": load_float32(family.math)}
    tokenizer = tiny_tokenizer()
    ids = list(tokenizer("w2 w1")["input_ids"])
    first = len(ids)
    for _ in range(8):  # without a cache
        with torch.no_grad():
            mean = sum(model(torch.tensor([ids])).logits[0, -1].softmax(-1) for model in models.values()) / 2
        ids.append(int(mean.argmax()))
    ours = ensemble(apples, models, 2)
    assert ours.generate("w2 w1", 8) == tokenizer.decode(ids[first:], skip_special_tokens=True)
    drawn = ours.generate("w2 w1", 8, temperature=1.0, seed=3)
    assert drawn == ours.generate("w2 w1", 8, temperature=1.0, seed=3)
    assert drawn != ours.generate("w2 w1", 8, temperature=1.0, seed=4)


@pytest.mark.parametrize(("on_demand", "loads"), [(False, ["b", "a"]), (True, ["b", "a", "b"])])
def test_experts_are_loaded_when_they_are_needed(family, apples, on_demand, loads):
    seen: list[str] = []

    def load(name: str, folder: Path):
        return lambda: seen.append(name) or load_float32(folder)

    ours = ensemble(apples, {"a": load("a", family.code), "b": load("b", family.math)}, on_demand=on_demand)
    for prompt in ("w2 w3", "w2 w3", "w1", "w2 w3"):
        ours.generate(prompt, 1)
    assert seen == loads


def test_its_scores_are_those_of_a_plain_loop(measured, texts, family):
    recipe = EvalRecipe(str(measured), texts, btm=(1, 2), btm_text=texts, tokens=150, window=48)
    report = evaluate(recipe)
    rows = report.rows[-2:]
    assert [(row.name, row.kind) for row in rows] == [(f"Branch-Train-Merge, top {k}", BTM) for k in (1, 2)]
    models = {"code": load_float32(family.code), "math": load_float32(family.math)}
    for top_k, row in enumerate(rows, 1):
        check_ensemble_row(row, BranchTrainMerge(models, texts, tiny_tokenizer(), top_k), report, texts)


def check_ensemble_row(row, ours: BranchTrainMerge, report, texts) -> None:
    models, tokenizer = ours.experts, ours.tokenizer
    for domain, score in row.scores.items():
        loss, chosen = 0.0, set()
        for window in windows_of(lines_of(texts[domain]), tokenizer, 48, 150):
            with torch.no_grad():
                each = {n: m(torch.tensor([window.ids])).logits[0].double().softmax(-1) for n, m in models.items()}
            first = len(window.ids) - window.scored
            for place in range(first, len(window.ids)):
                read = window.ids[: first + (place - first) // BLOCK * BLOCK]
                shares = ours.weights(tokenizer.decode(read, skip_special_tokens=True))
                chosen.add(tuple(shares))
                loss -= math.log(
                    sum(share * float(each[n][place - 1, window.ids[place]]) for n, share in shares.items())
                )
        assert (
            len({len(names) for names in chosen}) == 3 - ours.top_k
        )  # at a beginning all, then as many as are wanted
        assert score.bits_per_byte == pytest.approx(loss / math.log(2) / report.domains[domain].nbytes, rel=1e-5)
        assert score.tokens == report.domains[domain].tokens


def test_what_does_not_fit_is_refused(apples, measured, texts):
    assert problems_of(ensemble, apples[:1], {"a": None, "c": None}, 3) == [
        "recipe: btm_text: no text of c; expected some of its training text, c=TEXT",
        "recipe: btm: 3; expected in [1, 2], the number of experts",
    ]
    with pytest.raises(InputError, match="btm_text: no expert b; expected one of a"):
        ensemble(apples, {"a": None})
    with pytest.raises(InputError, match="btm_text: missing; expected both, or btm left out"):
        EvalRecipe(str(measured), texts, btm=1)
    with pytest.raises(InputError, match=r"btm: given without sources"):
        EvalRecipe(str(measured), texts, btm=1, btm_text=texts, no_sources=True)
    recipe = EvalRecipe(str(measured), texts, btm=(1, 2), btm_text={"cod": texts["code"]})
    assert problems_of(evaluate, recipe) == [
        "recipe: btm_text: no source cod; expected one of seed, code, math",
        "recipe: btm: 2; expected at most 1, the experts with text",
    ]
    for wrong, found in ((0, "0"), ([2, True], "True"), ((1, 2, 1), "1 twice"), ("1", "'1'")):
        with pytest.raises(InputError) as error:
            EvalRecipe(str(measured), texts, btm=wrong, btm_text=texts)
        (problem,) = error.value.problems
        assert str(problem) == f"recipe: btm: {found}; expected whole numbers of at least 1, each once"


def test_an_expert_that_reads_other_tokens_is_refused(measured, texts, family, tmp_path):
    other = shutil.copytree(family.math, tmp_path / "math")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w60"], vocabulary["w61"] = vocabulary["w61"], vocabulary["w60"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = EvalRecipe(str(measured), texts, sources={"math": str(other)}, btm=1, btm_text=texts, tokens=60)
    with pytest.raises(
        InputError, match=r"math: .*reads other tokens; expected the model's. Leave it out of --btm-text"
    ):
        evaluate(recipe)
