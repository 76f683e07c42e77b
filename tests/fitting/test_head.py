"""A head of its own, against solves row by row in float64; all that reads such a model knows that it has one."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from btx_merge import (
    EditRecipe,
    InputError,
    MergeRecipe,
    Options,
    check,
    edit,
    export,
    extract,
    info,
    merge,
)
from btx_merge.fitting import head
from btx_merge.publishing.checks import examine
from btx_merge.texts.references import DomainText
from tests.fitting.test_run import DOMAINS, fitted_documents, inputs_of, recipe_of, write_texts
from tests.support.common import (
    HIDDEN,
    VOCAB,
    assert_complete,
    files_of,
    force_expert,
    grow,
    load_float32,
    logits_of,
    save_seed,
    tensors_of,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FITTED = {"combine": "regmean_merged", "head": "fitted"}


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A seed and three experts far from it, all tied, and text of two domains; one with twice the weight."""
    folder = tmp_path_factory.mktemp("tied")
    save_seed(folder / "seed", tie_word_embeddings=True)
    for number, name in enumerate((*DOMAINS, "bio")):
        grow(folder / "seed", folder / name, noise=0.5, random_seed=number + 1)
    texts = write_texts(folder)
    return folder, texts | {"code": DomainText("code", texts["code"].references, 2.0)}


@pytest.fixture(scope="module")
def fitted(grown):
    """The merge, beside its sources."""
    folder, texts = grown
    merge(recipe_of(folder, texts, **FITTED), folder / "fitted")
    return folder / "fitted"


def slow_head(folder: Path, merged: Path, texts: dict[str, DomainText], own_inputs: bool = False) -> torch.Tensor:
    """Every row by itself, from what whole models read in front of their heads: [V, H] in float64."""
    sources = {name: load_float32(folder / name) for name in texts}
    model = load_float32(merged)
    mean = sum(tensors_of(folder / name)[EMBEDDING].double() for name in ("seed", *DOMAINS)) / 3
    grams, crosses, counts = {}, {}, {}
    for name, text in texts.items():
        tokens = fitted_documents(text)
        x = inputs_of(sources[name], ["lm_head"], tokens)["lm_head"]
        y = inputs_of(model, ["lm_head"], tokens, active_experts=[name])["lm_head"]
        grams[name], crosses[name] = y.T @ y / len(y), y.T @ x / len(y)
        if own_inputs:
            gram = x.T @ x / len(x)
            grams[name] = crosses[name] = 0.9 * gram + 0.1 * torch.diag(gram.diagonal())
        counts[name] = text.weight * torch.bincount(torch.cat(tokens, 1)[0], minlength=VOCAB).double() / len(x)
    rows = []
    for token in range(VOCAB):
        weights = {name: counts[name][token] + 0.1 * counts[name].sum() / VOCAB for name in texts}
        shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        left = sum(shares[name] * grams[name] for name in texts)
        penalty = 0.01 * left.diagonal().mean()
        right = sum(shares[name] * crosses[name] @ sources[name].lm_head.weight[token].double() for name in texts)
        solution = torch.linalg.solve(left + penalty * torch.eye(HIDDEN).double(), right + penalty * mean[token])
        rows.append(solution)
    return torch.stack(rows).detach()


@pytest.mark.parametrize("combine", ["regmean", "regmean_merged"])
def test_every_row_is_weighed_by_how_often_each_domain_has_its_token(grown, tmp_path, combine, monkeypatch):
    monkeypatch.setattr(head, "BINS", VOCAB)  # a matrix of its own for every row
    monkeypatch.setattr(head, "_ROWS", 3)
    folder, texts = grown
    merge(recipe_of(folder, texts, combine=combine, head="fitted"), tmp_path / "btx")
    expected = slow_head(folder, tmp_path / "btx", texts, own_inputs=combine == "regmean")
    # whole models, document by document, here; in windows and layer by layer there, in float32
    torch.testing.assert_close(tensors_of(tmp_path / "btx")[HEAD].double(), expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(("bins", "tolerance"), [(64, 1e-3), (16, 3e-2)])
def test_bins_change_little(grown, tmp_path, bins, tolerance, monkeypatch):
    """Relative to what the head is away from the mean that it sets out from."""
    monkeypatch.setattr(head, "BINS", bins)
    folder, texts = grown
    merge(recipe_of(folder, texts, **FITTED), tmp_path / "btx")
    expected, found = slow_head(folder, tmp_path / "btx", texts), tensors_of(tmp_path / "btx")[HEAD].double()
    mean = sum(tensors_of(folder / name)[EMBEDDING].double() for name in ("seed", *DOMAINS)) / 3
    off = float((found - expected).norm() / (expected - mean).norm())
    assert off < tolerance


def test_as_many_bins_as_rows_differ_are_exact_and_a_few_are_near():
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(0, 3, (500, 3), generator=generator).double()  # 27 kinds of rows at most
    few[0] = 0  # in no text
    many = torch.rand(5000, 4, generator=generator).double().pow(8) * 1000
    for counts, radius in ((few, 1e-12), (many, 0.2)):
        bins, middles = head.share_bins(counts)
        smooth = counts + 0.1 * counts.sum(dim=0) / len(counts)
        shares = smooth / smooth.sum(dim=1, keepdim=True)
        assert len(middles) <= head.BINS
        assert float((shares - middles[bins]).norm(dim=1).max()) < radius
        torch.testing.assert_close(middles.sum(dim=1), torch.ones(len(middles)).double())
        nearest = ((shares[:, None] - middles) ** 2).sum(dim=2).argmin(dim=1)
        assert torch.equal(bins, nearest)


def test_it_brings_domains_nearer_to_their_sources_than_the_embedding_does(grown, fitted, tmp_path):
    """In the logits of the tokens that the domain has."""
    folder, texts = grown
    merge(recipe_of(folder, texts, combine="regmean_merged"), tmp_path / "tied")
    for name, text in texts.items():
        tokens = fitted_documents(text)
        frequency = torch.bincount(torch.cat(tokens, 1)[0], minlength=VOCAB)
        source, apart = load_float32(folder / name), {}
        for merged in (tmp_path / "tied", fitted):
            model, errors = load_float32(merged), torch.zeros(VOCAB)
            with torch.no_grad():
                for ids in tokens[:20]:
                    found = model(input_ids=ids, active_experts=[name]).logits
                    errors += (found - source(input_ids=ids).logits).square().sum(dim=(0, 1))
            apart[merged.name] = float((frequency * errors).sum())
        assert apart["fitted"] < 0.8 * apart["tied"], name


def test_tied_sources_give_an_untied_model(fitted):
    """The card and `info` name its head, and count it."""
    assert_complete(fitted)
    assert json.loads((fitted / "config.json").read_text())["tie_word_embeddings"] is False
    assert tensors_of(fitted)[HEAD].shape == (VOCAB, HIDDEN)
    assert "\n- Head: of its own" in (fitted / "README.md").read_text()
    found = info(str(fitted))
    assert found.history == ("merged: shared weights regmean_merged, head fitted, routers random",)
    assert found.parameters == sum(tensor.numel() for tensor in tensors_of(fitted).values())


def test_the_recipe_gives_it_again(grown, fitted, tmp_path):
    _, texts = grown
    again = MergeRecipe.from_yaml(fitted, domain_text=texts)
    assert again.head == "fitted"
    merge(again, tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(fitted)


def test_statistics_of_a_head_are_reused_and_told_from_those_without(grown, tmp_path):
    folder, texts = grown
    for name in ("first", "again"):
        merge(recipe_of(folder, texts, **FITTED), tmp_path / name, Options(statistics=tmp_path / "statistics"))
    assert files_of(tmp_path / "first") == files_of(tmp_path / "again")
    plain = recipe_of(folder, texts, combine="regmean_merged")
    with pytest.raises(InputError, match="collected with another"):
        merge(plain, tmp_path / "out", Options(statistics=tmp_path / "statistics"))


def test_it_is_exported(fitted, tmp_path):
    export(str(fitted), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is MixtralForCausalLM
    assert torch.equal(logits_of(model.eval()), logits_of(load_float32(fitted)))


def test_an_expert_is_extracted(fitted, tmp_path):
    extract(str(fitted), "math", tmp_path / "out")
    model = load_float32(fitted)
    force_expert(model, 2)
    assert torch.equal(logits_of(load_float32(tmp_path / "out")), logits_of(model))


def test_experts_come_and_go(grown, fitted, tmp_path):
    """The head moves by the difference of the plain means, in which a tied source's is its embedding."""
    folder, _ = grown
    recipe = EditRecipe(str(fitted), add={"bio": str(folder / "bio")}, drop=("math",), allow_unrelated=True)
    assert edit(recipe, tmp_path / "out").shared == "updated"
    assert_complete(tmp_path / "out")
    of = {name: tensors_of(folder / name)[EMBEDDING] for name in ("seed", "code", "math", "bio")}
    moved = (of["bio"] - of["math"]) / 3
    before, after = tensors_of(fitted), tensors_of(tmp_path / "out")
    torch.testing.assert_close(after[HEAD] - before[HEAD], moved, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("loaded_here")
def test_it_may_be_published(fitted):
    checked = examine(fitted)
    assert "model.safetensors" in checked.files


def test_tied_and_untied_sources_may_be_mixed(grown, tmp_path):
    folder, texts = grown

    def untie(model):
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.01)

    grow(folder / "seed", tmp_path / "code", noise=0.5, change=untie)
    experts = {"code": str(tmp_path / "code"), "math": str(folder / "math")}
    recipe = MergeRecipe(str(folder / "seed"), experts, domain_text=texts, allow_unrelated=True, **FITTED)
    merge(recipe, tmp_path / "out")
    assert_complete(tmp_path / "out")


def test_without_a_fit_there_is_none():
    with pytest.raises(InputError, match=r"head: fitted, with combine: mean; expected combine: regmean or regmean_m"):
        MergeRecipe("seed", {"code": "a"}, head="fitted")


def test_untie_alone_says_that_it_changes_nothing(grown):
    folder, _ = grown
    (warning,) = check(recipe_of(folder, untie=True)).warnings
    assert str(warning).startswith("recipe: untie: changes nothing: all sources are tied, and so is the result. ")
    assert "--head fitted" in str(warning)
    assert not check(recipe_of(folder)).warnings
