"""Exported models in the programs that they are for, each in an environment of its own (`make slow` builds them).

Log-probabilities of every next token over a text, or logits, against those of the BTX model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from btx_merge import MergeRecipe, export, extract, merge
from tests.common import force_expert, grow, load_float32, save_seed
from tests.test_export import ROPES

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
VOCABULARY, TOKENS = 512, 200
SHAPE = {
    **{"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3},
    **{"max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.12},
}


def run(engine: str, script: str, *arguments: object) -> None:
    """Runs a script of tests/engines in an engine's environment. One that is not there is no reason to skip."""
    python = HERE.parent / ".engines" / engine / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{engine} is not there. `make .engines/{engine}/installed` builds it, `make slow` all of them.")
    command = [str(python), str(HERE / "engines" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One of Llama 2's kind, trained here: llama.cpp knows those of Llama 3's kind by a check sum of each."""
    special = ["<unk>", "<s>", "</s>"]
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=tokens, show_progress=False)
    raw.train_from_iterator(TEXT.splitlines(), trainer)
    data = json.loads(raw.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in special]  # no bytes
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **names)


@pytest.fixture(scope="module")
def ids(tokenizer) -> list[int]:
    return list(tokenizer(TEXT[3000:])["input_ids"][:TOKENS])


def a_merge(folder: Path, tokenizer, experts: int = 3, dtype=torch.float32, per_token: int = 2, **shape) -> Path:
    """Of `experts`, the seed among them, that differ much; with routers that do as well."""
    seed = save_seed(folder / "seed", tokenizer=False, dtype=dtype, **SHAPE, **shape)
    tokenizer.save_pretrained(seed)
    grown = {f"x{n}": str(grow(seed, folder / f"x{n}", random_seed=n, noise=0.5)) for n in range(1, max(2, experts))}
    for path in grown.values():
        tokenizer.save_pretrained(path)
    options = {"seed_expert": experts > 1, "num_experts_per_tok": per_token, "router_std": 0.5}
    merge(MergeRecipe(str(seed), grown, **options), folder / "merged")
    return folder / "merged"


@torch.no_grad()
def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """[T - 1, V], of what follows behind every token but the last."""
    out = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    assert out.exp().max() > 0.1  # something is likely
    return out


def read(file: Path) -> torch.Tensor:
    """[T - 1, V], as an engine's script wrote them."""
    rows = [{int(token): value for token, value in row.items()} for row in json.loads(file.read_text())]
    return torch.tensor([[row[token] for token in range(VOCABULARY)] for row in rows])


def in_llama_cpp(folder: Path, model: Path, ids: list[int], tokenizer, kind: str = "f32") -> torch.Tensor:
    (folder / "ids.json").write_text(json.dumps(ids))
    printable = tokenizer.convert_tokens_to_ids("in")
    run("llama-cpp", "run_llama_cpp.py", model, folder / "ids.json", folder / "out.json", kind, printable)
    return read(folder / "out.json")


@pytest.mark.parametrize("rope", ["default", "linear", "yarn", "llama3"])
@pytest.mark.parametrize("tied", [False, True])
def test_llama_cpp(tmp_path, tokenizer, ids, rope, tied):
    """From a GGUF in float32: 0.02 was asked for, 0.0001 was seen."""
    options = {"rope_parameters": ROPES[rope], "tie_word_embeddings": tied, "head_dim": 64 if tied else 32}
    merged = a_merge(tmp_path, tokenizer, **options)
    assert export(str(merged), tmp_path / "out").warnings == ()
    theirs = in_llama_cpp(tmp_path, tmp_path / "out", ids, tokenizer)
    ours = log_probabilities(load_float32(merged), ids)
    torch.testing.assert_close(theirs, ours, atol=0.001, rtol=0)


@pytest.mark.parametrize(("experts", "per_token"), [(1, 1), (2, 2), (3, 1), (5, 3), (7, 7)])
def test_llama_cpp_with_any_number_of_experts(tmp_path, tokenizer, ids, experts, per_token):
    merged = a_merge(tmp_path, tokenizer, experts, per_token=per_token)
    export(str(merged), tmp_path / "out")
    theirs = in_llama_cpp(tmp_path, tmp_path / "out", ids[:60], tokenizer)
    ours = log_probabilities(load_float32(merged), ids[:60])
    torch.testing.assert_close(theirs, ours, atol=0.001, rtol=0)


@pytest.mark.parametrize("rope", ["yarn in full", "longrope"])
def test_what_is_warned_of_is_so(tmp_path, tokenizer, ids, rope):
    options = dict(ROPES[rope])
    for key in ("short_factor", "long_factor"):
        if key in options:
            options[key] = [*options[key], 3.4, 3.6, 3.8, 4.0]
    merged = a_merge(tmp_path, tokenizer, rope_parameters=options)
    (warning,) = export(str(merged), tmp_path / "out").warnings
    assert "llama.cpp" in str(warning)
    theirs = in_llama_cpp(tmp_path, tmp_path / "out", ids[:100], tokenizer)
    assert (theirs - log_probabilities(load_float32(merged), ids[:100])).abs().max() > 1


def test_an_expert_in_llama_cpp(tmp_path, tokenizer, ids):
    merged = a_merge(tmp_path, tokenizer)
    extract(str(merged), "x2", tmp_path / "out")
    theirs = in_llama_cpp(tmp_path, tmp_path / "out", ids[:60], tokenizer)
    model = load_float32(merged)
    force_expert(model, 2)
    torch.testing.assert_close(theirs, log_probabilities(model, ids[:60]), atol=0.001, rtol=0)


def test_vllm(tmp_path, tokenizer, ids):
    merged = a_merge(tmp_path, tokenizer, rope_parameters=ROPES["llama3"])
    export(str(merged), tmp_path / "out")
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    run("vllm", "run_vllm.py", tmp_path / "out", tmp_path / "ids.json", tmp_path / "out.json", VOCABULARY)
    ours = log_probabilities(load_float32(merged), ids)
    torch.testing.assert_close(read(tmp_path / "out.json"), ours, atol=0.001, rtol=0)


@pytest.mark.parametrize("engine", ["transformers-4", "transformers-5.0"])
@torch.no_grad()
def test_other_versions_of_transformers(tmp_path, tokenizer, ids, engine):
    """The logits are the same bits; but version 4 rounds the routers' weights to bfloat16, where that is the dtype."""
    expected = {}
    for name, rope in ROPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            folder = tmp_path / f"{name} {dtype}"
            tied = name in ("linear", "yarn", "llama3")
            options = {"rope_parameters": rope, "tie_word_embeddings": tied, "head_dim": 24, "dtype": dtype}
            merged = a_merge(folder, tokenizer, **options)
            export(str(merged), folder / "model")
            torch.save(torch.tensor([ids]), folder / "ids.pt")
            expected[folder] = AutoModelForCausalLM.from_pretrained(merged, dtype="auto").eval()(torch.tensor([ids]))
    run(engine, "run_transformers.py", TEXT[:500], *expected)
    for folder, ours in expected.items():
        theirs = torch.load(folder / "out.pt")
        assert theirs["class"] == "MixtralForCausalLM"
        assert theirs["ids"] == AutoTokenizer.from_pretrained(folder / "merged")(TEXT[:500])["input_ids"]
        if engine != "transformers-4" or ours.logits.dtype == torch.float32:
            assert torch.equal(theirs["logits"], ours.logits), folder.name
        difference = (theirs["logits"].float() - ours.logits.float()).std() / ours.logits.float().std()
        assert difference < 0.03, folder.name  # 0.017 was seen
