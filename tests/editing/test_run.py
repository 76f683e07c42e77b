"""A merged model whose experts are changed, against merges of the new set and against itself."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from btx_merge import EditRecipe, InputError, MergeError, MergeRecipe, NonFiniteError, Options, check, edit, merge
from btx_merge.architectures.btx import SELECTION_BIAS
from btx_merge.architectures.llama import EMBEDDING
from btx_merge.cli.app import app
from btx_merge.fitting.temperatures import TEMPERATURES
from btx_merge.sources.source import ExpertSpec
from tests.fitting.test_logistic import NEAR_THE_OPTIMUM, newton
from tests.fitting.test_run import GATE, assert_same_direction, fitted_documents, inputs_of, write_texts
from tests.support.common import (
    LAYERS,
    Told,
    assert_complete,
    edit_json,
    files_of,
    grow,
    load_float32,
    logits_of,
    raw_bytes,
    save_seed,
    tensors_of,
    tiny_tokenizer,
)

NAMES = ("code", "math", "bio", "math-2")


def experts_of(root: Path, *names: str) -> dict[str, str]:
    return {name: str(root / name) for name in names}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A seed and what grew from it, beside which merges are made: untied float32."""
    folder = tmp_path_factory.mktemp("edit")
    save_seed(folder / "seed")
    for number, name in enumerate(NAMES):
        grow(folder / "seed", folder / name, noise=0.3, random_seed=number + 1)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"), ("code", "math", "bio"))


def merged(root: Path, name: str, *experts: str, **values) -> Path:
    """A merge beside its sources, made once."""
    folder = root / name
    if not folder.exists():
        merge(MergeRecipe(str(root / "seed"), experts_of(root, *experts), **values), folder)
    return folder


@pytest.fixture
def two(root):
    return merged(root, "two", "code", "math")


def edited(model: Path, output: Path, **values):
    return edit(EditRecipe(str(model), **values), output)


def same_but_for_routers(found: Path, expected: Path) -> None:
    ours, wanted = tensors_of(found), tensors_of(expected)
    assert ours.keys() == wanted.keys()
    differing = [name for name in ours if raw_bytes(ours[name]) != raw_bytes(wanted[name])]
    assert all(name.endswith("mlp.gate.weight") for name in differing), differing


def assert_same_weights(found: Path, expected: Path) -> None:
    """Every tensor has the same bytes."""
    ours, wanted = tensors_of(found), tensors_of(expected)
    assert {name: raw_bytes(tensor) for name, tensor in ours.items()} == {
        name: raw_bytes(tensor) for name, tensor in wanted.items()
    }


def assert_rows(found: Path, model: Path, origins: list[int | None]) -> None:
    """The routers' rows are those of the model, bit for bit; None: another."""
    ours, before = tensors_of(found), tensors_of(model)
    for layer in range(LAYERS):
        rows, old = ours[GATE.format(layer)], before[GATE.format(layer)]
        assert len(rows) == len(origins)
        for row, origin in zip(rows, origins, strict=True):
            if origin is not None:
                assert raw_bytes(row) == raw_bytes(old[origin])


def test_an_expert_is_added_as_if_merged_with_it(root, two, tmp_path):
    report = edited(two, tmp_path / "out", add={"bio": str(root / "bio")})
    assert_complete(tmp_path / "out")
    assert (report.shared, report.shared_reason) == ("updated", "as if merged with the new set")
    assert report.experts == ("seed", "code", "math", "bio")
    assert report.router_rows == {"bio": "random"}
    same_but_for_routers(tmp_path / "out", merged(root, "three", "code", "math", "bio"))
    assert_rows(tmp_path / "out", two, [0, 1, 2, None])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == json.loads((root / "three/config.json").read_text())
    row = tensors_of(tmp_path / "out")[GATE.format(0)][3]
    assert 0.5 * config["initializer_range"] < row.std() < 2 * config["initializer_range"]


def test_the_same_edit_gives_the_same_bytes(root, two, tmp_path):
    for name in ("one", "other"):
        edited(two, tmp_path / name, add={"bio": str(root / "bio")}, random_seed=3)
    edited(two, tmp_path / "third", add={"bio": str(root / "bio")}, random_seed=4)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")
    assert files_of(tmp_path / "one")["model.safetensors"] != files_of(tmp_path / "third")["model.safetensors"]
    edited(two, tmp_path / "more", add={"math-2": str(root / "math-2"), "bio": str(root / "bio")}, random_seed=3)
    for layer in range(LAYERS):  # a row does not depend on what else is added
        row = tensors_of(tmp_path / "more")[GATE.format(layer)][4]
        assert torch.equal(row, tensors_of(tmp_path / "one")[GATE.format(layer)][3])


RECIPES = {
    "plain": {},
    "bfloat16 in shards": {"dtype": "bfloat16", "max_shard_size": "100KB"},
    "weighted": {"combine": "weighted", "seed_weight": 3.0},
    "seed": {"combine": "seed"},
    "ties": {"combine": "ties", "density": 0.5},
    "dare": {"combine": "dare_linear", "density": 0.6, "random_seed": 7},
    "split": {"expert_mode": "split", "num_chunks": 2, "router_pre_softmax": True},
    "no seed": {"seed_expert": False, "num_experts_per_tok": 1},
    "soft": {"router_type": "soft"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_dropping_what_was_added_gives_back_the_same_weights(root, tmp_path, name):
    model = merged(root, f"two {name}", "code", "math", **RECIPES[name])
    bio = ExpertSpec(str(root / "bio"), 2.0 if name == "weighted" else 1.0)
    experts = {**experts_of(root, "code", "math"), "bio": bio}
    added = edited(model, tmp_path / "added", add={"bio": experts["bio"]})
    assert added.shared == "updated"
    merge(
        MergeRecipe(str(root / "seed"), {**experts_of(root, "code", "math"), "bio": bio}, **RECIPES[name]),
        tmp_path / "fresh",
    )
    same_but_for_routers(tmp_path / "added", tmp_path / "fresh")
    # the sources lie beside the model that was merged, not beside its copy
    moved = {"seed": str(root / "seed"), **experts_of(root, "code", "math", "bio")}
    edited(tmp_path / "added", tmp_path / "back", drop=("bio",), sources=moved)
    assert_same_weights(tmp_path / "back", model)


def perturbed(model: Path, folder: Path, scale: float = 0.02) -> Path:
    """A copy whose shared weights and routers a finetuning might have moved: a third of the values of each."""
    from btx_merge.fitting.checkpoint import Checkpoint

    shutil.copytree(model, folder)
    checkpoint = Checkpoint(folder, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for name in checkpoint.tensors:
        if ".experts." not in name:
            values = checkpoint.read(name)
            moved = torch.rand(values.shape, generator=generator) < 0.33
            checkpoint.write(name, values + scale * moved * torch.randn(values.shape, generator=generator))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_finetuned_moves_by_the_difference_of_the_merges(root, tmp_path, dtype):
    before = merged(root, f"two {dtype}", "code", "math", dtype=dtype)
    model = perturbed(before, tmp_path / "tuned")
    moved = {"seed": str(root / "seed"), **experts_of(root, "code", "math", "bio")}
    edited(model, tmp_path / "out", add={"bio": str(root / "bio")}, sources=moved)
    found, tuned, merge_before = tensors_of(tmp_path / "out"), tensors_of(model), tensors_of(before)
    sources = [tensors_of(root / name) for name in ("seed", "code", "math", "bio")]
    for name, tensor in found.items():
        if ".mlp." in name:
            continue
        old, new = (sum(source[name].double() for source in sources[:n]) / n for n in (3, 4))
        exact = tuned[name].double() + (new - old)
        untouched = tuned[name] == merge_before[name]
        exact[untouched] = new[untouched]
        info = torch.finfo(tensor.dtype)
        # half a unit of the dtype, and a few of float32 for the sums
        allowed = info.eps * exact.abs() / 2 + 8 * torch.finfo(torch.float32).eps * (1 + exact.abs())
        assert ((tensor.double() - exact).abs() <= allowed).all(), name
        assert not untouched.all()


def test_several_experts_come_and_go_again(root, two, tmp_path):
    moved = {"seed": str(root / "seed"), **experts_of(root, "code", "math")}
    edited(two, tmp_path / "a", add={"bio": str(root / "bio")})
    further = {**moved, "bio": str(root / "bio")}
    edited(tmp_path / "a", tmp_path / "b", add={"m2": str(root / "math-2")}, shared="keep", sources=further)
    edited(tmp_path / "b", tmp_path / "a2", drop=("m2",), shared="keep")
    assert_same_weights(tmp_path / "a2", tmp_path / "a")
    edited(tmp_path / "a2", tmp_path / "two", drop=("bio",), sources=further)
    assert_same_weights(tmp_path / "two", two)


def test_a_model_that_transformers_saved_again(root, two, tmp_path):
    """Another order of tensors, other files, no recipe: the sources are unknown, so shared weights stay."""
    load_float32(two).save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    report = edited(tmp_path / "saved", tmp_path / "added", add={"bio": str(root / "bio")})
    assert report.shared == "kept"
    assert "no recipe" in report.shared_reason
    assert_complete(tmp_path / "added")
    edited(tmp_path / "added", tmp_path / "back", drop=("bio",))
    assert_same_weights(tmp_path / "back", tmp_path / "saved")


def test_an_expert_is_dropped(root, tmp_path):
    three = merged(root, "three", "code", "math", "bio")
    report = edited(three, root / "without", drop=("code",))
    try:
        same_but_for_routers(root / "without", merged(root, "math and bio", "math", "bio"))
        assert_rows(root / "without", three, [0, 2, 3])
        assert report.router_rows == {}
        again = edited(root / "without", tmp_path / "again", add={"code": str(root / "code")})
        assert again.experts == ("seed", "math", "bio", "code")
    finally:
        shutil.rmtree(root / "without")
    assert edited(three, tmp_path / "no seed", drop=("seed", "bio")).experts == ("code", "math")
    fresh = merged(root, "without seed", "code", "math", seed_expert=False)
    same_but_for_routers(tmp_path / "no seed", fresh)


def test_an_expert_is_replaced_in_its_place(root, two, tmp_path):
    report = edited(two, tmp_path / "out", replace={"math": str(root / "math-2")})
    assert report.router_rows == {"math": "kept"}
    merge(
        MergeRecipe(str(root / "seed"), {"code": str(root / "code"), "math": str(root / "math-2")}), tmp_path / "fresh"
    )
    same_but_for_routers(tmp_path / "out", tmp_path / "fresh")
    assert_rows(tmp_path / "out", two, [0, 1, 2])
    edited(two, tmp_path / "new row", replace={"math": str(root / "math-2")}, router_init="zeros")
    assert_rows(tmp_path / "new row", two, [0, 1, None])
    assert not tensors_of(tmp_path / "new row")[GATE.format(1)][2].any()


def test_a_name_is_changed(two, tmp_path):
    edited(two, tmp_path / "out", rename={"code": "python"})
    assert files_of(tmp_path / "out")["model.safetensors"] == files_of(two)["model.safetensors"]
    assert json.loads((tmp_path / "out/config.json").read_text())["expert_names"] == ["seed", "python", "math"]
    recipe = yaml.safe_load((tmp_path / "out/btx_recipe.yaml").read_text())
    assert list(recipe["experts"]) == ["python", "math"]
    assert "| python | `code` (a local folder)" in (tmp_path / "out/README.md").read_text()


def test_all_at_once(root, two, tmp_path):
    report = edited(
        two,
        tmp_path / "out",
        drop=("seed",),
        replace={"math": str(root / "math-2")},
        rename={"code": "python"},
        add={"bio": str(root / "bio")},
        sources={"code": str(root / "code")},  # by the name that it has in the model
        shared="update",
    )
    assert report.experts == ("python", "math", "bio")
    assert_complete(tmp_path / "out")
    names = {"python": "code", "math": "math-2", "bio": "bio"}
    experts = {name: str(root / folder) for name, folder in names.items()}
    merge(MergeRecipe(str(root / "seed"), experts, seed_expert=False), tmp_path / "fresh")
    same_but_for_routers(tmp_path / "out", tmp_path / "fresh")
    assert_rows(tmp_path / "out", two, [1, 2, None])
    recipes = [yaml.safe_load((tmp_path / name / "btx_recipe.yaml").read_text()) for name in ("out", "fresh")]
    assert recipes[0]["resolved"] == recipes[1]["resolved"]
    assert recipes[0]["resolved"]["sources"].keys() == {"seed", "python", "math", "bio"}


def test_shared_weights_can_be_kept_and_move_later(root, two, tmp_path):
    report = edited(two, root / "kept", add={"bio": str(root / "bio")}, shared="keep")
    try:
        assert (report.shared, report.shared_reason) == ("kept", "as asked")
        kept, before = tensors_of(root / "kept"), tensors_of(two)
        assert all(torch.equal(kept[name], before[name]) for name in kept if ".mlp." not in name)
        assert yaml.safe_load((root / "kept/btx_recipe.yaml").read_text())["shared_over"]["experts"].keys() == {
            "code",
            "math",
        }
        # from what they are of, not from what the experts are
        report = edited(root / "kept", tmp_path / "out", drop=("code",), shared="update")
        same_but_for_routers(tmp_path / "out", merged(root, "math and bio", "math", "bio"))
        assert "shared_over" not in yaml.safe_load((tmp_path / "out/btx_recipe.yaml").read_text())
    finally:
        shutil.rmtree(root / "kept")


def test_what_the_sources_do_not_allow(root, two, tmp_path):
    shutil.copytree(two, tmp_path / "moved")
    report = edited(tmp_path / "moved", tmp_path / "out", add={"bio": str(root / "bio")})
    assert report.shared == "kept"
    assert report.shared_reason.startswith("seed: seed: ")
    (warning,) = report.warnings
    assert "shared weights: kept, for want of seed, code, math: " in str(warning)
    assert str(warning).count("--shared keep") == 1
    assert "Give --source seed=MODEL --source code=MODEL --source math=MODEL where they lie now" in str(warning)
    with pytest.raises(InputError, match="seed: seed: "):
        edited(tmp_path / "moved", tmp_path / "again", add={"bio": str(root / "bio")}, shared="update")
    assert not (tmp_path / "again").exists()
    moved = {"seed": str(root / "seed"), "code": str(root / "bio"), "math": str(root / "math")}
    with pytest.raises(InputError, match="bio is not what the expert code was made from") as caught:
        edited(tmp_path / "moved", tmp_path / "again", drop=("math",), shared="update", sources=moved)
    assert "--source NAME=MODEL" in str(caught.value)


def test_folded_norms_are_folded_into_the_norm_that_is_there(root, tmp_path):
    model = merged(root, "two folded", "code", "math", fold_norms=True)
    report = edited(model, tmp_path / "out", add={"bio": str(root / "bio")})
    assert report.shared == "kept"
    assert "fold_norms" in report.shared_reason
    found, bio = tensors_of(tmp_path / "out"), tensors_of(root / "bio")
    for layer in range(LAYERS):
        front = f"model.layers.{layer}."
        norm = "post_attention_layernorm.weight"
        ratio = bio[front + norm].double() / found[front + norm].double()
        gate = bio[front + "mlp.gate_proj.weight"].double() * ratio
        torch.testing.assert_close(
            found[front + "mlp.experts.gate_up_proj"][3][:96].double(), gate, atol=1e-7, rtol=1e-6
        )
        before = tensors_of(model)[front + "mlp.experts.gate_up_proj"]
        assert torch.equal(found[front + "mlp.experts.gate_up_proj"][:3], before)
    edited(tmp_path / "out", tmp_path / "back", drop=("bio",))
    assert_same_weights(tmp_path / "back", model)


@pytest.mark.parametrize("shared", ["update", "keep"])
def test_new_tokens_come_behind_the_others(root, tmp_path, shared):
    def resize(model):
        model.resize_token_embeddings(131, mean_resizing=False)

    tokenizer = tiny_tokenizer(["<gene>", "<cell>", "<dna>"])
    grow(root / "seed", tmp_path / "bio", random_seed=9, change=resize, tokenizer=tokenizer)
    model = merged(root, "two", "code", "math")
    moved = {"seed": str(root / "seed"), **experts_of(root, "code", "math"), "bio": str(tmp_path / "bio")}
    edited(model, tmp_path / "out", add={"bio": str(tmp_path / "bio")}, shared=shared, sources=moved)
    assert_complete(tmp_path / "out")
    found, before, bio = tensors_of(tmp_path / "out"), tensors_of(model), tensors_of(tmp_path / "bio")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[name][128:], bio[name][128:])
        assert torch.equal(found[name][:128], before[name]) == (shared == "keep")
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 131
    written = json.loads((tmp_path / "out/tokenizer.json").read_text())["added_tokens"]
    assert [entry["content"] for entry in written][-3:] == ["<gene>", "<cell>", "<dna>"]
    if shared == "update":
        experts = {**experts_of(root, "code", "math"), "bio": str(tmp_path / "bio")}
        merge(MergeRecipe(str(root / "seed"), experts), tmp_path / "fresh")
        same_but_for_routers(tmp_path / "out", tmp_path / "fresh")
        assert files_of(tmp_path / "out")["tokenizer.json"] == files_of(tmp_path / "fresh")["tokenizer.json"]
    # ids of a model never change, so its tokens stay when the expert that brought them goes
    edited(tmp_path / "out", tmp_path / "other", drop=("bio", "code"), sources=moved)
    assert_complete(tmp_path / "other")
    assert json.loads((tmp_path / "other/config.json").read_text())["vocab_size"] == 131


def test_tied_embeddings(tmp_path):
    save_seed(tmp_path / "seed", tie_word_embeddings=True)
    for number, name in enumerate(("code", "bio")):
        grow(tmp_path / "seed", tmp_path / name, random_seed=number + 1)
    merge(MergeRecipe(str(tmp_path / "seed"), experts_of(tmp_path, "code")), tmp_path / "one")
    edited(tmp_path / "one", tmp_path / "out", add=experts_of(tmp_path, "bio"))
    merge(MergeRecipe(str(tmp_path / "seed"), experts_of(tmp_path, "code", "bio")), tmp_path / "fresh")
    same_but_for_routers(tmp_path / "out", tmp_path / "fresh")


def test_an_adapter_on_the_seed_becomes_an_expert(root, two, tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(root / "seed")
    model = get_peft_model(model, LoraConfig(target_modules=["gate_proj", "q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora")
    model.merge_and_unload().save_pretrained(tmp_path / "whole")
    edited(two, tmp_path / "out", add={"bio": str(tmp_path / "lora")})
    edited(two, tmp_path / "expected", add={"bio": str(tmp_path / "whole")})
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


def test_a_bias_that_ranks_experts_keeps_its_values(root, two, tmp_path):
    model = load_float32(two)
    model.config.router_selection_bias = True
    model.save_pretrained(tmp_path / "plain")
    again = type(model).from_pretrained(tmp_path / "plain", router_selection_bias=True)
    for layer, decoder in enumerate(again.model.layers):
        decoder.mlp.routing.e_score_correction_bias.copy_(torch.tensor([0.5, -0.25, 0.125]) + layer)
    again.save_pretrained(tmp_path / "biased")
    edited(tmp_path / "biased", tmp_path / "out", add={"bio": str(root / "bio")}, drop=("seed",), shared="keep")
    assert_complete(tmp_path / "out")
    for layer in range(LAYERS):
        bias = tensors_of(tmp_path / "out")[SELECTION_BIAS.format(layer=layer)]
        assert bias.tolist() == [-0.25 + layer, 0.125 + layer, 0.0]


def test_active_experts_are_those_that_were(two, tmp_path):
    shutil.copytree(two, tmp_path / "model")
    edit_json(tmp_path / "model/config.json", active_experts=["code", 2])
    edited(tmp_path / "model", tmp_path / "out", drop=("seed",), rename={"code": "python"})
    assert json.loads((tmp_path / "out/config.json").read_text())["active_experts"] == ["python", "math"]
    edit_json(tmp_path / "model/config.json", active_experts=["code"])
    edited(tmp_path / "model", tmp_path / "none", drop=("code",))
    assert json.loads((tmp_path / "none/config.json").read_text())["active_experts"] is None


@pytest.mark.parametrize("given", ["all", "bio", "all, ridge"])
def test_a_row_is_fitted_on_text(root, two, texts, tmp_path, given, monkeypatch):
    """As `btx fit` would fit it; the factor on it is the best, or the smallest that wins its own tokens."""
    monkeypatch.setattr("btx_merge.fitting.logistic._GRADIENT", NEAR_THE_OPTIMUM)
    used = (texts["bio"],) if given == "bio" else tuple(texts.values())
    asked = {"router_init": "ridge"} if given == "all, ridge" else {}
    report = edited(two, tmp_path / "out", add={"bio": str(root / "bio")}, domain_text=used, **asked)
    way = "logistic" if given == "all" else "ridge"
    assert report.router_rows == {"bio": way}
    assert_rows(tmp_path / "out", two, [0, 1, 2, None])
    same_but_for_routers(tmp_path / "out", merged(root, "three", "code", "math", "bio"))
    model = load_float32(tmp_path / "out")
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(LAYERS)]
    inputs = {text.name: inputs_of(model, gates, fitted_documents(text), active_experts=[text.name]) for text in used}
    for layer, gate in enumerate(gates):
        rows = tensors_of(tmp_path / "out")[GATE.format(layer)]
        if way == "logistic":
            seed, code, math = rows[:3]
            by_domain = [inputs[name][gate] for name in ("bio", "code", "math")]
            stay = torch.stack([code, math, seed])
            expected, tolerance = newton(by_domain, [1 / 3] * 3, stay, fitted=1)[0], 5e-3
        else:
            gram = sum(found[gate].T @ found[gate] / len(found[gate]) for found in inputs.values())
            own = inputs["bio"][gate].mean(dim=0)
            penalty = 0.001 * gram.diagonal().mean() * torch.eye(64).double()
            expected, tolerance = torch.linalg.inv(gram + penalty) @ own, 1e-3
        factor = assert_same_direction(rows[3], expected, tolerance)
        assert factor == pytest.approx(report.layers[layer].temperature, rel=1e-2)
        assert report.layers[layer].temperature in TEMPERATURES
        if given == "bio":
            assert report.layers[layer].accuracy >= 0.9
            smaller = rows.clone().double()
            smaller[3] /= 2**0.5  # the next smaller one, on text that it was not chosen on
            first = report.layers[layer].temperature == TEMPERATURES[0]
            wins = ((inputs["bio"][gate] @ smaller.T).argmax(dim=-1) == 3).double().mean()
            assert first or wins < 0.95
    record = yaml.safe_load((tmp_path / "out/btx_recipe.yaml").read_text())["edits"][0]
    assert [text["name"] for text in record["domain_text"]] == [text.name for text in used]
    assert ("router_ridge" in record) == (way == "ridge")
    assert str(tmp_path) not in (tmp_path / "out/btx_recipe.yaml").read_text()


def test_a_text_of_two_domains_is_a_warning(root, two, texts, tmp_path):
    same = (texts["bio"], replace(texts["bio"], name="code"))
    report = edited(two, tmp_path / "out", add={"bio": str(root / "bio")}, domain_text=same)
    assert "the same text for several domains" in str(report.warnings[-1])


def test_a_recipe_of_the_result_is_that_of_the_new_set(root, two, tmp_path):
    """`btx merge` of it is the fresh merge; what was done to this model is recorded beside."""
    edited(two, root / "added", add={"bio": str(root / "bio")})
    try:
        done = CliRunner().invoke(app, ["merge", "--recipe", str(root / "added"), "-o", str(tmp_path / "out")])
        assert done.exit_code == 0, done.output
        assert "the model was edited since it was merged; its recipe gives the merge alone" in done.stderr
        assert files_of(tmp_path / "out") == files_of(merged(root, "three", "code", "math", "bio"))
        recipe = yaml.safe_load((root / "added/btx_recipe.yaml").read_text())
        assert recipe["edits"][0]["add"] == ["bio"]
        assert recipe["experts"]["bio"] == {"model": "bio", "weight": 1.0, "base": None}
        for name, folder in {"seed": "seed", "code": "code", "math": "math", "bio": "math-2"}.items():
            shutil.copytree(root / folder, tmp_path / "moved" / name)
        shutil.copytree(root / "added", tmp_path / "moved/added")
        with pytest.raises(InputError, match=r"^bio: .*: not the model that this recipe was written for"):
            check(MergeRecipe.from_yaml(tmp_path / "moved/added"))
    finally:
        shutil.rmtree(root / "added")


def test_the_card_is_of_the_new_set(root, two, tmp_path):
    readme = root / "bio/README.md"
    readme.write_text("---\nbase_model: [org/bio-base]\nlicense: mit\nlanguage: [la]\n---\n")
    shutil.copytree(two, tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text()
    card = card.replace(
        "library_name", "base_model: [org/a]\nbase_model_relation: merge\nlicense: mit\nlibrary_name", 1
    )
    (tmp_path / "model/README.md").write_text(card + "\nWhat I wrote myself.\n")
    record = tmp_path / "model/btx_recipe.yaml"
    models = {"code": "org/a@v1", "math": "org/a@v2"}  # of one repository: it stays with the one that does
    record.write_text(yaml.safe_dump({**yaml.safe_load(record.read_text()), "experts": models}))
    moved = {"seed": str(root / "seed"), **experts_of(root, "code", "math")}
    edited(tmp_path / "model", tmp_path / "out", add={"bio": str(root / "bio")}, drop=("math",), sources=moved)
    readme.unlink()
    text = (tmp_path / "out/README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == ["org/a", "org/bio-base"]
    assert (metadata["base_model_relation"], metadata["license"], metadata["language"]) == ("merge", "mit", ["la"])
    rows = [line for line in text.splitlines() if line.startswith("| ") and "local folder" in line]
    assert rows == [
        "| seed | `seed` (a local folder) |  | 0 |",
        "| code | `code` (a local folder) |  | 1 |",
        "| bio | `bio` (a local folder) |  | 2 |",
    ]
    assert "`mean` over `seed`, `code`, `bio`." in text
    assert "What I wrote myself." in text
    assert "- Dropped: math.\n- Added: bio.\n- Shared weights: updated." in text
    assert str(root) not in text


WRONG = {
    "nothing": ({}, "nothing to change; expected at least one of them"),
    "no such expert": ({"drop": ("cod",)}, "model: --drop: no expert cod; expected one of seed, code, math"),
    "name taken": ({"add": {"code": "{root}/bio"}}, "two experts code; expected one. Choose another name"),
    "rename to one": ({"rename": {"code": "math"}}, "--rename: two experts math"),
    "twice": ({"drop": ("code",), "rename": {"code": "x"}}, "code: dropped, replaced and renamed at once"),
    "the seed": ({"replace": {"seed": "{root}/bio"}}, "replace: the name 'seed'"),
    "rename the seed": ({"rename": {"seed": "x"}}, "--rename: the seed; expected another expert"),
    "not there": ({"add": {"bio": "{root}/nowhere"}}, "bio: .*nowhere: no such folder"),
    "unrelated": ({"add": {"bio": "{root}/other"}}, "bio: weights: not grown from the seed"),
    "too few": ({"drop": ("code", "math")}, r"num_experts_per_tok: 2; expected 1, for there is 1 expert"),
    "all": (
        {"drop": ("seed", "code", "math")},
        "--drop: all experts; expected at least one that stays. Leave one out, or --add",
    ),
    "text": ({"drop": ("code",), "domain_text": "math"}, "no new expert's row is fitted on it"),
    "no text": ({"add": {"bio": "{root}/bio"}, "router_init": "ridge"}, "none for bio; expected text of every new"),
    "no contrast": (
        {"add": {"bio": "{root}/bio"}, "router_init": "logistic", "domain_text": "bio"},
        r"--domain-text: of new experts alone; expected text of others.*Give text of an expert that stays",
    ),
    "penalty": (
        {"add": {"bio": "{root}/bio"}, "router_ridge": 0.1},
        "router_ridge: 0.1, which rows that are not by ridge regression do not use. Say router_init: ridge, or leave",
    ),
    "shared": ({"drop": ("code",), "shared": "no"}, "shared: 'no'; expected one of auto, update, keep"),
    "name": ({"add": {"a b": "{root}/bio"}}, "add: the name 'a b'; expected letters"),
    "seed again": ({"add": {"seed": "{root}/bio"}}, "add: the name 'seed'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(root, two, texts, tmp_path, name):
    if not (root / "other").exists():
        save_seed(root / "other", seed=5)
    values, expected = WRONG[name]
    values = {
        key: {expert: model.format(root=root) for expert, model in value.items()} if isinstance(value, dict) else value
        for key, value in values.items()
    }
    if "domain_text" in values:
        values["domain_text"] = (texts[values["domain_text"]],)
    before = files_of(two)
    with pytest.raises(InputError, match=expected):
        edited(two, tmp_path / "out", **values)
    assert files_of(two) == before
    assert list(tmp_path.iterdir()) == []


DAMAGED = {
    "experts": [
        5,
        "code",
        {"code": 5},
        {"code": {"model": None}},
        {"code": {"model": "x", "weight": "much"}},
        {1: "x"},
    ],
    "training": [5, [5], "routers", {"train": 1}],
    "edits": [5, "x"],
    "seed": [5, ["x"]],
    "shared_over": [5, {"experts": 5}, {"seed": {}}],
    "seed_weight": ["much", [1], -1, float("inf")],
    "max_shard_size": ["much", 5],
    "resolved": [5],
    "fold_norms": ["yes", 2],
    "prompts": [5, ["a"]],
    "domain_text": [5, ["a"]],
}


@pytest.mark.parametrize("key", DAMAGED)
def test_a_models_own_recipe_that_is_damaged(root, two, tmp_path, key):
    shutil.copytree(two, tmp_path / "model")
    file = tmp_path / "model/btx_recipe.yaml"
    values = yaml.safe_load(file.read_text())
    for number, value in enumerate(DAMAGED[key]):
        file.write_text(yaml.safe_dump({**values, key: value}))
        with pytest.raises(InputError, match=rf"model: .*btx_recipe.yaml: ([a-z_]+\.)?{key}.*; expected ") as caught:
            edited(tmp_path / "model", tmp_path / f"out{number}", add={"bio": str(root / "bio")})
        assert "remove it: then the sources are unknown" in str(caught.value)
    file.unlink()
    assert edited(tmp_path / "model", tmp_path / "out", drop=("code",)).shared == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("active", [["cod"], ["code", "code"], ["code", 1], [3], [-1], [], "code", 5, [None], [True]])
def test_active_experts_that_are_none(two, tmp_path, active):
    shutil.copytree(two, tmp_path / "model")
    edit_json(tmp_path / "model/config.json", active_experts=active)
    with pytest.raises(InputError, match=r"model: config\.json: active_experts: .*; expected a list of different"):
        edited(tmp_path / "model", tmp_path / "out", drop=("math",))


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), 0, -1.0, "0.02", True])
def test_deviations_that_cannot_be_meant(two, root, value):
    for recipe in (
        lambda: EditRecipe(str(two), drop=("code",), router_std=value),
        lambda: MergeRecipe("x", {"a": "b"}, router_std=value),
    ):
        with pytest.raises(InputError, match=r"recipe: router_std: .*; expected "):
            recipe()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_random_rows_beyond_the_dtype(root, tmp_path, dtype):
    """As in a merge: nothing infinite is written, and numpy has nothing to warn of."""
    std = {"float32": 1e39, "float16": 1e5}[dtype]
    one = merged(root, tmp_path / "one", "code", dtype=dtype)
    with pytest.raises(NonFiniteError, match=r"mlp\.gate\.weight: a value leaves the range of F"):
        edited(one, tmp_path / "out", add=experts_of(root, "math"), router_std=std, shared="keep")
    with pytest.raises(NonFiniteError, match=r"mlp\.gate\.weight: a value leaves the range of F"):
        merged(root, tmp_path / "two", "code", dtype=dtype, router_std=std)
    assert not (tmp_path / "out").exists()


def test_several_problems_come_together(root, two, tmp_path):
    grow(root / "seed", tmp_path / "shallow")
    edit_json(tmp_path / "shallow/config.json", num_hidden_layers=3)
    with pytest.raises(InputError) as caught:
        edited(two, tmp_path / "out", add={"bio": str(tmp_path / "shallow"), "x": str(tmp_path / "nowhere")})
    assert {problem.source for problem in caught.value.problems} == {"bio", "x"}


def test_models_that_cannot_be_edited(root, two, tmp_path):
    with pytest.raises(InputError, match=r"model_type: 'llama', a dense Llama; expected 'btx'\. Merge first"):
        edited(root / "seed", tmp_path / "out", drop=("code",))
    with pytest.raises(InputError, match="is where the model lies"):
        edited(two, two, drop=("code",))
    blended = merged(root, "blended", "code", "math", expert_mode="blend")
    with pytest.raises(InputError, match="blend: every expert is a part of all sources"):
        edited(blended, tmp_path / "out", drop=("blend.0",))
    shutil.copytree(two, tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        edited(tmp_path / "cut", tmp_path / "out", drop=("code",))
    shutil.copytree(two, tmp_path / "odd")
    edit_json(tmp_path / "odd/config.json", router_type="lottery", expert_names=["seed", "a b", "math"])
    with pytest.raises(InputError) as caught:
        edited(tmp_path / "odd", tmp_path / "out", drop=("math",))
    assert [problem.where for problem in caught.value.problems] == ["experts", "config.json: router_type"]


def test_an_output_that_is_there(root, two, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        edited(two, tmp_path / "out", drop=("code",))
    assert (tmp_path / "out/mine").exists()
    edit(EditRecipe(str(two), ("code",)), tmp_path / "out", Options(overwrite=True))
    assert not (tmp_path / "out/mine").exists()


def test_interrupted_and_continued(root, two, tmp_path, monkeypatch):
    from btx_merge.editing.shared import SharedWeights

    edited(two, tmp_path / "whole", add={"bio": str(root / "bio")})
    plain, calls = SharedWeights.rows, []

    def failing(self, job):
        calls.append(job)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return plain(self, job)

    monkeypatch.setattr(SharedWeights, "rows", failing)
    with pytest.raises(MergeError, match=r"No space left on device\. Make room\. What is finished is kept"):
        edited(two, tmp_path / "out", add={"bio": str(root / "bio")})
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(SharedWeights, "rows", plain)
    notes: list[str] = []
    recipe = EditRecipe(str(two), add={"bio": str(root / "bio")})
    assert edit(recipe, tmp_path / "out", reporter=Told(note=notes.append)).kept_bytes > 0
    assert notes[0].startswith("Continuing: ")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_the_command(root, two, tmp_path):
    words = ["edit", str(two), "--add", f"bio={root / 'bio'}", "--drop", "seed", "--rename", "code=python"]
    done = CliRunner().invoke(app, [*words, "--weight", "bio=1", "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["experts"] == ["python", "math", "bio"]
    assert report["shared"] == "updated"
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "plain")])
    assert (
        "experts  python, math, bio\nshared   updated: as if merged with the new set\nrows     bio random\n"
        in done.stdout
    )
    for flag in ("--weight", "--base"):
        done = CliRunner().invoke(app, [*words, flag, "x=1", "-o", str(tmp_path / "wrong")])
        assert (done.exit_code, done.stderr) == (2, f"error: command: {flag}: no new expert x; expected one of bio\n")
    done = CliRunner().invoke(app, [*words, "--weight", "bio=much", "-o", str(tmp_path / "wrong")])
    assert done.stderr == "error: command: --weight: bio=much; expected a number\n"


def test_an_edit_needs_no_torch(root, two, tmp_path):
    """A plain one streams; torch alone would cost more memory than all of it."""
    script = (
        "import sys; from btx_merge.cli.app import app; "
        f"app(['edit', {str(two)!r}, '--add', 'bio=' + {str(root / 'bio')!r}, '-o', {str(tmp_path / 'out')!r}, '-q'], "
        "standalone_mode=False); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_the_result_says_is_what_the_experts_say(root, two, tmp_path):
    """A model with an expert replaced by its own twin gives the same logits."""
    edited(two, tmp_path / "out", replace={"math": str(root / "math")})
    assert torch.equal(logits_of(load_float32(tmp_path / "out")), logits_of(load_float32(two)))


def test_a_folder_is_seen_from_here_not_from_the_model(root, two, tmp_path, monkeypatch):
    """Beside the model is another folder of that name."""
    shutil.copytree(root / "bio", tmp_path / "code")
    monkeypatch.chdir(tmp_path)
    edited(two, tmp_path / "out", add={"bio": "code"})
    same_but_for_routers(tmp_path / "out", merged(root, "three", "code", "math", "bio"))


def test_a_value_that_leaves_the_range(root, tmp_path):
    from btx_merge.fitting.checkpoint import Checkpoint

    def loud(model):
        model.model.embed_tokens.weight.data[5] = 6e4

    model = merged(root, "two float16", "code", "math", dtype="float16")
    grow(root / "seed", tmp_path / "loud", change=loud)
    shutil.copytree(model, tmp_path / "tuned")
    Checkpoint(tmp_path / "tuned", torch.device("cpu")).write(EMBEDDING, torch.full((1, 64), 6e4), 5)
    moved = {"seed": str(root / "seed"), **experts_of(root, "code", "math")}
    with pytest.raises(NonFiniteError, match=r"embed_tokens\.weight: a value leaves the range of F16"):
        edited(tmp_path / "tuned", tmp_path / "out", replace={"code": str(tmp_path / "loud")}, sources=moved)
    assert not (tmp_path / "out").exists()


def test_a_fitted_merge_gets_the_text_into_its_recipe(root, texts, tmp_path):
    fits = {"router_init": "ridge", "combine": "regmean"}
    two_texts = {name: texts[name] for name in ("code", "math")}
    model = merged(root, "two fitted", "code", "math", domain_text=two_texts, **fits)
    report = edited(model, tmp_path / "out", add={"bio": str(root / "bio")}, domain_text=(texts["bio"],))
    fresh = "a fresh merge would fit them by regmean to the new set"
    assert report.shared_reason == f"by the difference of the plain means; {fresh}"
    recipe = MergeRecipe.from_yaml(tmp_path / "out", seed=str(root / "seed"))
    assert list(recipe.domain_text) == ["code", "math", "bio"]
    assert recipe.domain_text["bio"].references == ("bio.jsonl",)
