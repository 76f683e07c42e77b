"""What may not be merged is refused before anything is written, and everybody learns what to do about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaModel, MistralConfig, MistralForCausalLM

from btx_merge import Check, InputError, MergeRecipe, NonFiniteError, Problem, Report, check, merge
from btx_merge.architectures.llama import ACTIVATIONS, DEFAULTS, normalise_config
from tests.conftest import Family
from tests.support.common import assert_complete, edit_json, grow, save_seed, tensors_of

WEIGHTS = "model.safetensors"
UNCHANGED = "Experts must be grown from the seed without changing its architecture."
WHOLE = "Save the whole LlamaForCausalLM with save_pretrained."
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def copied(folder: Path, target: Path, **config: Any) -> Path:
    """A checkpoint's copy with keys of config.json set (None removes one)."""
    shutil.copytree(folder, target)
    if config:
        edit_json(target / "config.json", **config)
    return target


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def refusal(tmp_path: Path, seed: Path, **changes: Any) -> tuple[Problem, ...]:
    """The one report of a check and of a merge, complete in every part; and nothing was written."""
    values = {"experts": {}, "num_experts_per_tok": 1, **changes}
    values["experts"] = {name: str(model) for name, model in values["experts"].items()}
    recipe = MergeRecipe(str(seed), **values)
    room = tmp_path / "room"
    room.mkdir()
    with pytest.raises(InputError) as by_merge:
        merge(recipe, room / "out")
    assert list(room.iterdir()) == []  # no output, no .btx-partial
    with pytest.raises(InputError) as by_check:
        check(recipe)
    assert by_check.value.problems == by_merge.value.problems
    for problem in by_merge.value.problems:
        assert problem.source in {"seed", "recipe", *recipe.experts}
        for part in (problem.where, problem.found, problem.expected, problem.remedy):
            assert part, problem
            assert str(part) in str(problem)
    return by_merge.value.problems


# The architecture


DIFFERING: dict[str, tuple[dict[str, Any], dict[str, tuple[str, str]]]] = {
    # changes to config.json, and of each key: what was found, what was expected
    "layers": ({"num_hidden_layers": 1}, {"num_hidden_layers": ("1", "2")}),
    "hidden size": ({"hidden_size": 128}, {"hidden_size": ("128", "64"), "head_dim": ("32", "16")}),
    "intermediate size": ({"intermediate_size": 192}, {"intermediate_size": ("192", "96")}),
    "heads": ({"num_attention_heads": 8}, {"num_attention_heads": ("8", "4"), "head_dim": ("8", "16")}),
    "key/value heads": ({"num_key_value_heads": 4}, {"num_key_value_heads": ("4", "2")}),
    "head_dim": ({"head_dim": 32}, {"head_dim": ("32", "16")}),
    "rms_norm_eps": ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": ("1e-05", "1e-06")}),
    "hidden_act": ({"hidden_act": "gelu"}, {"hidden_act": ("'gelu'", "'silu'")}),
    "attention bias": ({"attention_bias": True}, {"attention_bias": ("True", "False")}),
    "rope_theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters.rope_theta": ("500000.0", "10000.0")},
    ),
    "rope_scaling": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters.rope_type": ("'linear'", "'default'"), "rope_parameters.factor": ("2.0", "None")},
    ),
    "rope_theta in the old spelling": (
        {"rope_parameters": None, "rope_theta": 1e6},
        {"rope_parameters.rope_theta": ("1000000.0", "10000.0")},
    ),
}


@pytest.mark.parametrize("kind", DIFFERING)
def test_another_architecture(kind: str, family: Family, tmp_path: Path) -> None:
    """Only config.json is changed here, so that each key is seen alone."""
    changes, differing = DIFFERING[kind]
    if "head_dim" in differing and kind != "head_dim":
        changes["head_dim"] = None
    odd = copied(family.code, tmp_path / "odd", **changes)
    problems = refusal(tmp_path, family.seed, experts={"odd": odd, "math": family.math})
    found = {p.where: p for p in problems if p.where.startswith("config.json")}
    assert {where: (p.found, p.expected, p.remedy) for where, p in found.items()} == {
        f"config.json: {key}": (value, f"{wanted} as in the seed", UNCHANGED)
        for key, (value, wanted) in differing.items()
    }
    assert {problem.source for problem in problems} == {"odd"}


@pytest.mark.parametrize(
    "config", [{"num_hidden_layers": 3}, {"hidden_size": 128}, {"num_key_value_heads": 4}, {"attention_bias": True}]
)
def test_a_model_of_another_shape(config: dict[str, Any], family: Family, tmp_path: Path) -> None:
    """A real one, whose tensors fit its own config: told by the config alone."""
    odd = save_seed(tmp_path / "odd", **config)
    problems = refusal(tmp_path, family.seed, experts={"odd": odd})
    assert all(p.where.startswith("config.json: ") for p in problems)
    assert f"config.json: {next(iter(config))}" in {p.where for p in problems}


@pytest.mark.parametrize(("rope_type", "matters"), [("dynamic", True), ("yarn", True), ("llama3", False)])
def test_lengths_matter_where_the_rotary_embedding_is_computed_from_them(
    rope_type: str, matters: bool, tmp_path: Path
) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    seed = save_seed(tmp_path / "seed", rope_parameters=rope)
    longer = copied(seed, tmp_path / "longer", max_position_embeddings=256)
    if matters:
        (problem,) = refusal(tmp_path, seed, experts={"longer": longer})
        expected = ("config.json: max_position_embeddings", "256", "128 as in the seed")
        assert (problem.where, problem.found, problem.expected) == expected
    else:
        warnings = [str(w) for w in check(MergeRecipe(str(seed), {"longer": str(longer)})).warnings]
        assert "longer: config.json: max_position_embeddings: 256; expected 128 as in the seed" in warnings[0]


def test_a_text_of_two_domains_is_a_warning(family: Family, texts: dict[str, str]) -> None:
    twice = dict.fromkeys(family.experts, texts["code"])
    (warning,) = check(MergeRecipe(str(family.seed), family.experts, domain_text=twice)).warnings
    assert (warning.source, warning.found) == ("code, math", "the same text for several domains")
    assert check(MergeRecipe(str(family.seed), family.experts, domain_text=texts)).warnings == ()


def test_another_length_is_a_warning(family: Family, tmp_path: Path) -> None:
    longer = copied(family.code, tmp_path / "longer", max_position_embeddings=4096)
    report = merge(MergeRecipe(str(family.seed), {"longer": str(longer)}), tmp_path / "out")
    assert [str(warning) for warning in report.checked.warnings] == [
        "longer: config.json: max_position_embeddings: 4096; expected 128 as in the seed. The result keeps 128."
    ]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 128


def test_what_is_no_llama(family: Family, tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "mistral")
    nameless = copied(family.code, tmp_path / "nameless", model_type=None)
    problems = refusal(tmp_path, family.seed, experts={"mistral": tmp_path / "mistral", "nameless": nameless})
    assert [str(problem) for problem in problems] == [
        f"{name}: config.json: model_type is {kind}; expected 'llama'. Only Llama checkpoints can be merged."
        for name, kind in (("mistral", "'mistral'"), ("nameless", "None"))
    ]


def test_what_was_merged_before(family: Family, tmp_path: Path) -> None:
    merge(MergeRecipe(str(family.seed), family.experts), tmp_path / "merged")
    (problem,) = refusal(tmp_path, family.seed, experts={"again": tmp_path / "merged"})
    assert str(problem) == (
        "again: config.json: model_type is 'btx'; expected 'llama'. "
        "This is a merged model already: btx extract takes an expert out, btx edit changes its experts."
    )


def test_biases_in_the_feed_forward_blocks(family: Family, tmp_path: Path) -> None:
    """Of the seed too, where they agree."""
    biased = save_seed(tmp_path / "biased", mlp_bias=True)
    remedy = "Feed-forward blocks with biases cannot become experts."
    problems = refusal(tmp_path, biased, experts={"twin": copied(biased, tmp_path / "twin")})
    assert f"seed: config.json: mlp_bias: True; expected False. {remedy}" in map(str, problems)
    assert f"twin: config.json: mlp_bias: True; expected False. {remedy}" in map(str, problems)


def test_biases_of_the_attention_are_merged(tmp_path: Path) -> None:
    seed = save_seed(tmp_path / "seed", attention_bias=True)
    edit_tensors(seed, lambda tensors: [t.normal_() for name, t in tensors.items() if name.endswith("bias")])
    twin = grow(seed, tmp_path / "twin")
    merge(MergeRecipe(str(seed), {"twin": str(twin)}), tmp_path / "out")
    assert_complete(tmp_path / "out")
    name = "model.layers.1.self_attn.k_proj.bias"
    a, b, merged = (tensors_of(folder)[name] for folder in (seed, twin, tmp_path / "out"))
    assert a.abs().max() > 0.1
    torch.testing.assert_close(merged, (a + b) / 2)


# Tensors


def test_missing_tensors(family: Family, tmp_path: Path) -> None:
    odd = edit_tensors(copied(family.code, tmp_path / "odd"), lambda tensors: [tensors.pop(DOWN), tensors.pop(NORM)])
    problems = refusal(tmp_path, family.seed, experts={"odd": odd})
    assert sorted(map(str, problems)) == [
        f"odd: tensor {name}: missing; expected there, by config.json. {WHOLE}" for name in (DOWN, NORM)
    ]


def test_many_missing_tensors_are_told_in_a_few_lines(family: Family, tmp_path: Path) -> None:
    odd = copied(family.code, tmp_path / "odd")
    edit_tensors(odd, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name])
    problems = refusal(tmp_path, family.seed, experts={"odd": odd})
    assert [problem.where for problem in problems][-1] == "5 more tensors"
    assert len(problems) == 5


def test_unexpected_tensors(family: Family, tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.q_norm.weight": torch.ones(16),
        "model.layers.2.mlp.up_proj.weight": torch.ones(1),
    }
    odd = edit_tensors(copied(family.code, tmp_path / "odd"), lambda tensors: tensors.update(extra))
    problems = refusal(tmp_path, family.seed, experts={"odd": odd})
    assert [str(problem) for problem in problems] == [
        f"odd: tensor {name}: unexpected; expected a Llama's tensors only. "
        "If config.json is right, leave these tensors out and save the model again."
        for name in extra
    ]


def test_tensors_of_another_shape(family: Family, tmp_path: Path) -> None:
    odd = edit_tensors(copied(family.code, tmp_path / "odd"), lambda t: t.update({DOWN: t[DOWN].T.contiguous()}))
    (problem,) = refusal(tmp_path, family.seed, experts={"odd": odd})
    assert str(problem) == (
        f"odd: model.safetensors: {DOWN}: shape [96, 64]; expected [64, 96] by config.json. "
        "Weights and config.json must be of one model: save both again with save_pretrained."
    )


def test_a_bare_llama_model(family: Family, tmp_path: Path) -> None:
    LlamaModel.from_pretrained(family.code).save_pretrained(tmp_path / "bare")
    problems = refusal(tmp_path, family.seed, experts={"bare": tmp_path / "bare"})
    missing = [problem for problem in problems if problem.found == "missing"]
    assert {problem.remedy for problem in missing} == {"This is a bare LlamaModel; save the LlamaForCausalLM."}


@pytest.mark.parametrize("buffer", ["inv_freq", "original_inv_freq", "cos_cached", "sin_cached"])
def test_buffers_of_old_checkpoints_are_passed_over(buffer: str, family: Family, tmp_path: Path) -> None:
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.{buffer}": torch.ones(8) for layer in range(2)}
    old = edit_tensors(copied(family.code, tmp_path / "old"), lambda tensors: tensors.update(buffers))
    experts = {"old": str(old)}
    report = merge(MergeRecipe(str(family.seed), experts), tmp_path / "out")
    assert_complete(tmp_path / "out")
    passed = [fate for fate in report.fates if fate.fate == "passed over"]
    assert [(fate.source, fate.tensors, fate.nbytes) for fate in passed] == [("old", 2, 64)]
    merge(MergeRecipe(str(family.seed), {"old": str(family.code)}), tmp_path / "plain")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_with_a_prefix_of_a_wrapper(prefix: str, family: Family, tmp_path: Path) -> None:
    """As torch.compile, DataParallel and peft leave them; what the remedy says helps."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    odd = edit_tensors(copied(family.code, tmp_path / "odd"), rename)
    problems = refusal(tmp_path, family.seed, experts={"odd": odd})
    said = f"Every name begins with `{prefix}`, which a wrapper left there: take it off all names and save again."
    assert {problem.remedy for problem in problems} == {said}
    assert len(problems) <= 10
    edit_tensors(odd, lambda tensors: [tensors.update({n.removeprefix(prefix): tensors.pop(n)}) for n in [*tensors]])
    assert check(MergeRecipe(str(family.seed), {"odd": str(odd)})).warnings == ()


def test_float64_is_no_quantised_checkpoint(family: Family, tmp_path: Path) -> None:
    odd = copied(family.code, tmp_path / "odd")
    edit_tensors(odd, lambda tensors: tensors.update({name: value.double() for name, value in tensors.items()}))
    problems = refusal(tmp_path, family.seed, experts={"odd": odd})
    assert {problem.remedy for problem in problems[:4]} == {
        "Load it in transformers, call model.float(), save_pretrained, and give that folder."
    }
    assert len(problems) == 5


# Quantised


def test_a_quantised_checkpoint_is_refused_with_the_way_out(family: Family, tmp_path: Path) -> None:
    configs: dict[str, Any] = {
        "gptq": {"quant_method": "gptq", "bits": 4},
        "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "odd": "int4",
    }
    experts = {
        name: copied(family.code, tmp_path / name, quantization_config=config) for name, config in configs.items()
    }
    remedy = "Load it in transformers, call model.dequantize(), save_pretrained, and give that folder."
    assert [str(problem) for problem in refusal(tmp_path, family.seed, experts=experts)] == [
        f"{name}: config.json: a quantised checkpoint ({method}); expected plain weights. {remedy}"
        for name, method in (("gptq", "gptq"), ("bitsandbytes", "bitsandbytes"), ("odd", "int4"))
    ]


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float64, "F64")],
)
def test_quantised_tensors_without_a_word_in_the_config(
    dtype: torch.dtype, name: str, family: Family, tmp_path: Path
) -> None:
    odd = edit_tensors(copied(family.code, tmp_path / "odd"), lambda t: t.update({DOWN: t[DOWN].to(dtype)}))
    (problem,) = refusal(tmp_path, family.seed, experts={"odd": odd})
    assert str(problem) == (
        f"odd: model.safetensors: {DOWN}: dtype {name}; expected one of BF16, F16, F32. "
        + (
            "Load it in transformers, call model.float(), save_pretrained, and give that folder."
            if name == "F64"
            else "A quantised checkpoint: load it, call model.dequantize(), save it, and give that folder."
        )
    )


# Tied and untied


@pytest.fixture(scope="module")
def tied(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's code expert with its head tied, that is without one."""
    folder = copied(family.code, tmp_path_factory.mktemp("tied") / "tied", tie_word_embeddings=True)
    return edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))


def test_tied_and_untied_sources_are_refused(family: Family, tied: Path, tmp_path: Path) -> None:
    where, remedy = (
        "config.json: tie_word_embeddings",
        "Give --untie (`untie: true`) to untie them all: a tied source's ",
    )
    (problem,) = refusal(tmp_path, family.seed, experts={"tied": tied, "math": family.math})
    line = f"tied: {where}: True; expected False as in the seed. {remedy}head is its embedding."
    assert str(problem) == line
    (tmp_path / "room").rmdir()
    (problem,) = refusal(tmp_path, tied, experts={"untied": family.code})
    assert str(problem) == f"untied: {where}: False; expected True as in the seed. {remedy}head is its embedding."


@pytest.mark.parametrize("seed_is_tied", [False, True])
def test_untie(seed_is_tied: bool, family: Family, tied: Path, tmp_path: Path) -> None:
    """The result's head is the mean of all heads, a tied source's being its embedding."""
    folders = [tied, family.seed, family.math] if seed_is_tied else [family.seed, tied, family.math]
    recipe = MergeRecipe(str(folders[0]), {"a": str(folders[1]), "math": str(folders[2])}, untie=True)
    merge(recipe, tmp_path / "out")
    assert_complete(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    merged = tensors_of(tmp_path / "out")
    sources = [tensors_of(folder) for folder in folders]
    embedding = "model.embed_tokens.weight"
    head = sum(tensors.get("lm_head.weight", tensors[embedding]) for tensors in sources) / 3
    torch.testing.assert_close(merged["lm_head.weight"], head)
    torch.testing.assert_close(merged[embedding], sum(tensors[embedding] for tensors in sources) / 3)


def test_tied_sources_stay_tied(tied: Path, tmp_path: Path) -> None:
    """With untie too: it allows a mixture, it asks for nothing."""
    twin = edit_tensors(copied(tied, tmp_path / "twin"), lambda tensors: tensors[DOWN].add_(0.001))
    merge(MergeRecipe(str(tied), {"twin": str(twin)}, untie=True), tmp_path / "out")
    assert_complete(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")


def test_the_head_that_a_tied_checkpoint_still_holds(tied: Path, tmp_path: Path) -> None:
    """Passed over where it is the embedding once more; refused where it says something else."""

    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    double = edit_tensors(copied(tied, tmp_path / "double"), add_head)
    report = merge(MergeRecipe(str(tied), {"double": str(double)}), tmp_path / "out")
    assert ("double", "passed over", 1) in [(fate.source, fate.fate, fate.tensors) for fate in report.fates]
    other = edit_tensors(copied(double, tmp_path / "other"), lambda tensors: tensors["lm_head.weight"][64].add_(1))
    (problem,) = refusal(tmp_path, tied, experts={"other": other})
    assert str(problem) == (
        "other: model.safetensors: lm_head.weight differs from the embedding although tie_word_embeddings is true; "
        "expected the same numbers, or no such tensor. "
        "Say false in its config.json if the head is meant, or delete the tensor if it is not."
    )


@pytest.mark.parametrize("row", [1, 63, 126, 127])
def test_every_row_of_a_tied_checkpoints_head_counts(
    row: int, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where only the rows of special tokens were trained. Read in pieces of four rows here."""
    monkeypatch.setattr("btx_merge.checkpoints.stored.BLOCK_BYTES", 1024)

    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    other = edit_tensors(copied(tied, tmp_path / "other"), add_head)
    assert check(MergeRecipe(str(tied), {"other": str(other)})).warnings != ()  # identical to the seed: no refusal
    edit_tensors(other, lambda tensors: tensors["lm_head.weight"][row, 63].add_(1))
    (problem,) = refusal(tmp_path, tied, experts={"other": other})
    assert problem.found == "lm_head.weight differs from the embedding although tie_word_embeddings is true"


# NaN and Inf


BAD_NUMBERS = [float("nan"), float("inf"), float("-inf")]
PLACES = {  # tensor, row and column; what the error says of the place
    "an expert's": (DOWN, (5, 7), "row 5, column 7"),
    "a gate": ("model.layers.1.mlp.gate_proj.weight", (95, 63), "row 95, column 63"),
    "a shared matrix": ("model.layers.0.self_attn.q_proj.weight", (0, 0), "row 0, column 0"),
    "a norm": (NORM, (13,), "row 13"),
    "an embedding": ("model.embed_tokens.weight", (127, 1), "row 127, column 1"),
}


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nonfinite_numbers_stop_the_merge(
    dtype: torch.dtype, place: str, value: float, family: Family, tmp_path: Path
) -> None:
    name, index, where = PLACES[place]

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][index] = value
        tensors |= {key: tensor.to(dtype) for key, tensor in tensors.items()}

    odd = edit_tensors(copied(family.code, tmp_path / "odd"), spoil)
    recipe = MergeRecipe(str(family.seed), {"odd": str(odd), "math": str(family.math)})
    with pytest.raises(NonFiniteError) as caught:
        merge(recipe, tmp_path / "room" / "out")
    assert str(caught.value) == (
        f"odd: model.safetensors: {name} holds {value} at {where}. "
        "Repair or leave out this source; --allow-nonfinite goes on all the same."
    )
    left = {path.name for path in (tmp_path / "room").iterdir()}
    assert left <= {"out.btx-partial"}  # it goes where nothing in it was finished
    assert not (tmp_path / "room" / "out.btx-partial" / "config.json").exists()


@pytest.mark.parametrize("combine", ["mean", "ties", "dare_linear"])
@pytest.mark.parametrize("mode", ["whole", "split", "blend"])
@pytest.mark.parametrize("name", [DOWN, "model.layers.0.mlp.up_proj.weight", NORM])
def test_nonfinite_numbers_stop_every_kind_of_merge(
    name: str, mode: str, combine: str, family: Family, tmp_path: Path
) -> None:
    odd = edit_tensors(copied(family.code, tmp_path / "odd"), lambda t: t[name].view(-1)[3].fill_(float("nan")))
    recipe = MergeRecipe(str(family.seed), {"odd": str(odd)}, expert_mode=mode, combine=combine)
    with pytest.raises(NonFiniteError, match=rf"^odd: model\.safetensors: {name} holds nan at row "):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", PLACES)
def test_allow_nonfinite_goes_on(place: str, family: Family, tmp_path: Path) -> None:
    """An expert keeps them where they were; an average has them where a source has."""
    name, index, _ = PLACES[place]

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][index] = float("nan")

    odd = edit_tensors(copied(family.code, tmp_path / "odd"), spoil)
    merge(MergeRecipe(str(family.seed), {"odd": str(odd)}, allow_nonfinite=True), tmp_path / "out")
    merged = tensors_of(tmp_path / "out")
    bad = {key: int((~torch.isfinite(tensor)).sum()) for key, tensor in merged.items()}
    expected = {
        DOWN: "model.layers.0.mlp.experts.down_proj",
        "model.layers.1.mlp.gate_proj.weight": "model.layers.1.mlp.experts.gate_up_proj",
    }.get(name, name)
    assert {key: count for key, count in bad.items() if count} == {expected: 1}
    assert torch.isnan(merged[expected][(1, *index) if expected != name else index])


# Relatives and twins


def test_a_source_that_did_not_grow_from_the_seed(family: Family, tmp_path: Path) -> None:
    stranger = save_seed(tmp_path / "stranger", seed=99)
    (problem,) = refusal(tmp_path, family.seed, experts={"stranger": stranger, "math": family.math})
    assert (problem.source, problem.where) == ("stranger", "weights")
    assert problem.found.startswith("not grown from the seed: embeddings cosine ")
    for group in ("norms", "attention", "feed-forward", "embeddings", "head"):
        assert f"{group} cosine " in problem.found
    figures = dict(part.split(" cosine ") for part in problem.found.split(": ")[1].split(", "))
    cosine, distance = map(float, figures["feed-forward"].split(" distance "))
    assert abs(cosine) < 0.1
    assert distance == pytest.approx(2**0.5, abs=0.1)  # two independent vectors of one length
    assert problem.expected == "cosines above 0.2 in attention and feed-forward"
    assert problem.remedy == "Use experts grown from this seed; --allow-unrelated goes on all the same."


def test_allow_unrelated_goes_on_with_a_warning(family: Family, tmp_path: Path) -> None:
    stranger = save_seed(tmp_path / "stranger", seed=99)
    recipe = MergeRecipe(str(family.seed), {"stranger": str(stranger)}, allow_unrelated=True)
    report = merge(recipe, tmp_path / "out")
    assert_complete(tmp_path / "out")
    (warning,) = report.checked.warnings
    assert str(warning).startswith("stranger: weights: not grown from the seed: ")


def test_the_divergence_is_the_one_that_is_seen_slowly(family: Family) -> None:
    """The sample is a good part of such small tensors, so its figures are near those of the whole."""
    checked = check(MergeRecipe(str(family.seed), family.experts))
    measured = {(item.source, item.group): item for item in checked.divergence}
    assert set(measured) == {
        (source, group)
        for source in ("code", "math")
        for group in ("embeddings", "attention", "feed-forward", "norms", "head")
    }
    groups = {"feed-forward": ".mlp.", "attention": "self_attn", "norms": "norm", "head": "lm_head"}
    seed, code = tensors_of(family.seed), tensors_of(family.code)
    for group, part in groups.items():
        a = torch.cat([tensor.flatten() for name, tensor in sorted(seed.items()) if part in name]).double()
        b = torch.cat([tensor.flatten() for name, tensor in sorted(code.items()) if part in name]).double()
        item = measured["code", group]
        assert item.distance == pytest.approx(float((b - a).norm() / a.norm()), rel=0.1)
        assert item.cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=0.002)


def test_nonfinite_numbers_do_not_spoil_the_figures(family: Family, tmp_path: Path) -> None:
    """They are left out, and so what check prints stays JSON."""
    odd = copied(family.code, tmp_path / "odd")
    edit_tensors(
        odd,
        lambda tensors: [
            tensor.view(-1)[:2].copy_(torch.tensor([float("nan"), -float("inf")])) for tensor in tensors.values()
        ],
    )
    figures = [check(MergeRecipe(str(family.seed), {"x": str(model)})).divergence for model in (odd, family.code)]
    for spoilt, clean in zip(*figures, strict=True):
        assert spoilt.distance == pytest.approx(clean.distance, rel=0.05)
        assert spoilt.cosine == pytest.approx(clean.cosine, abs=0.01)
    json.dumps(check(MergeRecipe(str(family.seed), {"x": str(odd)})).to_dict(), allow_nan=False)


def test_a_source_finetuned_hard_is_still_a_relative(family: Family, tmp_path: Path) -> None:
    """Every weight moved by its own deviation: cosine 0.7."""
    far = grow(family.seed, tmp_path / "far", noise=1.0)
    checked = check(MergeRecipe(str(family.seed), {"far": str(far)}))
    cosine = next(item.cosine for item in checked.divergence if item.group == "attention")
    assert cosine == pytest.approx(0.5**0.5, abs=0.05)
    assert checked.warnings == ()


@pytest.mark.parametrize("experts", [{"a": "seed"}, {"a": "code", "b": "code"}, {"a": "seed", "b": "seed"}])
def test_identical_sources_are_a_warning(experts: dict[str, str], family: Family, tmp_path: Path) -> None:
    """Sparse upcycling does it on purpose."""
    recipe = MergeRecipe(str(family.seed), {name: str(getattr(family, model)) for name, model in experts.items()})
    report = merge(recipe, tmp_path / "out")
    found = [(w.source, w.found.split(" in all ")[0], w.remedy) for w in report.checked.warnings]
    twice = "Two copies of one model are one expert, run twice."
    if "code" in experts.values():
        assert found == [("b", "identical to a", twice)]
    else:
        assert found == [(name, "identical to seed", twice) for name in experts]


def test_sources_that_differ_in_one_sampled_number_are_not_identical(family: Family, tmp_path: Path) -> None:
    near = edit_tensors(copied(family.seed, tmp_path / "near"), lambda tensors: tensors[DOWN][0, 0].add_(1e-3))
    assert check(MergeRecipe(str(family.seed), {"near": str(near)})).warnings == ()


# Recipe and seed


@pytest.mark.parametrize(
    ("changes", "where", "found", "expected"),
    [
        ({"expert_mode": "split", "num_chunks": 5}, "num_chunks", "cut into 5", "2, 3, 4, 6, 8, 12, 16, 24, 32, 48"),
        ({"expert_mode": "split", "num_chunks": 97}, "num_chunks", "cut into 97", "2, 3, 4, 6, 8, 12, 16, 24, 32, 48"),
        ({"expert_mode": "blend"}, "expert_mode: blend", "cut into 5", "2, 3, 4, 6, 8, 12, 16, 24, 32, 48"),
    ],
)
def test_chunks_that_do_not_divide(
    changes: dict[str, Any], where: str, found: str, expected: str, family: Family, tmp_path: Path
) -> None:
    experts = {f"e{number}": family.code for number in range(4)}
    (problem,) = refusal(tmp_path, family.seed, experts=experts, **changes)
    assert problem.source == "recipe"
    assert problem.where == where
    assert problem.found == f"intermediate_size 96 cannot be {found} equal chunks"
    assert problem.expected == f"a divisor of it, such as {expected}"


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_small_files_that_the_result_takes_over(name: str, content: str, family: Family, tmp_path: Path) -> None:
    """Found before the weights are written, not after; and only where they are needed."""
    odd = copied(family.code, tmp_path / "odd")
    (odd / name).write_text(content)
    assert check(MergeRecipe(str(family.seed), {"odd": str(odd)})).warnings == ()
    (problem,) = refusal(tmp_path, family.seed, experts={"odd": odd}, tokenizer_source="odd")
    assert (problem.source, problem.where) == ("odd", str(odd / name))
    assert problem.found.startswith("not JSON: ") or problem.found == "not a JSON object"


# One report


def test_everything_in_one_report(family: Family, tied: Path, tmp_path: Path) -> None:
    """A file, a config, a tensor, a vocabulary, a stranger and the recipe: nobody hides anybody."""
    gone = copied(family.math, tmp_path / "gone")
    next(gone.glob("*.safetensors")).unlink()
    experts = {
        "nowhere": tmp_path / "nowhere",
        "gone": gone,
        "tied": tied,
        "eps": copied(family.code, tmp_path / "eps", rms_norm_eps=1e-3),
        "hole": edit_tensors(copied(family.code, tmp_path / "hole"), lambda tensors: tensors.pop(DOWN)),
        "stranger": save_seed(tmp_path / "stranger", seed=99),
        "words": copied(family.code, tmp_path / "words"),
        "fine": family.code,
    }
    tokenizer = json.loads((experts["words"] / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["w5"], vocab["w6"] = vocab["w6"], vocab["w5"]
    (experts["words"] / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = MergeRecipe(
        str(family.seed), {name: str(path) for name, path in experts.items()}, expert_mode="split", num_chunks=5
    )
    with pytest.raises(InputError) as caught:
        check(recipe)
    problems = caught.value.problems
    by_source = {problem.source: problem.where for problem in problems}
    assert len(problems) == 8
    assert set(by_source) == {"nowhere", "gone", "tied", "eps", "hole", "stranger", "words", "recipe"}


# config.json as transformers reads it


CONFIGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "old theta": {"rope_theta": 500000.0},
    "old linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "old dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "old, both spellings": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}},
    "old null": {"rope_theta": 10000.0, "rope_scaling": None},
    "llama3": {
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "llama3 without its original length": {
        "max_position_embeddings": 4096,
        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"},
    },
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}},
    "yarn without its original length": {
        "max_position_embeddings": 8192,
        "rope_scaling": {"type": "yarn", "factor": 4.0},
    },
    "new default": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "new without theta": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "new without theta, old theta": {"rope_theta": 7e5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "new without a type": {"rope_parameters": {"rope_theta": 2e4}},
    "new and old": {"rope_theta": 3e4, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
    "old scaling and new": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 2e4},
    },
    "new null": {"rope_parameters": None},
    "new empty": {"rope_parameters": {}, "rope_theta": 2e4},
    "own head_dim": {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32},
    "null head_dim": {"hidden_size": 64, "num_attention_heads": 4, "head_dim": None},
    "no key/value heads": {"num_attention_heads": 8, "hidden_size": 64},
    "null key/value heads": {"num_attention_heads": 8, "hidden_size": 64, "num_key_value_heads": None},
    "several ends": {"eos_token_id": [128001, 128008, 128009], "pad_token_id": 0, "bos_token_id": None},
    "tied and biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "whole": {"rms_norm_eps": 1e-5, "initializer_range": 0.01, "use_cache": False, "pretraining_tp": 2},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_are_read_as_transformers_reads_them(kind: str) -> None:
    ours = normalise_config(json.loads(json.dumps(CONFIGS[kind])))
    theirs = LlamaConfig.from_dict(json.loads(json.dumps(CONFIGS[kind]))).to_dict()
    rope = {key: value for key, value in theirs["rope_parameters"].items() if key != "type"}
    assert ours["rope_parameters"] == rope
    assert {key: ours[key] for key in DEFAULTS} == {key: theirs[key] for key in DEFAULTS}


def test_the_activations_are_those_of_transformers() -> None:
    """They are listed without importing it."""
    from transformers.activations import ACT2FN

    assert set(ACTIVATIONS) == set(ACT2FN)


def test_no_key_of_a_llama_config_is_forgotten() -> None:
    """A new field of transformers' that shapes a Llama would be lost in the result."""
    general = set(LlamaConfig.__mro__[1]().to_dict())
    assert set(LlamaConfig().to_dict()) - general == (set(DEFAULTS) | {"rope_parameters"}) - general


def test_what_check_returns_is_what_merge_did(family: Family, tmp_path: Path) -> None:
    recipe = MergeRecipe(str(family.seed), family.experts)
    checked, report = check(recipe), merge(recipe, tmp_path / "out")
    assert isinstance(checked, Check)
    assert isinstance(report, Report)
    compared = {"unchanged": {"code": [], "math": []}, "lossless": False}  # of a check alone: it takes reading
    assert {**report.checked.to_dict(), **compared} == checked.to_dict()


def test_options_that_change_nothing_are_warnings(family: Family) -> None:
    idle = {"density": 0.5, "scale": 2.0, "regmean_ridge": 0.1, "num_chunks": 4, "router_ridge": 0.1}
    found = check(MergeRecipe(str(family.seed), family.experts, **idle)).warnings
    assert [str(warning) for warning in found] == [
        "recipe: density: 0.5 changes nothing with combine: mean; expected combine: ties or dare_ties or dare_linear",
        "recipe: scale: 2.0 changes nothing with combine: mean; expected combine: ties or dare_ties or dare_linear",
        "recipe: regmean_ridge: 0.1 changes nothing with combine: mean; expected combine: regmean or regmean_merged",
        "recipe: num_chunks: 4 changes nothing with expert_mode: whole; expected expert_mode: split",
        "recipe: router_ridge: 0.1 changes nothing with router_init: random; expected router_init: ridge",
    ]
    used = {"combine": "ties", "density": 0.5, "scale": 2.0, "expert_mode": "split", "num_chunks": 4}
    assert check(MergeRecipe(str(family.seed), family.experts, **used)).warnings == ()
