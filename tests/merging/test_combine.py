"""The rules for shared weights, against slow references in float64 and against peft called directly."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path

import pytest
import torch
from peft.utils import merge_utils

from btx_merge import ExpertSpec, MergeRecipe, NonFiniteError, Options, merge
from tests.support.common import (
    LAYERS,
    WIDTH,
    assert_complete,
    assert_rounded_once,
    files_of,
    grow,
    raw_bytes,
    save_seed,
    tensors_of,
    tiny_tokenizer,
)

NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


def shared(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors_of(folder).items() if ".mlp." not in name}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float16])
def four(request, tmp_path_factory):
    """A seed and three experts. The embedding is so tall that it is combined in several blocks."""
    root = tmp_path_factory.mktemp("four")
    seed = save_seed(root / "seed", dtype=request.param, vocab_size=6000, attention_bias=True)
    return [seed, *(grow(seed, root / name, random_seed=number, noise=0.3) for number, name in enumerate("abc", 1))]


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, [1, 1, 1, 1]),
        ({"combine": "weighted", "weights": [1, 1, 1], "seed_weight": 1}, [1, 1, 1, 1]),
        ({"combine": "weighted", "weights": [2, 0.5, 3], "seed_weight": 0.25}, [0.25, 2, 0.5, 3]),
        ({"combine": "weighted", "weights": [0, 1, 0], "seed_weight": 0}, [0, 0, 1, 0]),
        ({"combine": "weighted", "weights": [1, 3, 4], "seed_expert": False}, [0, 1, 3, 4]),
        ({"seed_expert": False}, [0, 1, 1, 1]),
    ],
)
def test_mean_and_weighted_against_float64(four, tmp_path, options, shares):
    weights = options.get("weights", [1, 1, 1])
    specs = {
        name: ExpertSpec(str(folder), weight) for name, folder, weight in zip("abc", four[1:], weights, strict=True)
    }
    rest = {key: value for key, value in options.items() if key != "weights"}
    merge(MergeRecipe(str(four[0]), specs, **rest), tmp_path / "out")
    merged = shared(tmp_path / "out")
    sources = [shared(folder) for folder in four]
    assert merged.keys() == sources[0].keys()
    for name in merged:
        rows = [share * source[name].double() for share, source in zip(shares, sources, strict=True)]
        exact = sum(rows) / sum(shares)
        assert_rounded_once(merged[name], exact, sum(row.abs() for row in rows) / sum(shares))


def test_seed_takes_the_seeds_bytes(four, tmp_path):
    specs = dict(zip("abc", map(str, four[1:]), strict=True))
    merge(MergeRecipe(str(four[0]), specs, combine="seed"), tmp_path / "out")
    merged, seed = shared(tmp_path / "out"), shared(four[0])
    assert merged.keys() == seed.keys()
    assert all(torch.equal(merged[name], seed[name]) for name in merged)


@pytest.mark.parametrize(
    ("dtype", "values", "mean", "naive"),
    [
        (torch.bfloat16, [256, 1, 1, 2], 65.0, 64.5),  # in bf16, 256 + 1 is 256
        (torch.float16, [2048, 1, 1, 2], 513.0, 512.5),  # in fp16, 2048 + 1 is 2048
        (torch.float16, [40000, 40000, 40000, 40000], 40000.0, float("inf")),  # 80000 is none of fp16's
        (torch.bfloat16, [1, 1.0078125, 1.0078125, 1.0078125], 1.0078125, 1.0),  # 1 + 3 * 0.75 / 128, to nearest
    ],
)
def test_the_mean_is_summed_in_float32(tmp_path, dtype, values, mean, naive):
    """A small difference is lost where the sum is kept in the dtype of the weights."""
    in_own_dtype = torch.tensor(0, dtype=dtype)
    for value in values:
        in_own_dtype = in_own_dtype + torch.tensor(value, dtype=dtype)
    assert (in_own_dtype / len(values)).item() == naive

    def with_value(value):
        def change(model):
            model.get_parameter(NORM).data[:] = value

        return change

    seed = save_seed(tmp_path / "origin", dtype=dtype)
    folders = [
        grow(seed, tmp_path / f"source{number}", noise=0, change=with_value(value))
        for number, value in enumerate(values)
    ]
    experts = {f"e{number}": str(folder) for number, folder in enumerate(folders[1:])}
    merge(MergeRecipe(str(folders[0]), experts), tmp_path / "out")
    assert set(tensors_of(tmp_path / "out")[NORM].tolist()) == {mean}


@pytest.mark.parametrize("copies", [3, 5, 6, 7])
@pytest.mark.parametrize("combine", ["mean", "weighted"])
def test_the_mean_of_one_model_is_that_model_to_the_bit(tmp_path, copies, combine):
    """Sums in float32 are rounded, and so are products with weights: the quotient alone differs in the last bit."""

    def negative_zero(model):
        model.get_parameter(NORM).data[0] = -0.0

    seed = grow(save_seed(tmp_path / "origin"), tmp_path / "seed", noise=0.3, change=negative_zero)
    values = tensors_of(seed)[EMBEDDING]
    assert not torch.equal(sum([values] * copies) / copies, values)
    weights = [0.7, 0.1, 1 / 3, 0, 5.3, 2]  # one of them has no say
    if combine == "mean":
        recipe = MergeRecipe(str(seed), {f"e{number}": str(seed) for number in range(copies - 1)})
    else:
        experts = {f"e{number}": ExpertSpec(str(seed), weights[number]) for number in range(copies - 1)}
        recipe = MergeRecipe(str(seed), experts, combine=combine, seed_weight=0.3)
    merge(recipe, tmp_path / "out")
    merged = shared(tmp_path / "out")
    for name, tensor in shared(seed).items():
        assert raw_bytes(merged[name]) == raw_bytes(tensor), name


RULES = {"ties": merge_utils.ties, "dare_ties": merge_utils.dare_ties, "dare_linear": merge_utils.dare_linear}


def through_peft(
    rule: str, folders: list[Path], name: str, weights: list[float], density: float, scale: float, random_seed: int
) -> torch.Tensor:
    """Seed plus combined differences, a whole tensor at once; the generator is seeded by its name and first row."""
    base, *others = (tensors_of(folder)[name].float() for folder in folders)
    torch.manual_seed(zlib.crc32(f"{random_seed} {name} 0".encode()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's on density 1
        combined = RULES[rule]([other - base for other in others], torch.tensor(weights), density)
    return base + scale * combined


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize(("density", "scale"), [(0.8, 1.0), (0.3, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0]])
def test_ties_and_dare_are_pefts(family, tmp_path, rule, density, scale, weights):
    """Weights are relative. TIES averages over those that agree in sign: their mean is 1. dare_linear adds: the sum
    is 1, and the seed, whose difference is nothing, takes its share."""
    specs = {"code": ExpertSpec(str(family.code), weights[0]), "math": ExpertSpec(str(family.math), weights[1])}
    recipe = MergeRecipe(
        str(family.seed), specs, combine=rule, density=density, scale=scale, random_seed=11, seed_weight=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(recipe, tmp_path / "out")
    assert_complete(tmp_path / "out")
    total = sum(weights) + 2 if rule == "dare_linear" else sum(weights) / 2
    relative = [weight / total for weight in weights]
    folders = [family.seed, family.code, family.math]
    for name, merged in shared(tmp_path / "out").items():
        expected = through_peft(rule, folders, name, relative, density, scale, 11)
        # the same float32 operations; one unit in the last place is left for their order
        torch.testing.assert_close(merged, expected, rtol=2e-7, atol=1e-9)
        if density < 1:  # and the dropping is seen
            undropped = through_peft(rule, folders, name, relative, 1.0, scale, 11)
            assert (merged - undropped).abs().max() > 1e-4


@pytest.mark.parametrize("rule", list(RULES))
def test_weights_may_be_whole_numbers(family, tmp_path, rule):
    """As YAML reads `weight: 2`."""
    for kind in (int, float):
        specs = {"code": ExpertSpec(str(family.code), kind(2)), "math": ExpertSpec(str(family.math), kind(1))}
        merge(MergeRecipe(str(family.seed), specs, combine=rule), tmp_path / kind.__name__)
    ours, expected = shared(tmp_path / "int"), shared(tmp_path / "float")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rule", list(RULES))
def test_experts_without_weight_leave_the_seed(family, tmp_path, rule):
    specs = {"code": ExpertSpec(str(family.code), 0.0), "math": ExpertSpec(str(family.math), 0.0)}
    merge(MergeRecipe(str(family.seed), specs, combine=rule), tmp_path / "out")
    ours, seed = shared(tmp_path / "out"), shared(family.seed)
    assert all(torch.equal(ours[name], seed[name]) for name in seed)


@pytest.mark.parametrize("density", [0.8, 0.3, 0.01, 1.0])
def test_ties_trims_over_the_whole_tensor_whatever_the_blocks(four, tmp_path, monkeypatch, density):
    specs = dict(zip("abc", map(str, four[1:]), strict=True))
    recipe = MergeRecipe(str(four[0]), specs, combine="ties", density=density)
    merge(recipe, tmp_path / "large")
    monkeypatch.setattr("btx_merge.merging.combine.DIFFERENCE_BLOCK_BYTES", 1 << 16)  # of 256 rows of 6000
    merge(recipe, tmp_path / "small")
    large, small = shared(tmp_path / "large"), shared(tmp_path / "small")
    assert all(torch.equal(small[name], large[name]) for name in large)


def test_ties_by_hand(tmp_path):
    """Trim, elect the sign, average those that agree (arXiv 2306.01708, figure 1)."""
    seed = save_seed(tmp_path / "seed")

    def moved(*differences):
        def change(model):
            norm = model.get_parameter(NORM).data
            norm[:] = 1
            norm[: len(differences)] += torch.tensor(differences)

        return change

    folders = [grow(seed, tmp_path / "origin", noise=0, change=moved())]
    folders.append(grow(seed, tmp_path / "a", noise=0, change=moved(0.5, -0.25, 0.5, 0.0625, 0.0)))
    folders.append(grow(seed, tmp_path / "b", noise=0, change=moved(0.25, 0.5, -0.25, 0.03125, -0.5)))
    # 4 of 64 values: of a, all but the zero; of b, all but the smallest
    recipe = MergeRecipe(str(folders[0]), {"a": str(folders[1]), "b": str(folders[2])}, combine="ties", density=4 / 64)
    merge(recipe, tmp_path / "out")
    #            agree  b wins  a wins  b trimmed  only b
    differences = [0.375, 0.5, 0.5, 0.0625, -0.5]
    assert tensors_of(tmp_path / "out")[NORM][:6].tolist() == [1 + difference for difference in differences] + [1]


def test_dare_linear_that_drops_nothing_is_the_mean(family, tmp_path):
    recipe = MergeRecipe(str(family.seed), family.experts, combine="dare_linear", density=1.0)
    merge(recipe, tmp_path / "out")
    for name, merged in shared(tmp_path / "out").items():
        mean = sum(tensors_of(folder)[name] for folder in (family.seed, family.code, family.math)) / 3
        torch.testing.assert_close(merged, mean, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rule", list(RULES))
def test_one_expert_without_dropping_is_that_expert_and_scale_0_is_the_seed(family, tmp_path, rule):
    options = {"combine": rule, "density": 1.0, "seed_expert": False, "num_experts_per_tok": 1}
    merge(MergeRecipe(str(family.seed), {"code": str(family.code)}, **options), tmp_path / "one")
    merge(MergeRecipe(str(family.seed), {"code": str(family.code)}, **options, scale=0.0), tmp_path / "none")
    for name, merged in shared(tmp_path / "one").items():
        torch.testing.assert_close(merged, shared(family.code)[name], rtol=1e-6, atol=1e-8)
        assert torch.equal(shared(tmp_path / "none")[name], shared(family.seed)[name])


def test_dare_keeps_and_rescales_by_density(tmp_path):
    """Of one expert: every difference is either dropped or divided by the density, and about so many are kept."""
    seed = save_seed(tmp_path / "seed", vocab_size=4000)
    code = grow(seed, tmp_path / "code", noise=0.5)
    options = {"combine": "dare_linear", "seed_expert": False, "num_experts_per_tok": 1, "density": 0.25}
    merge(MergeRecipe(str(seed), {"code": str(code)}, **options), tmp_path / "out")
    base, merged = (tensors_of(folder)[EMBEDDING] for folder in (seed, tmp_path / "out"))
    difference = tensors_of(code)[EMBEDDING] - base
    kept = merged != base
    torch.testing.assert_close(merged[kept], (base + difference / 0.25)[kept], rtol=1e-6, atol=1e-7)
    # 256,000 coins: five standard errors
    assert abs(kept.double().mean() - 0.25) < 5 * (0.25 * 0.75 / kept.numel()) ** 0.5


@pytest.mark.parametrize("rule", ["dare_ties", "dare_linear"])
def test_dare_does_not_depend_on_the_workers_and_does_on_the_random_seed(family, tmp_path, rule):
    recipe = MergeRecipe(str(family.seed), family.experts, combine=rule, density=0.5)
    state = torch.get_rng_state()
    for workers in (1, 2, 7):
        merge(recipe, tmp_path / f"{workers}" / "out", Options(workers=workers))
    assert torch.equal(torch.get_rng_state(), state)  # the caller's randomness is the caller's
    torch.manual_seed(99)
    merge(recipe, tmp_path / "later" / "out")
    torch.set_rng_state(state)
    first = files_of(tmp_path / "1")
    assert files_of(tmp_path / "2") == files_of(tmp_path / "7") == files_of(tmp_path / "later") == first
    other = MergeRecipe(str(family.seed), family.experts, combine=rule, density=0.5, random_seed=1)
    merge(other, tmp_path / "other")
    now, before = shared(tmp_path / "other"), shared(tmp_path / "1" / "out")
    assert all((now[name] != before[name]).any() for name in now)


def test_folding_meets_the_norms_that_dare_left(family, tmp_path):
    """The ratio is to the norm as it is stored, so the same values must be dropped both times."""
    options = {"combine": "dare_ties", "density": 0.5, "fold_norms": True}
    merge(MergeRecipe(str(family.seed), family.experts, **options), tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    for layer in range(LAYERS):
        norm = f"model.layers.{layer}.post_attention_layernorm.weight"
        for number, folder in enumerate([family.seed, family.code, family.math]):
            own = tensors_of(folder)
            expected = own[f"model.layers.{layer}.mlp.gate_proj.weight"] * (own[norm] / merged[norm])
            ours = merged[f"model.layers.{layer}.mlp.experts.gate_up_proj"][number][:WIDTH]
            assert torch.equal(ours, expected)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Three vocabularies: the seed's; code's with <code>; math's with <math> and <code>, in that order."""
    root = tmp_path_factory.mktemp("grown")
    seed = save_seed(root / "seed")

    def with_tokens(*tokens):
        def change(model):
            torch.manual_seed(len(tokens))
            model.resize_token_embeddings(128 + len(tokens), mean_resizing=False)

        return {"change": change, "tokenizer": tiny_tokenizer(list(tokens))}

    code = grow(seed, root / "code", random_seed=1, **with_tokens("<code>"))
    math = grow(seed, root / "math", random_seed=2, **with_tokens("<math>", "<code>"))
    return seed, code, math


def test_rows_whose_owners_have_no_weight_are_their_mean(grown, tmp_path):
    seed, code, math = grown
    specs = {"code": ExpertSpec(str(code), 0), "math": ExpertSpec(str(math), 0)}
    merge(MergeRecipe(str(seed), specs, combine="weighted"), tmp_path / "weighted")
    merge(MergeRecipe(str(seed), {"code": str(code), "math": str(math)}, combine="seed"), tmp_path / "seed")
    for out in (tmp_path / "weighted", tmp_path / "seed"):
        ours, own_seed, own_code, own_math = (tensors_of(folder)[EMBEDDING] for folder in (out, *grown))
        assert torch.equal(ours[:128], own_seed)
        torch.testing.assert_close(ours[128], (own_code[128] + own_math[129]) / 2)
        assert torch.equal(ours[129], own_math[128])


@pytest.mark.parametrize("rule", list(RULES))
def test_differences_of_rows_that_the_seed_lacks(grown, tmp_path, rule):
    """Such a row has no difference from the seed: it is its owners' mean. The others are peft's."""
    seed, code, math = grown
    options = {"combine": rule, "density": 0.5, "seed_weight": 1}
    merge(MergeRecipe(str(seed), {"code": str(code), "math": str(math)}, **options), tmp_path / "out")
    assert_complete(tmp_path / "out")
    for name in (EMBEDDING, "lm_head.weight"):
        ours, own_seed, own_code, own_math = (tensors_of(folder)[name] for folder in (tmp_path / "out", *grown))
        torch.testing.assert_close(ours[128], (own_code[128] + own_math[129]) / 2)
        assert torch.equal(ours[129], own_math[128])
        differences = [torch.zeros(130, 64) for _ in range(2)]
        for difference, own in zip(differences, (own_code, own_math), strict=True):
            difference[:128] = own[:128] - own_seed
        torch.manual_seed(zlib.crc32(f"0 {name} 0".encode()))
        weights = torch.full((2,), 1 / 3 if rule == "dare_linear" else 1.0)
        expected = own_seed + RULES[rule](differences, weights, 0.5)[:128]
        torch.testing.assert_close(ours[:128], expected, rtol=2e-7, atol=1e-9)


def test_nan_in_one_source_stops_every_rule(family, tmp_path):
    def spoil(model):
        model.get_parameter(NORM).data[3] = float("nan")

    bad = grow(family.seed, tmp_path / "bad", change=spoil)
    for rule in ("mean", "weighted", *RULES):
        recipe = MergeRecipe(str(family.seed), {"bad": str(bad)}, combine=rule)
        with pytest.raises(
            NonFiniteError, match=r"bad: model.safetensors: .*input_layernorm.weight holds nan at row 3"
        ):
            merge(recipe, tmp_path / rule)
        assert not (tmp_path / rule).exists()
    merge(MergeRecipe(str(family.seed), {"bad": str(bad)}, combine="seed"), tmp_path / "seed")  # it is not read
    assert_complete(tmp_path / "seed")


@pytest.mark.parametrize("rule", ["dare_ties", "dare_linear"])
def test_dare_in_blocks_drops_by_name_and_first_row(family, tmp_path, monkeypatch, rule):
    """40 rows of 64 float32 values are a block: each draws with a seed of its own, whoever works on it and when."""
    monkeypatch.setattr("btx_merge.merging.combine.DIFFERENCE_BLOCK_BYTES", 40 * 64 * 4)
    options = {"combine": rule, "density": 0.5, "random_seed": 3}
    for workers in (1, 7):
        merge(
            MergeRecipe(str(family.seed), family.experts, **options), tmp_path / f"{workers}", Options(workers=workers)
        )
    assert files_of(tmp_path / "1") == files_of(tmp_path / "7")
    base, *others = (tensors_of(folder)[EMBEDDING] for folder in (family.seed, family.code, family.math))
    weights = torch.full((2,), 1 / 3 if rule == "dare_linear" else 1.0)
    blocks = []
    for start in (0, 40, 80, 120):
        rows = slice(start, start + 40)
        torch.manual_seed(zlib.crc32(f"3 {EMBEDDING} {start}".encode()))
        blocks.append(base[rows] + RULES[rule]([other[rows] - base[rows] for other in others], weights, 0.5))
    ours = tensors_of(tmp_path / "1")[EMBEDDING]
    torch.testing.assert_close(ours, torch.cat(blocks), rtol=2e-7, atol=1e-9)


def test_a_scale_that_leaves_the_range_of_float32_is_named(family, tmp_path):
    recipe = MergeRecipe(str(family.seed), family.experts, combine="ties", scale=1e39)
    with pytest.raises(NonFiniteError, match=r"leaves the range of F32\. Give a smaller --scale or weight; "):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
