"""Fits without training, against slow references: whole models run by transformers, one document at a time."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from btx_merge import InputError, MergeRecipe, Options, merge
from btx_merge.cli.app import app
from btx_merge.fitting.equations import OFF_DIAGONAL, prompt_rows, ridge_solution
from btx_merge.fitting.recipe import FitRecipe
from btx_merge.fitting.run import fit
from btx_merge.texts.references import DomainText, documents
from btx_merge.texts.windows import packed_windows
from tests.support.common import (
    LAYERS,
    VOCAB,
    WORDS,
    Told,
    files_of,
    grow,
    load_float32,
    save_seed,
    tensors_of,
    tiny_tokenizer,
)

GATE = "model.layers.{}.mlp.gate.weight"
DOMAINS = ("code", "math")
WINDOW = 128  # tiny models take no more


def write_texts(folder: Path, domains: tuple[str, ...] = DOMAINS, documents: int = 60) -> dict[str, DomainText]:
    """Documents of unequal length, each domain with words of its own and words of all."""
    texts = {}
    for number, domain in enumerate(domains):
        generator = torch.Generator().manual_seed(number)
        own, common = WORDS[number * 30 : number * 30 + 30], WORDS[90:]
        lines = []
        for _ in range(documents):
            length = int(torch.randint(5, 60, (), generator=generator))
            picks = torch.randint(0, 60, (length,), generator=generator).tolist()
            lines.append(json.dumps({"text": " ".join([*own, *common][pick % 60] for pick in picks)}))
        (folder / f"{domain}.jsonl").write_text("\n".join(lines))
        texts[domain] = DomainText(domain, (str(folder / f"{domain}.jsonl"),))
    return texts


def fitted_documents(text: DomainText, limit: int = 200_000) -> list[torch.Tensor]:
    """What the equations are made of: the windows but for the last tenth, cut where positions begin anew."""
    tokenizer = tiny_tokenizer()
    windows = list(packed_windows(documents(text, tokenizer), tokenizer, WINDOW))[: limit // WINDOW]
    out = []
    for ids, positions in windows[: len(windows) - max(1, round(0.1 * len(windows)))]:
        starts = [i for i, position in enumerate(positions) if position == 0] + [len(ids)]
        out += [torch.tensor([ids[a:b]]) for a, b in itertools.pairwise(starts)]
    return out


@torch.no_grad()
def inputs_of(model, modules: list[str], texts: list[torch.Tensor], **call) -> dict[str, torch.Tensor]:
    """What modules read on documents, run one by one: by their names, [N, I] in float64."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for name in modules
    ]
    for ids in texts:
        model(input_ids=ids, use_cache=False, **call)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def save_grown(folder: Path) -> dict[str, DomainText]:
    """Save a seed and an expert for each domain far from it, untied. Their texts, by domain."""
    save_seed(folder / "seed")
    for number, name in enumerate(DOMAINS):
        grow(folder / "seed", folder / name, noise=0.5, random_seed=number + 1)
    return write_texts(folder)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A seed and two experts far from it, untied, and text of both domains."""
    folder = tmp_path_factory.mktemp("grown")
    return folder, save_grown(folder)


def recipe_of(folder: Path, texts=None, **values) -> MergeRecipe:
    given = {"domain_text": texts} if texts else {}
    experts = {name: str(folder / name) for name in DOMAINS}
    return MergeRecipe(str(folder / "seed"), experts, allow_unrelated=True, **given, **values)


def assert_same_direction(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> float:
    """Equal but for a positive factor, which is returned."""
    factor = float((found.double() * expected).sum() / expected.square().sum())
    assert factor > 0
    torch.testing.assert_close(found.double() / factor, expected, atol=tolerance * expected.abs().max(), rtol=0)
    return factor


def test_ridge_is_the_regression_of_labels_on_the_routers_true_input(grown, tmp_path):
    folder, texts = grown
    merge(recipe_of(folder), tmp_path / "btx")
    report = fit(FitRecipe(str(tmp_path / "btx"), "ridge", domain_text=tuple(texts.values())), tmp_path / "fitted")
    model = load_float32(tmp_path / "btx")
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(LAYERS)]
    # each domain through its own expert alone
    inputs = {
        name: inputs_of(model, gates, fitted_documents(text), active_experts=[name]) for name, text in texts.items()
    }
    after, before = tensors_of(tmp_path / "fitted"), tensors_of(tmp_path / "btx")
    for layer, gate in enumerate(gates):
        gram = sum(inputs[name][gate].T @ inputs[name][gate] / len(inputs[name][gate]) for name in DOMAINS)
        labels = torch.stack([torch.zeros(64).double(), *(inputs[name][gate].mean(dim=0) for name in DOMAINS)], dim=1)
        expected = torch.linalg.inv(gram + 0.001 * gram.diagonal().mean() * torch.eye(64).double()) @ labels
        factor = assert_same_direction(after[GATE.format(layer)], expected.T)
        assert factor == pytest.approx(report.layers[layer].temperature, rel=1e-3)
        assert not after[GATE.format(layer)][0].any()  # nothing claims the seed
        assert report.layers[layer].accuracy > 0.65  # half of the words are one domain's, half a coin toss: 0.75
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        GATE.format(layer) for layer in range(LAYERS)
    }


def test_text_of_the_seed_gives_its_row(grown, tmp_path):
    folder, texts = grown
    seed_text = write_texts(tmp_path, ("a", "b", "seed"))["seed"]
    merge(recipe_of(folder, {**texts, "seed": seed_text}, router_init="ridge"), tmp_path / "btx")
    assert tensors_of(tmp_path / "btx")[GATE.format(0)][0].any()


def test_a_text_of_two_domains_is_a_warning(grown, tmp_path):
    folder, texts = grown
    merge(recipe_of(folder), tmp_path / "btx")
    same = tuple(DomainText(name, texts["code"].references) for name in DOMAINS)
    warnings: list[str] = []
    fit(FitRecipe(str(tmp_path / "btx"), domain_text=same), tmp_path / "out", reporter=Told(warn=warnings.append))
    assert len(warnings) == 1
    assert warnings[0].startswith("code, math: ")
    assert "code.jsonl: the same text for several domains; expected a text of its own for each" in warnings[0]


def test_merging_with_ridge_is_merging_then_fitting(grown, tmp_path):
    folder, texts = grown
    merge(recipe_of(folder, router_init="zeros"), tmp_path / "zeros")
    fit(FitRecipe(str(tmp_path / "zeros"), "ridge", domain_text=tuple(texts.values())), tmp_path / "fitted")
    report = merge(recipe_of(folder, texts, router_init="ridge"), tmp_path / "ridge")
    assert [layer.layer for layer in report.layers] == list(range(LAYERS))
    fitted, ridge = tensors_of(tmp_path / "fitted"), tensors_of(tmp_path / "ridge")
    assert all(torch.equal(fitted[name], ridge[name]) for name in ridge)
    assert "not been trained" not in (tmp_path / "ridge/README.md").read_text()
    assert "not been trained" not in (tmp_path / "fitted/README.md").read_text()
    assert "`btx fit`" in (tmp_path / "fitted/README.md").read_text()
    recipe = (tmp_path / "ridge/btx_recipe.yaml").read_text()
    assert "code.jsonl" in recipe
    assert str(folder) not in recipe
    assert str(folder) not in (tmp_path / "fitted/btx_recipe.yaml").read_text()


@pytest.mark.parametrize("through", ["expert", "router"])
def test_a_fitted_merge_is_the_same_every_time(grown, tmp_path, through):
    folder, texts = grown
    recipe = recipe_of(folder, texts, router_init="ridge", combine="regmean_merged", fit_through=through)
    merge(recipe, tmp_path / "one")
    with pytest.raises(RuntimeError, match="pulled"):
        merge(recipe, tmp_path / "two", reporter=Told(layer_done=_pull_the_plug))
    assert not (tmp_path / "two").exists()
    assert (tmp_path / "two.btx-partial/model.safetensors").exists()
    assert not (tmp_path / "two.btx-partial/config.json").exists()  # half fitted it does not look like a model
    report = merge(recipe, tmp_path / "two")  # goes on with what was written, and fits anew
    assert report.kept_bytes > 0
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def _pull_the_plug(done: int, layers: int) -> None:
    if done:
        raise RuntimeError("pulled")


def test_an_interrupted_fit_is_continued_by_the_same_command(grown, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    folder, texts = grown
    merge(recipe_of(folder), tmp_path / "btx")

    def interrupt(self, done: int, layers: int) -> None:
        assert (tmp_path / "out.btx-partial/model.safetensors").exists()
        assert not (tmp_path / "out.btx-partial/config.json").exists()
        raise KeyboardInterrupt

    given = [word for name, text in texts.items() for word in ("--domain-text", f"{name}={text.references[0]}")]
    command = ["fit", str(tmp_path / "btx"), "-o", str(tmp_path / "out"), *given]
    with monkeypatch.context() as pressed:
        pressed.setattr("btx_merge.cli.printing.Lines.layer_done", interrupt)
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 130
    assert "the same command continues" in result.output
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, command).exit_code == 0
    command[3] = str(tmp_path / "undisturbed")
    assert CliRunner().invoke(app, command).exit_code == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")
    assert {path.name for path in tmp_path.iterdir()} == {"btx", "out", "undisturbed"}


def test_regmean_is_the_papers_on_the_sources_own_inputs(grown, tmp_path):
    """Equation 2 of arXiv 2212.09849, off-diagonals scaled, plus the penalty, for every projection of every layer."""
    folder, texts = grown
    merge(recipe_of(folder), tmp_path / "mean")
    merge(recipe_of(folder, texts, combine="regmean"), tmp_path / "regmean")
    mean, found = tensors_of(tmp_path / "mean"), tensors_of(tmp_path / "regmean")
    names = [f"model.layers.{layer}.self_attn.{x}_proj" for layer in range(LAYERS) for x in "qkvo"] + ["lm_head"]
    sources = {name: load_float32(folder / name) for name in DOMAINS}
    inputs = {name: inputs_of(model, names, fitted_documents(texts[name])) for name, model in sources.items()}
    for name in names:
        gram, cross = 0, 0
        for domain, model in sources.items():
            x = inputs[domain][name]
            scaled = (x.T @ x) / len(x)
            scaled = OFF_DIAGONAL * scaled + (1 - OFF_DIAGONAL) * torch.diag(scaled.diagonal())
            gram, cross = gram + scaled, cross + scaled @ model.get_submodule(name).weight.T.double()
        penalty = 0.01 * gram.diagonal().mean()
        prior = mean[f"{name}.weight"].double()
        expected = torch.linalg.inv(gram + penalty * torch.eye(len(gram)).double()) @ (cross + penalty * prior.T)
        # sources run whole and document by document here, in windows and layer by layer there, in float32
        torch.testing.assert_close(found[f"{name}.weight"].double(), expected.T, atol=2e-5, rtol=1e-3)
    counts = {
        name: torch.bincount(torch.cat(fitted_documents(text), 1)[0], minlength=VOCAB).double()
        for name, text in texts.items()
    }
    tokens = sum(count.sum() for count in counts.values()) / 2
    weights = {name: (count * tokens / count.sum())[:, None] for name, count in counts.items()}
    embedding = "model.embed_tokens.weight"
    total = sum(weights[name] * sources[name].get_input_embeddings().weight for name in DOMAINS)
    expected = (total + 3 * mean[embedding]) / (sum(weights.values()) + 3)
    torch.testing.assert_close(found[embedding].double(), expected.double(), atol=1e-6, rtol=1e-5)
    untouched = [name for name in found if "norm" in name or ".mlp.experts." in name]
    assert all(torch.equal(found[name], mean[name]) for name in untouched)


def test_regmean_merged_brings_every_domain_nearer_to_its_source(grown, tmp_path):
    folder, texts = grown
    merge(recipe_of(folder), tmp_path / "mean")
    merge(recipe_of(folder, texts, combine="regmean"), tmp_path / "regmean")
    merge(recipe_of(folder, texts, combine="regmean_merged"), tmp_path / "merged")
    distance = {
        name: [_distance(tmp_path / name, folder, texts, domain) for domain in DOMAINS]
        for name in ("mean", "regmean", "merged")
    }
    assert all(own < 0.9 * mean for own, mean in zip(distance["merged"], distance["mean"], strict=True)), distance
    assert sum(distance["merged"]) < sum(distance["regmean"]), distance


@torch.no_grad()
def _distance(merged: Path, folder: Path, texts, domain: str) -> float:
    """Relative squared distance of the logits from the source's own, through its expert."""
    model, source = load_float32(merged), load_float32(folder / domain)
    apart = together = 0.0
    for ids in fitted_documents(texts[domain])[:20]:
        expected = source(input_ids=ids).logits
        apart += float((model(input_ids=ids, active_experts=[domain]).logits - expected).square().sum())
        together += float(expected.square().sum())
    return apart / together


@pytest.mark.parametrize("method", ["regmean", "regmean_merged"])
def test_sources_that_are_one_give_back_that_one(tmp_path, method):
    save_seed(tmp_path / "seed", tie_word_embeddings=True)
    texts = write_texts(tmp_path)
    recipe = MergeRecipe(
        str(tmp_path / "seed"),
        {name: str(tmp_path / "seed") for name in DOMAINS},
        combine=method,
        domain_text=texts,
    )
    merge(recipe, tmp_path / "btx")
    seed, found = tensors_of(tmp_path / "seed"), tensors_of(tmp_path / "btx")
    for name in set(seed) & set(found):
        torch.testing.assert_close(found[name], seed[name], atol=2e-5, rtol=0)


def test_vocabularies_that_grew_are_fitted_by_token(tmp_path):
    """A token that one source alone has keeps that source's row, though the others' text may name it."""
    save_seed(tmp_path / "seed")
    tokenizer = tiny_tokenizer(["extra"])
    grow(
        tmp_path / "seed",
        tmp_path / "code",
        change=lambda model: model.resize_token_embeddings(len(tokenizer), mean_resizing=False),
        tokenizer=tokenizer,
    )
    grow(tmp_path / "seed", tmp_path / "math", random_seed=2)
    texts = write_texts(tmp_path)
    with (tmp_path / "code.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"text": "extra w1 " * 40}))
    merge(recipe_of(tmp_path, texts, combine="regmean_merged", router_init="ridge"), tmp_path / "btx")
    found, code = tensors_of(tmp_path / "btx"), tensors_of(tmp_path / "code")
    embedding = "model.embed_tokens.weight"
    torch.testing.assert_close(found[embedding][VOCAB], code[embedding][VOCAB], atol=1e-6, rtol=0)
    assert found["lm_head.weight"].shape[0] == VOCAB + 1


def test_adapters_are_sources_too(tmp_path):
    """A LoRA and the same LoRA merged by peft are fitted to the same weights."""
    from peft import LoraConfig, PeftModel, get_peft_model

    save_seed(tmp_path / "seed")
    for number, name in enumerate(DOMAINS):
        torch.manual_seed(number)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tmp_path / "seed"),
            LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False),
        )
        model.save_pretrained(tmp_path / name)
        merged = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "seed"), str(tmp_path / name)
        ).merge_and_unload()
        merged.save_pretrained(tmp_path / f"{name}-merged")
    texts = write_texts(tmp_path)
    values = {"combine": "regmean_merged", "router_init": "ridge", "domain_text": texts, "allow_unrelated": True}
    experts = {name: str(tmp_path / name) for name in DOMAINS}
    merge(MergeRecipe(str(tmp_path / "seed"), experts, **values), tmp_path / "adapters")
    experts = {name: str(tmp_path / f"{name}-merged") for name in DOMAINS}
    merge(MergeRecipe(str(tmp_path / "seed"), experts, **values), tmp_path / "merged")
    one, other = tensors_of(tmp_path / "adapters"), tensors_of(tmp_path / "merged")
    for name in one:  # a LoRA's product is summed in another order
        torch.testing.assert_close(one[name], other[name], atol=1e-4 * float(other[name].abs().max()), rtol=1e-3)


def test_prompts_are_mean_inputs_where_the_router_reads(grown, tmp_path):
    folder, _ = grown
    merge(recipe_of(folder), tmp_path / "btx")
    prompts = {"code": ["w1 w2 w3", "w4 w5 w1 w2"], "math": ["w31 w32 w33"]}
    fit(FitRecipe(str(tmp_path / "btx"), method="prompts", prompts=prompts), tmp_path / "fitted")
    merge(recipe_of(folder, router_init="prompts", prompts=prompts), tmp_path / "merged")
    model, tokenizer = load_float32(tmp_path / "btx"), tiny_tokenizer()
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(LAYERS)]
    after = tensors_of(tmp_path / "fitted")
    read = {}
    for name, lines in prompts.items():
        ids = [torch.tensor([tokenizer(line)["input_ids"]]) for line in lines]
        read[name] = inputs_of(model, gates, ids, active_experts=[name])
    for layer, gate in enumerate(gates):
        means = torch.stack([read[name][gate].mean(dim=0) for name in DOMAINS])
        expected = torch.cat([torch.zeros(1, 64).double(), means - means.mean(dim=0)])
        found = after[GATE.format(layer)]
        assert_same_direction(found, expected)
        logits = torch.cat([read[name][gate] for name in DOMAINS]) @ found.T.double()
        assert float(logits.std()) == pytest.approx(1, rel=1e-3)
        assert torch.equal(tensors_of(tmp_path / "merged")[GATE.format(layer)], found)


def test_split_experts_get_their_sources_text(grown, tmp_path):
    folder, texts = grown
    recipe = recipe_of(folder, texts, router_init="ridge", expert_mode="split", router_pre_softmax=True)
    merge(recipe, tmp_path / "btx")
    gate = tensors_of(tmp_path / "btx")[GATE.format(1)]
    assert torch.equal(gate[2], gate[3])
    assert torch.equal(gate[4], gate[5])
    assert not torch.equal(gate[2], gate[4])


@pytest.mark.parametrize(
    ("names", "values", "given", "expected"),
    [
        (("code", "math"), {"expert_mode": "split"}, ("code.0", "math"), ["no expert code.0", "none for code"]),
        (("v1.code", "v1.math"), {}, ("v1",), ["no expert v1", "none for v1.code, v1.math"]),
        (("code", "seed.2"), {}, ("code",), ["none for seed.2"]),
    ],
)
def test_a_dot_in_a_name_means_something_in_a_split_model_only(grown, tmp_path, names, values, given, expected):
    folder, texts = grown
    experts = {name: str(folder / source) for name, source in zip(names, DOMAINS, strict=True)}
    merge(MergeRecipe(str(folder / "seed"), experts, allow_unrelated=True, **values), tmp_path / "btx")
    named = dict.fromkeys(given, texts["code"].references[0])
    with pytest.raises(InputError) as caught:
        fit(FitRecipe(str(tmp_path / "btx"), "ridge", domain_text=named), tmp_path / "out")
    assert [problem.found for problem in caught.value.problems] == expected


def test_one_chunk_of_each_source_is_the_source(grown, tmp_path):
    folder, texts = grown
    recipe = recipe_of(folder, texts, router_init="ridge", expert_mode="split", num_chunks=1)
    assert merge(recipe, tmp_path / "btx").checked.plan.expert_names == ["seed", "code", "math"]
    merge(recipe_of(folder, texts, router_init="ridge"), tmp_path / "whole")
    assert (tmp_path / "btx/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_statistics_are_reused(grown, tmp_path):
    """The same penalty gives the same bytes without a pass; another one gives what a pass with it gives."""
    folder, texts = grown
    merge(recipe_of(folder), tmp_path / "btx")
    recipe = FitRecipe(str(tmp_path / "btx"), "ridge", domain_text=tuple(texts.values()))
    fit(recipe, tmp_path / "first", Options(statistics=tmp_path / "statistics"))
    fit(recipe, tmp_path / "again", Options(statistics=tmp_path / "statistics"))
    assert files_of(tmp_path / "first") == files_of(tmp_path / "again")
    other = FitRecipe(str(tmp_path / "btx"), "ridge", domain_text=tuple(texts.values()), router_ridge=0.1)
    quick = fit(other, tmp_path / "quick", Options(statistics=tmp_path / "statistics"))
    slow = fit(other, tmp_path / "slow")
    assert quick.layers == slow.layers
    assert (quick.losses, len(slow.losses)) == ((), 2)  # they take a pass through the model as it is now
    weights = [files_of(tmp_path / name)["model.safetensors"] for name in ("quick", "slow", "first")]
    assert weights[0] == weights[1] != weights[2]
    shorter = FitRecipe(str(tmp_path / "btx"), "ridge", domain_text=tuple(texts.values()), domain_tokens=640)
    with pytest.raises(InputError, match="collected with another domain_tokens"):
        fit(shorter, tmp_path / "refused", Options(statistics=tmp_path / "statistics"))
    with pytest.raises(InputError, match="something else"):
        fit(shorter, tmp_path / "refused", Options(statistics=tmp_path / "btx"))
    assert not (tmp_path / "refused").exists()
    assert not list(tmp_path.glob("*.btx-partial"))


def test_statistics_of_an_earlier_version_are_refused(grown, tmp_path):
    folder, texts = grown
    merge(recipe_of(folder), tmp_path / "btx")
    recipe = FitRecipe(str(tmp_path / "btx"), "ridge", domain_text=tuple(texts.values()))
    fit(recipe, tmp_path / "first", Options(statistics=tmp_path / "statistics"))
    file = tmp_path / "statistics/statistics.json"
    kept = json.loads(file.read_text())
    kept.pop("format")
    file.write_text(json.dumps(kept))
    with pytest.raises(InputError, match="another version of btx-merge has collected them"):
        fit(recipe, tmp_path / "second", Options(statistics=tmp_path / "statistics"))


def test_a_checkpoint_is_hashed_for_statistics_alone(grown, tmp_path, monkeypatch):
    folder, texts = grown

    def digest(self) -> str:
        raise AssertionError("hashed")

    monkeypatch.setattr("btx_merge.fitting.checkpoint.Checkpoint.digest", digest)
    recipe = recipe_of(folder, texts, router_init="ridge")
    merge(recipe, tmp_path / "btx")
    with pytest.raises(AssertionError, match="hashed"):
        merge(recipe, tmp_path / "kept", Options(statistics=tmp_path / "statistics"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")
@pytest.mark.parametrize("place", ["device", "host"])
def test_a_fit_on_a_gpu_is_that_on_the_cpu(grown, tmp_path, monkeypatch, place):
    """Weights within 1 % of a tensor's largest: each is solved from states that the layers below have rounded."""
    if place == "host":
        monkeypatch.setattr("btx_merge.fitting.states.free_memory", lambda device: 0)
    folder, texts = grown
    recipe = recipe_of(
        folder, texts, router_init="ridge", combine="regmean_merged", head="fitted", fit_through="router"
    )
    merge(recipe, tmp_path / "cpu", Options(device="cpu"))
    merge(recipe, tmp_path / "gpu", Options(device="cuda"))
    expected, found = tensors_of(tmp_path / "cpu"), tensors_of(tmp_path / "gpu")
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name].float(), tensor.float(), atol=0.01 * float(tensor.abs().max()), rtol=0, msg=name
        )


def test_statistics_of_both_fits_come_from_one_pass(grown, tmp_path):
    folder, texts = grown
    recipe = recipe_of(folder, texts, router_init="ridge", combine="regmean_merged")
    merge(recipe, tmp_path / "first", Options(statistics=tmp_path / "statistics"))
    merge(recipe, tmp_path / "again", Options(statistics=tmp_path / "statistics"))
    assert files_of(tmp_path / "first") == files_of(tmp_path / "again")


def test_ridge_solution_minimises_what_it_says():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, size, generator=generator).double() for size in (6, 4))
    prior = torch.randn(4, 6, generator=generator).double().requires_grad_()
    weight = ridge_solution(x.T @ x, x.T @ y, 0.3, prior.detach()).double().requires_grad_()
    penalty = 0.3 * (x.T @ x).diagonal().mean()
    loss = (x @ weight.T - y).square().sum() + penalty * (weight - prior.detach()).square().sum()
    loss.backward()
    assert float(weight.grad.abs().max()) < 1e-4 * loss.item()  # of a weight in float32


def test_prompt_rows_without_a_common_part():
    means = {1: torch.tensor([1.0, 5.0]), 2: torch.tensor([3.0, 5.0])}
    rows = prompt_rows(means, torch.tensor([[1.0, 5.0], [3.0, 5.0]]), 3)
    assert rows[0].tolist() == [0, 0]
    assert rows[1, 1] == rows[2, 1] == 0
    assert rows[1, 0] == -rows[2, 0] < 0


WRONG = {
    "no text for an expert": (["--domain-text", "code={code}"], "none for math"),
    "an expert that is not there": (
        ["--domain-text", "code={code}", "--domain-text", "math={math}", "--domain-text", "bio={math}"],
        "no expert bio",
    ),
    "a file that is not there": (["--domain-text", "code={code}", "--domain-text", "math=gone.jsonl"], "gone.jsonl"),
    "a file and an expert that are not there, in one report": (
        ["--domain-text", "code={code}", "--domain-text", "math=gone.jsonl", "--domain-text", "bio={math}"],
        "no expert bio",
        "gone.jsonl",
    ),
    "a line that is no JSON": (["--domain-text", "code={code}", "--domain-text", "math={broken}"], "line 2"),
    "a method that is none": (["--method", "lasso"], "one of ridge, logistic, prompts"),
    "prompts for ridge": (["--prompt", "code=x"], "does not use it"),
    "a penalty of nothing": (["--router-ridge", "0"], "above 0"),
    "a penalty of ridge, for logistic": (["--router-ridge", "0.1"], "0.1, which method logistic does not use"),
    "a device that is none": (
        ["--domain-text", "code={code}", "--domain-text", "math={math}", "--device", "toaster"],
        "--device: toaster",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(grown, tmp_path, case):
    from typer.testing import CliRunner

    folder, texts = grown
    merge(recipe_of(folder), tmp_path / "btx")
    (tmp_path / "broken.jsonl").write_text('{"text": "w1"}\n{"text": \n')
    files = {name: text.references[0] for name, text in texts.items()} | {"broken": str(tmp_path / "broken.jsonl")}
    words, *expected = WRONG[case]
    command = ["fit", str(tmp_path / "btx"), "-o", str(tmp_path / "out"), *(word.format(**files) for word in words)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert all(line in result.output for line in expected)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.btx-partial"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"router_init": "ridge"}, "none for code, math"),
        ({"combine": "regmean"}, "none for code, math"),
        ({"router_init": "prompts", "prompts": {"code": "x"}}, "none for math"),
        ({"domain_text": {"code": "x.txt"}}, "none for math"),
        ({"router_init": "ridge", "domain_text": {"code": "a", "math": "b", "bio": "c"}}, "no expert bio"),
        ({"router_init": "prompts", "prompts": {"code": [], "math": "y"}}, "lines of text"),
        ({"router_init": "ridge", "domain_text": {"code": 3, "math": "b"}}, "domain_text"),
        (
            {"router_init": "ridge", "domain_text": {"code": "a", "math": "b"}, "expert_mode": "blend"},
            "belong to a domain",
        ),
    ],
)
def test_recipes_that_cannot_be_fitted(values, expected):
    with pytest.raises(InputError, match=expected):
        MergeRecipe("seed", {"code": "a", "math": "b"}, **values)


def test_a_recipe_with_texts_and_prompts_comes_back(tmp_path):
    (tmp_path / "code.txt").write_text("x")
    (tmp_path / "recipe.yaml").write_text(
        "seed: s\nexperts: {code: a, math: b}\nrouter_init: ridge\n"
        "domain_text:\n  code: code.txt\n  math: {text: [org/texts], weight: 2}\n"
    )
    recipe = MergeRecipe.from_yaml(tmp_path / "recipe.yaml")
    assert recipe.domain_text["code"].references == (str(tmp_path / "code.txt"),)
    assert recipe.domain_text["math"] == DomainText("math", ("org/texts",), 2.0)
    assert MergeRecipe.from_dict(recipe.to_dict()) == recipe
    prompts = MergeRecipe("s", {"code": "a"}, router_init="prompts", prompts={"code": "one line"})
    assert MergeRecipe.from_dict(prompts.to_dict()) == prompts


def test_a_source_without_a_tokenizer_cannot_be_fitted_on(tmp_path):
    save_seed(tmp_path / "seed", tokenizer=False)
    for number, name in enumerate(DOMAINS):
        grow(tmp_path / "seed", tmp_path / name, random_seed=number + 1)
    texts = write_texts(tmp_path)
    with pytest.raises(InputError, match="tokenizer"):
        merge(recipe_of(tmp_path, texts, router_init="ridge"), tmp_path / "btx")
