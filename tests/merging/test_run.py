"""What a merge computes: seen in logits, in bytes, and against slow references made of plain loops.

Shapes: L layers, E experts, I intermediate, H hidden, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from btx_merge import ExpertSpec, MergeRecipe, Options, merge
from tests.support.common import (
    HIDDEN,
    LAYERS,
    WIDTH,
    Told,
    assert_complete,
    assert_rounded_once,
    files_of,
    force_expert,
    grow,
    load_float32,
    logits_of,
    raw_bytes,
    save_seed,
    tensors_of,
)

LOGITS = 1e-5
"""Absolute, in float32, on logits of about 0.5: the same weights, summed by other kernels in another order."""

LAYER = "model.layers.{}.mlp.{}"
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True},
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "bf16": {"dtype": torch.bfloat16},
    "wide-heads": {"head_dim": 32, "num_key_value_heads": 1},
}
PROMISES = {  # N copies of the seed are the seed
    "whole, one of three": {"num_experts_per_tok": 1},
    "whole, two of three": {"num_experts_per_tok": 2, "random_seed": 7},
    "whole, all, sharp routers": {"num_experts_per_tok": 3, "router_std": 1.0},
    "whole, zeros": {"num_experts_per_tok": 2, "router_init": "zeros"},
    "whole, folded norms": {"fold_norms": True},
    "blend, all, zeros": {"expert_mode": "blend", "num_experts_per_tok": 3, "router_init": "zeros"},
    "blend, all, zeros, folded norms": {
        "expert_mode": "blend",
        "num_experts_per_tok": 3,
        "router_init": "zeros",
        "fold_norms": True,
    },
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def seed_of_each_kind(request, tmp_path_factory):
    return save_seed(tmp_path_factory.mktemp("seeds") / "llama-seed", seed=3, **VARIANTS[request.param])


@pytest.mark.parametrize("promise", list(PROMISES))
def test_copies_of_the_seed_give_the_seeds_logits(seed_of_each_kind, tmp_path, promise):
    copies = {"one": str(seed_of_each_kind), "two": str(seed_of_each_kind)}
    merge(MergeRecipe(str(seed_of_each_kind), copies, **PROMISES[promise]), tmp_path / "out")
    expected = logits_of(load_float32(seed_of_each_kind))
    assert expected.abs().mean() > 0.05  # so that the tolerance means something
    torch.testing.assert_close(logits_of(load_float32(tmp_path / "out")), expected, atol=LOGITS, rtol=0)


def test_split_cannot_promise_that(family, tmp_path):
    """The gates sum to 1 over all chunks, so even with every chunk of every copy running, each with an equal
    share, the layer gives 1/C of the dense block; and with fewer running, parts of it are missing."""
    recipe = MergeRecipe(
        str(family.seed),
        {"copy": str(family.seed)},
        expert_mode="split",
        num_chunks=3,
        num_experts_per_tok=6,
        router_init="zeros",
    )
    merge(recipe, tmp_path / "out")
    merged, seed = load_float32(tmp_path / "out"), load_float32(family.seed)
    hidden = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
    for layer in range(LAYERS):
        ours, dense = merged.model.layers[layer].mlp(hidden), seed.model.layers[layer].mlp(hidden)
        torch.testing.assert_close(3 * ours, dense, atol=LOGITS, rtol=0)
    assert (logits_of(merged) - logits_of(seed)).abs().max() > 1000 * LOGITS


@pytest.fixture(scope="module")
def distant(tmp_path_factory):
    """A seed and two experts so far from it that their norms differ by 5 % and more."""
    root = tmp_path_factory.mktemp("distant")
    seed = save_seed(root / "llama-seed")
    return [seed, *(grow(seed, root / name, random_seed=number, noise=0.5) for number, name in enumerate("ab", 1))]


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("fold_norms", [False, True])
def test_shared_weights_of_an_expert_and_routing_to_it_are_that_expert(distant, tmp_path, number, fold_norms):
    """With `fold_norms` the norms before the feed-forward blocks stay averaged, and the expert does not notice.

    The tolerance is the same for both: folding rounds each weight once in float32, 6e-8 of itself.
    """
    seed, *experts = distant
    recipe = MergeRecipe(str(seed), dict(zip("ab", map(str, experts), strict=True)), fold_norms=fold_norms)
    merge(recipe, tmp_path / "out")
    merged = load_float32(tmp_path / "out")
    expert = load_float32(distant[number])
    averaged = ("post_attention_layernorm.weight",)
    kept = {name: value.clone() for name, value in merged.state_dict().items() if name.endswith(averaged)}
    own = {name: value for name, value in expert.state_dict().items() if ".mlp." not in name}
    assert set(own) == {name for name in merged.state_dict() if ".mlp." not in name}
    merged.load_state_dict(own, strict=False)
    force_expert(merged, number)
    expected = logits_of(expert)
    if fold_norms:
        merged.load_state_dict(kept, strict=False)
        assert all((kept[name] != own[name]).any() for name in kept)
    torch.testing.assert_close(logits_of(merged), expected, atol=LOGITS, rtol=0)

    if not fold_norms:  # with the averaged norms and nothing folded in, it is another function
        merged.load_state_dict(kept, strict=False)
        assert (logits_of(merged) - expected).abs().max() > 100 * LOGITS
    force_expert(merged, (number + 1) % 3)  # and so it is with another expert
    merged.load_state_dict(own, strict=False)
    assert (logits_of(merged) - expected).abs().max() > 100 * LOGITS


def test_shared_weights_from_the_seed_alone(family, tmp_path):
    """Nothing edited: an expert in the seed's place with `combine: seed`, and routing to it."""
    recipe = MergeRecipe(str(family.code), {"old": str(family.seed), "math": str(family.math)}, combine="seed")
    merge(recipe, tmp_path / "out")
    merged = load_float32(tmp_path / "out")
    force_expert(merged, 0)
    expected = logits_of(load_float32(family.code))
    torch.testing.assert_close(logits_of(merged), expected, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_experts_are_their_sources_bit_by_bit(tmp_path, dtype):
    folders = [save_seed(tmp_path / "seed", dtype=dtype)]
    folders.append(grow(folders[0], tmp_path / "single", random_seed=1))
    folders.append(grow(folders[0], tmp_path / "sharded", random_seed=2, max_shard_size="30KB"))
    assert len(list(folders[1].glob("*.safetensors"))) == 1
    assert len(list(folders[2].glob("*.safetensors"))) > 5
    merge(MergeRecipe(str(folders[0]), {"a": str(folders[1]), "b": str(folders[2])}), tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    for number, folder in enumerate(folders):
        source = tensors_of(folder)
        for layer in range(LAYERS):
            names = [LAYER.format(layer, f"{part}_proj.weight") for part in ("gate", "up", "down")]
            gate, up, down = (raw_bytes(source[name]) for name in names)
            assert raw_bytes(merged[LAYER.format(layer, "experts.gate_up_proj")][number]) == gate + up
            assert raw_bytes(merged[LAYER.format(layer, "experts.down_proj")][number]) == down


def slow_experts(
    folders: list[Path], layer: int, mode: str, chunks: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Gate, up and down of every expert, by slicing: gate and up [I, H] along rows, down [H, I] along columns."""
    blocks = []
    for folder in folders:
        tensors = tensors_of(folder)
        names = [LAYER.format(layer, f"{part}_proj.weight") for part in ("gate", "up", "down")]
        blocks.append([tensors[name] for name in names])
    width = WIDTH // chunks
    pieces = [
        [
            (
                gate[c * width : c * width + width],
                up[c * width : c * width + width],
                down[:, c * width : c * width + width],
            )
            for c in range(chunks)
        ]
        for gate, up, down in blocks
    ]
    if mode == "split":
        return [piece for source in pieces for piece in source]
    experts = []
    for chunk in range(chunks):
        parts = [source[chunk] for source in pieces]
        gate, up = (torch.cat([part[which] for part in parts]) for which in (0, 1))
        experts.append((gate, up, torch.cat([part[2] for part in parts], dim=1)))
    return experts


@pytest.mark.parametrize(
    ("mode", "chunks", "names"),
    [
        ("split", 1, ["seed", "code", "math"]),  # one chunk is the whole source
        ("split", 2, ["seed.0", "seed.1", "code.0", "code.1", "math.0", "math.1"]),
        ("split", 4, [f"{name}.{chunk}" for name in ("seed", "code", "math") for chunk in range(4)]),
        ("blend", 3, ["blend.0", "blend.1", "blend.2"]),
    ],
)
def test_split_and_blended_experts_against_slicing(family, tmp_path, mode, chunks, names):
    options = {"num_chunks": chunks} if mode == "split" else {}
    report = merge(MergeRecipe(str(family.seed), family.experts, expert_mode=mode, **options), tmp_path / "out")
    assert_complete(tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    for layer in range(LAYERS):
        expected = slow_experts([family.seed, family.code, family.math], layer, mode, chunks)
        gate_up = merged[LAYER.format(layer, "experts.gate_up_proj")]
        down = merged[LAYER.format(layer, "experts.down_proj")]
        assert len(gate_up) == len(down) == len(expected) == len(names)
        for number, (gate, up, expert_down) in enumerate(expected):
            assert raw_bytes(gate_up[number]) == raw_bytes(torch.cat([gate, up]))
            assert raw_bytes(down[number]) == raw_bytes(expert_down)
    model = load_float32(tmp_path / "out")
    assert model.config.expert_names == report.checked.plan.expert_names == names
    assert model.config.num_local_experts == len(names)
    assert model.config.intermediate_size == {"split": WIDTH // chunks, "blend": WIDTH}[mode]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "chunks"), [("whole", 1), ("split", 2), ("blend", 3)])
def test_folded_norms_against_a_slow_reference(tmp_path, dtype, mode, chunks):
    """W diag(own / merged), the merged norm as it is stored: in float32 one division, one product, one rounding."""
    folders = [save_seed(tmp_path / "seed", dtype=dtype)]
    for number, name in enumerate("ab", 1):  # far enough for the norms to differ
        folders.append(grow(folders[0], tmp_path / name, random_seed=number, noise=0.5))
    experts = {"a": str(folders[1]), "b": str(folders[2])}
    merge(MergeRecipe(str(folders[0]), experts, expert_mode=mode, fold_norms=True), tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    norm = "model.layers.{}.post_attention_layernorm.weight"
    for layer in range(LAYERS):
        gamma = merged[norm.format(layer)].float()
        folded = []
        for folder in folders:
            tensors = tensors_of(folder)
            ratio = tensors[norm.format(layer)].float() / gamma
            assert (ratio - 1).abs().max() > 0.05
            gate, up = (tensors[LAYER.format(layer, f"{part}_proj.weight")] for part in ("gate", "up"))
            folded.append([(weights.float() * ratio).to(dtype) for weights in (gate, up)])
        gate_up = merged[LAYER.format(layer, "experts.gate_up_proj")]
        width = WIDTH // chunks
        for number in range(len(gate_up)):
            if mode == "blend":
                rows = slice(number * width, number * width + width)
                expected = [torch.cat([blocks[which][rows] for blocks in folded]) for which in (0, 1)]
            else:
                source, chunk = divmod(number, chunks)
                expected = [block[chunk * width : chunk * width + width] for block in folded[source]]
            assert raw_bytes(gate_up[number]) == raw_bytes(torch.cat(expected))
        downs = slow_experts(folders, layer, "blend" if mode == "blend" else "split", chunks)
        for number, (_, _, down) in enumerate(downs):  # downs do not see the norm
            assert raw_bytes(merged[LAYER.format(layer, "experts.down_proj")][number]) == raw_bytes(down)


def test_folding_leaves_a_channel_alone_that_the_merged_norm_shuts(tmp_path):
    """Nothing passes there, so there is nothing to restore, and nothing to divide by."""
    seed = save_seed(tmp_path / "seed")

    def with_gamma(value):
        def change(model):
            for layer in model.model.layers:
                layer.post_attention_layernorm.weight.data[5] = value

        return change

    plus = grow(seed, tmp_path / "plus", random_seed=1, change=with_gamma(0.5))
    minus = grow(seed, tmp_path / "minus", random_seed=2, change=with_gamma(-0.5))  # the mean is 0
    experts = {"plus": str(plus), "minus": str(minus)}
    merge(MergeRecipe(str(seed), experts, seed_expert=False, fold_norms=True), tmp_path / "out")
    assert_complete(tmp_path / "out")
    merged, own = tensors_of(tmp_path / "out"), tensors_of(minus)
    for layer in range(LAYERS):
        gate_up = merged[LAYER.format(layer, "experts.gate_up_proj")][1]
        assert merged[f"model.layers.{layer}.post_attention_layernorm.weight"][5] == 0
        assert torch.equal(gate_up[:WIDTH, 5], own[LAYER.format(layer, "gate_proj.weight")][:, 5])
        assert not torch.equal(gate_up[:WIDTH, 4], own[LAYER.format(layer, "gate_proj.weight")][:, 4])


def assert_mean(merged: dict[str, torch.Tensor], folders: list[Path]) -> None:
    """Everything but experts and routers is the plain mean, summed in float64 and rounded once."""
    for name in (name for name in merged if ".mlp." not in name):
        rows = [tensors_of(folder)[name].double() for folder in folders]
        magnitude = sum(row.abs() for row in rows) / len(rows)
        assert_rounded_once(merged[name], sum(rows) / len(rows), magnitude)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_dtype_converts_as_torch_does(tmp_path, stored, wanted):
    seed = save_seed(tmp_path / "seed", dtype=stored)
    code = grow(seed, tmp_path / "code")
    merge(MergeRecipe(str(seed), {"code": str(code)}, dtype=wanted), tmp_path / "out")
    merged, dtype = tensors_of(tmp_path / "out"), getattr(torch, wanted)
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    for number, folder in enumerate([seed, code]):
        source = tensors_of(folder)
        for layer in range(LAYERS):
            gate, up, down = (
                source[LAYER.format(layer, f"{part}_proj.weight")].to(dtype) for part in ("gate", "up", "down")
            )
            experts = merged[LAYER.format(layer, "experts.gate_up_proj")][number]
            assert raw_bytes(experts) == raw_bytes(torch.cat([gate, up]))
            assert raw_bytes(merged[LAYER.format(layer, "experts.down_proj")][number]) == raw_bytes(down)
    assert_mean(merged, [seed, code])
    assert load_float32(tmp_path / "out").config.to_dict()["num_local_experts"] == 2
    assert f'"dtype": "{wanted}"' in (tmp_path / "out" / "config.json").read_text()


def test_without_the_seed_as_an_expert(family, tmp_path):
    report = merge(MergeRecipe(str(family.seed), family.experts, seed_expert=False), tmp_path / "out")
    assert_complete(tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    assert load_float32(tmp_path / "out").config.expert_names == ["code", "math"]
    for layer in range(LAYERS):
        experts = merged[LAYER.format(layer, "experts.down_proj")]
        assert len(experts) == 2
        for number, folder in enumerate([family.code, family.math]):
            assert torch.equal(experts[number], tensors_of(folder)[LAYER.format(layer, "down_proj.weight")])
    assert_mean(merged, [family.code, family.math])
    assert [(fate.fate, fate.tensors) for fate in report.fates if fate.source == "seed"] == [("not used", 21)]


def test_one_checkpoint_alone_is_sparse_upcycling(family, tmp_path):
    """As many copies of the seed as there are names."""
    copies = {f"copy{number}": str(family.seed) for number in range(3)}
    merge(MergeRecipe(str(family.seed), copies, seed_expert=False), tmp_path / "out")
    experts = tensors_of(tmp_path / "out")[LAYER.format(0, "experts.gate_up_proj")]
    assert len(experts) == 3
    assert torch.equal(experts[0], experts[1])
    assert torch.equal(experts[0], experts[2])


def test_the_same_recipe_gives_the_same_bytes_and_another_random_seed_other_routers(family, tmp_path):
    recipe = MergeRecipe(str(family.seed), family.experts)
    merge(recipe, tmp_path / "one" / "llama-btx", Options(workers=1))
    merge(recipe, tmp_path / "two" / "llama-btx", Options(workers=4))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    merge(MergeRecipe(str(family.seed), family.experts, random_seed=1), tmp_path / "other")
    one, other = files_of(tmp_path / "one" / "llama-btx"), files_of(tmp_path / "other")
    assert {name for name in one if one[name] != other[name]} == {"model.safetensors", "btx_recipe.yaml"}
    old, new = tensors_of(tmp_path / "one" / "llama-btx"), tensors_of(tmp_path / "other")
    differing = {name for name in old if not torch.equal(old[name], new[name])}
    assert differing == {LAYER.format(layer, "gate.weight") for layer in range(LAYERS)}


@pytest.mark.parametrize(
    ("options", "fates"),
    [
        ({}, {"averaged": 15, "expert": 6}),
        ({"combine": "seed"}, {"copied": 15, "expert": 6, "not used": 15}),
        ({"seed_expert": False}, {"averaged": 15, "expert": 6, "not used": 21}),
        ({"seed_expert": False, "combine": "ties"}, {"averaged": 15, "expert": 6, "not used": 6}),
    ],
)
def test_the_report_accounts_for_every_tensor_and_byte_of_every_source(family, tmp_path, options, fates):
    report = merge(MergeRecipe(str(family.seed), family.experts, **options), tmp_path / "out")
    assert {fate.fate: fate.tensors for fate in report.fates} == fates
    for name, folder in {"seed": family.seed, **family.experts}.items():
        tensors = tensors_of(Path(folder))
        mine = [fate for fate in report.fates if fate.source == name]
        assert len({fate.fate for fate in mine}) == len(mine)
        assert sum(fate.tensors for fate in mine) == len(tensors) == 21
        assert sum(fate.nbytes for fate in mine) == sum(tensor.nbytes for tensor in tensors.values())
    read = sum(fate.nbytes for fate in report.fates if fate.fate != "not used")
    assert report.checked.plan.bytes_to_read == read


def test_tensors_that_are_passed_over_are_accounted_for_too(tmp_path):
    """A tied checkpoint that holds its head all the same, and the buffer that old versions of transformers saved."""
    seed = save_seed(tmp_path / "seed", tie_word_embeddings=True)
    code = grow(seed, tmp_path / "code")
    tensors = tensors_of(seed)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, seed / "model.safetensors", metadata={"format": "pt"})
    report = merge(MergeRecipe(str(seed), {"code": str(code)}), tmp_path / "out")
    assert_complete(tmp_path / "out")
    [passed] = [fate for fate in report.fates if fate.fate == "passed over"]
    assert (passed.source, passed.tensors, passed.nbytes) == ("seed", 2, 128 * 64 * 4 + 8 * 4)
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")


def test_progress_adds_up(family, tmp_path):
    moved = []
    recipe = MergeRecipe(str(family.seed), {"code": ExpertSpec(str(family.code))})
    report = merge(recipe, tmp_path / "out", reporter=Told(bytes_done=moved.append))
    assert sum(moved) == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    assert report.seconds > 0
    assert report.peak_memory > 10_000_000
    assert report.kept_bytes == 0
    assert report.output == tmp_path / "out"
