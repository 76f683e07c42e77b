"""Model cards: held-out figures where the Hub shows them, what becomes of them, and untrained routers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from btx_merge import EditRecipe, FitRecipe, MergeRecipe, edit, export, extract, fit, merge
from btx_merge.model.card import CITATION_TITLE, UNTRAINED
from btx_merge.model.card_update import updated_card
from btx_merge.model.held_out import (
    OF_AN_EARLIER_ONE,
    OF_THIS_MODEL,
    Fitted,
    LayerFit,
    fit_tables,
    router_results,
    training_results,
)
from btx_merge.model.router_state import untrained_experts
from btx_merge.sources.cards import front_matter
from btx_merge.sources.locate import Located
from btx_merge.texts.references import DomainText
from tests.conftest import Family

LAYERS = (LayerFit(0, 2.0, 0.75, 0.1, 0.05), LayerFit(1, 4.0, 0.85, 0.2, 0.1))


@pytest.fixture(scope="module")
def ridge(family: Family, texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A merge with fitted routers, and its report."""
    folder = tmp_path_factory.mktemp("ridge") / "ridge"
    recipe = MergeRecipe(str(family.seed), family.experts, router_init="ridge", domain_text=texts, domain_tokens=500)
    return folder, merge(recipe, folder)


def results_of(folder: Path) -> list[EvalResult]:
    """As huggingface_hub reads and validates them."""
    return ModelCard.load(folder / "README.md").data.eval_results or []


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_merge_with_fitted_routers_says_how_they_came_out(ridge: tuple[Path, Any]) -> None:
    folder, report = ridge
    (result,) = results_of(folder)
    mean = sum(layer.accuracy for layer in report.layers) / len(report.layers)
    assert (result.metric_type, result.metric_value) == ("accuracy", pytest.approx(mean, abs=1e-4))
    assert result.dataset_name == "held-out text (code, math)"
    text = text_of(folder)
    for layer in report.layers:
        assert f"| {layer.layer} | {layer.accuracy:.1%} |" in text
    assert text.index(OF_THIS_MODEL) < text.index(CITATION_TITLE)
    assert "eprint = {2403.07816}" in text


def test_a_fit_replaces_the_figures(ridge: tuple[Path, Any], texts: dict[str, str], tmp_path: Path) -> None:
    domain_text = tuple(DomainText(name, (text,)) for name, text in texts.items())
    recipe = FitRecipe(str(ridge[0]), domain_text=domain_text, domain_tokens=300)
    report = fit(recipe, tmp_path / "once")
    fit(FitRecipe(str(tmp_path / "once"), domain_text=domain_text, domain_tokens=300), tmp_path / "twice")
    for name in ("once", "twice"):
        (result,) = results_of(tmp_path / name)
        mean = sum(layer.accuracy for layer in report.layers) / len(report.layers)
        assert result.metric_value == pytest.approx(mean, abs=1e-4)
        text = text_of(tmp_path / name)
        assert text.count("\n## Routers\n") == text.count(OF_THIS_MODEL) == 1
        assert text.count("Fitted since: see [below](#routers).") == 1
        assert text.rindex("(`btx fit`)") < text.index(CITATION_TITLE)
    fit(FitRecipe(str(ridge[0]), method="prompts", prompts={"code": ["w1"], "math": ["w70"]}), tmp_path / "prompts")
    assert results_of(tmp_path / "prompts") == []
    assert OF_THIS_MODEL not in text_of(tmp_path / "prompts")


def test_an_edit_keeps_the_figures_only_where_the_model_computes_the_same(
    ridge: tuple[Path, Any], tmp_path: Path
) -> None:
    edit(EditRecipe(str(ridge[0]), rename={"code": "python"}), tmp_path / "renamed")
    assert results_of(tmp_path / "renamed") == results_of(ridge[0])
    assert OF_THIS_MODEL in text_of(tmp_path / "renamed")
    changed = {
        "dropped": {"drop": ("code",), "shared": "keep"},
        "fewer": {"rename": {"code": "python"}, "num_experts_per_tok": 1},
    }
    for name, changes in changed.items():
        edit(EditRecipe(str(ridge[0]), **changes), tmp_path / name)
        assert results_of(tmp_path / name) == []
        assert OF_THIS_MODEL not in text_of(tmp_path / name)
        assert OF_AN_EARLIER_ONE in text_of(tmp_path / name)


def test_an_export_keeps_the_figures_and_an_extract_does_not(ridge: tuple[Path, Any], tmp_path: Path) -> None:
    report = export(str(ridge[0]), tmp_path / "mixtral")
    assert results_of(tmp_path / "mixtral") == results_of(ridge[0])
    (index,) = front_matter(text_of(tmp_path / "mixtral"))[0]["model-index"]
    assert index["name"] == "ridge as a Mixtral"
    assert report.warnings == ()
    assert UNTRAINED not in text_of(tmp_path / "mixtral")
    extract(str(ridge[0]), "code", tmp_path / "code")
    assert results_of(tmp_path / "code") == []
    for name in ("mixtral", "code"):
        assert CITATION_TITLE in text_of(tmp_path / name)


def test_figures_of_a_finetuning() -> None:
    entry = {
        "data": [{"name": "code"}, {"name": "math"}, {"name": "short"}],
        "held_out_perplexity": {"before": {"code": 9.123456, "math": float("inf")}, "after": {"code": 7, "math": 5.5}},
    }
    results = training_results(entry)
    assert [(result.dataset_type, result.metric_name, result.metric_value) for result in results] == [
        ("code", "Perplexity", 7.0),
        ("code", "Perplexity before the finetuning", 9.1235),
        ("math", "Perplexity", 5.5),
    ]
    text = updated_card("", "## Training\n\nx\n", "", None, results)
    card = ModelCard(text)
    assert card.data.eval_results == results
    assert card.data["tags"][0] == "btx"


def card_of(**metadata: Any) -> str:
    metadata = {"library_name": "transformers", "license": "mit", **metadata}
    return (
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n# Mine\n\n- Routers: `top_k`; random. {UNTRAINED}\n"
    )


def test_what_is_of_an_earlier_model_says_so() -> None:
    results = router_results(LAYERS, ["code"])
    assert [result.metric_value for result in results] == [0.8]
    fitted = updated_card(card_of(), f"## Routers\n\n{fit_tables(Fitted(LAYERS))}", " Fitted.", None, results)
    assert "- Routers: `top_k`; random. Fitted.\n" in fitted
    assert ModelCard(fitted).data["license"] == "mit"
    trained = updated_card(fitted, "## Training\n\nthe end\n", " Trained.", None, ())
    assert "- Routers: `top_k`; random. Fitted. Trained.\n" in trained
    assert OF_THIS_MODEL not in trained
    assert "| 0 | 75.0% |" in trained.split(OF_AN_EARLIER_ONE)[1]
    assert "model-index" not in trained
    others = updated_card(card_of(**{"model-index": [{"name": "x", "results": []}]}), "## Edited\n", "", None, None)
    assert "model-index" in others


def test_a_model_of_the_hub_is_the_base_model() -> None:
    located = Located(Path("x"), "org/llama-btx", "c0ffee")
    card = ModelCard(updated_card(card_of(base_model=["org/a"]), "## Training\n", "", located, ()))
    assert card.data.base_model == ["org/llama-btx"]
    assert card.data["base_model_relation"] == "finetune"


def test_a_card_that_its_author_wrote_stays() -> None:
    for text in ("# My model\n\nSee [this](x).\n", "---\na: [\n---\n\n# My model\n"):
        assert updated_card(text, "## Training\n", " Trained.", None, ()) == text + "\n## Training\n"


# Untrained routers


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"router_init": "random"}, ["seed", "code", "math"]),
        ({"router_init": "zeros"}, ["seed", "code", "math"]),
        ({"router_init": "ridge"}, []),
        ({"router_init": "random", "fits": [{}]}, []),
        ({"router_init": "random", "training": [{"train": "routers"}]}, []),
        ({"router_init": "random", "training": [{"train": "lora"}]}, ["seed", "code", "math"]),
        ({"router_init": "ridge", "edits": [{"router_rows": {"math": "random"}}]}, ["math"]),
        ({"router_init": "random", "edits": [{"router_rows": {"math": "ridge"}}]}, ["seed", "code"]),
        ({"router_init": "ridge", "edits": [{"router_rows": {"math": "kept"}}]}, []),
        ({"router_init": "ridge", "fits": [{}], "edits": [{"router_rows": {"math": "random"}}]}, []),
        (
            {
                "router_init": "ridge",
                "fits": [{}],
                "edits": [{"router_rows": {"math": "zeros"}, "trainings_before": 1}],
            },
            ["math"],
        ),
        (
            {"router_init": "ridge", "edits": [{"router_rows": {"law": "random"}}, {"rename": {"law": "math"}}]},
            ["math"],
        ),
    ],
)
def test_whose_router_rows_are_untrained(values: dict[str, Any], expected: list[str]) -> None:
    assert untrained_experts(values, {"expert_names": ["seed", "code", "math"]}) == expected


def test_the_parts_of_a_split_source_are_untrained_together() -> None:
    values = {"router_init": "ridge", "edits": [{"router_rows": {"math": "random"}}]}
    config = {"expert_names": ["code.0", "code.1", "math.0", "math.1"], "num_chunks": 2}
    assert untrained_experts(values, config) == ["math.0", "math.1"]


def test_whole_experts_are_untrained_each_by_its_own_name() -> None:
    values = {"router_init": "ridge", "edits": [{"router_rows": {"math": "random"}}]}
    assert untrained_experts(values, {"expert_names": ["math", "math.2"]}) == ["math"]


@pytest.mark.parametrize("without", [None, "README.md", "btx_recipe.yaml"])
def test_an_export_of_untrained_routers_warns(merged: Path, tmp_path: Path, without: str | None) -> None:
    model = shutil.copytree(merged, tmp_path / "model")
    if without:
        (model / without).unlink()
    report = export(str(model), tmp_path / "out")
    (warning,) = report.warnings
    assert str(warning).startswith("model: routers: have not been trained yet")
    assert UNTRAINED in text_of(tmp_path / "out")
    extract(str(model), "code", tmp_path / "code")  # which has no router
    assert UNTRAINED not in text_of(tmp_path / "code")


def test_an_edit_with_a_random_row_warns_and_so_does_its_export(
    ridge: tuple[Path, Any], family: Family, texts: dict[str, str], tmp_path: Path
) -> None:
    edit(EditRecipe(str(ridge[0]), add={"law": str(family.math)}, shared="keep"), tmp_path / "edited")
    assert f"- Router rows of new experts: law (random). {UNTRAINED}" in text_of(tmp_path / "edited")
    report = export(str(tmp_path / "edited"), tmp_path / "out")
    assert "the rows of law have not been trained yet" in str(report.warnings[0])
    assert f"Its routers of law are as a merge begins with them. {UNTRAINED}" in text_of(tmp_path / "out")
    given = {**texts, "law": texts["math"]}
    domain_text = tuple(DomainText(name, (text,)) for name, text in given.items())
    fit(FitRecipe(str(tmp_path / "edited"), domain_text=domain_text, domain_tokens=300), tmp_path / "fitted")
    assert UNTRAINED not in text_of(tmp_path / "fitted")
    assert export(str(tmp_path / "fitted"), tmp_path / "again").warnings == ()
