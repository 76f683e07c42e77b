"""What an evaluation writes: a folder with numbers, tables and a picture; and the model's own card."""

from __future__ import annotations

import json
import shutil

import pytest

from btx_merge import EvalRecipe, FitRecipe, InputError, Options, evaluate, fit
from btx_merge.evaluation.picture import figure_of
from btx_merge.evaluation.report import MODEL, EvalReport, Row, Score
from btx_merge.evaluation.tables import bits_table, lines_of, perplexity_table
from btx_merge.measuring.windows import Amount
from btx_merge.model.held_out import OF_AN_EARLIER_ONE, OF_THIS_MODEL
from btx_merge.sources.cards import front_matter


@pytest.fixture(scope="module")
def found(measured, texts):
    return evaluate(EvalRecipe(str(measured), texts, tokens=200, soup=True))


@pytest.mark.usefixtures("painted")
def test_a_folder_has_numbers_tables_and_a_picture(measured, texts, tmp_path):
    recipe = EvalRecipe(str(measured), texts, tokens=60, no_sources=True)
    report = evaluate(recipe, tmp_path / "report")
    folder = tmp_path / "report"
    assert sorted(file.name for file in folder.iterdir()) == ["eval.json", "eval.md", "eval.png"]
    assert json.loads((folder / "eval.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert (folder / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report"]
    with pytest.raises(InputError, match="not empty"):
        evaluate(recipe, folder)
    evaluate(recipe, folder, Options(overwrite=True))


def test_the_table_has_every_model_and_the_oracle(found):
    head, rows = bits_table(found)
    assert head == ["model", "code", "math", "gap closed, code", "gap closed, math", "mean"]
    assert [row[0] for row in rows] == ["merged", "seed", "code", "math", "soup", "oracle, best source"]
    for cells, row in zip(rows, found.rows, strict=False):
        assert cells[1] == f"{row.scores['code'].bits_per_byte:.3f}"
        assert cells[3] == ("no gap" if row.closed["code"] is None else f"{row.closed['code']:.1%}")
    assert all(len(row) == len(head) for row in rows)
    for domain in found.without_gap:
        assert any(line.startswith("No source is better") and domain in line for line in lines_of(found))


def test_perplexities_have_as_many_digits_one_under_the_other():
    scores = {"code": Score(1.5, 128.1, 100), "math": Score(1.5, 12345.6, 100)}
    amounts = {name: Amount(1, 1, 100, 400, 400, 7, "") for name in scores}
    rows = (Row("merged", MODEL, scores, {}),)
    _, (cells,) = perplexity_table(EvalReport("model", amounts, rows, {}, 128, "float32", "cpu", 1.0))
    assert cells == ["merged", "128.10", "12346"]


def test_the_picture_has_a_bar_for_each_figure(found):
    (axes,) = figure_of(found).axes
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    rows = [*found.rows[1:], found.rows[0]]  # the merged model last
    assert heights == [[score.bits_per_byte for score in row.scores.values()] for row in rows]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(labels) == sorted([*(row.name for row in rows), "best single source"])


def test_the_card_gets_table_picture_and_figures(measured, texts, tmp_path):
    model = shutil.copytree(measured, tmp_path / "model")
    before = {file.name for file in model.iterdir()}
    recipe = EvalRecipe(str(model), texts, tokens=60, no_sources=True)
    for _ in range(2):  # a second evaluation takes the place of the first
        report = evaluate(recipe, card=True)
        assert {file.name for file in model.iterdir()} == before | {"eval.png"}
        metadata, body = front_matter((model / "README.md").read_text())
        assert body.count("## Evaluation\n") == 1
        assert body.index("## Evaluation") < body.index("## Citation")
        assert "![bits per byte by domain and model](eval.png)" in body
        (index,) = metadata["model-index"]
        metrics = [metric for result in index["results"] for metric in result["metrics"]]
        bits = [metric["value"] for metric in metrics if metric["type"] == "bits_per_byte"]
        assert bits == [float(f"{score.bits_per_byte:.5g}") for score in report.rows[0].scores.values()]
        assert len(metrics) == 4


def test_figures_of_a_fit_stay_until_the_model_changes(measured, texts, tmp_path):
    settings = {"domain_text": texts, "domain_tokens": 500}
    fit(FitRecipe(str(measured), **settings), tmp_path / "fitted")
    evaluate(EvalRecipe(str(tmp_path / "fitted"), texts, tokens=60, no_sources=True), card=True)
    metadata, body = front_matter((tmp_path / "fitted" / "README.md").read_text())
    names = [metric["name"] for result in metadata["model-index"][0]["results"] for metric in result["metrics"]]
    assert "Router accuracy, mean of the layers" in names
    assert names.count("Bits per byte") == 2
    assert body.count(OF_THIS_MODEL) == 2  # the routers' table and this one
    fit(FitRecipe(str(tmp_path / "fitted"), **settings), tmp_path / "again")
    metadata, body = front_matter((tmp_path / "again" / "README.md").read_text())
    assert (tmp_path / "again" / "eval.png").exists()
    evaluation = body[body.index("## Evaluation") :]
    assert OF_AN_EARLIER_ONE in evaluation
    assert OF_THIS_MODEL not in evaluation.split("## ")[1]
    assert "bits_per_byte" not in json.dumps(metadata)
