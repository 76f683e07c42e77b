"""Exported models in the programs that they are for, each in an environment of its own (`make slow` builds them).

Log-probabilities of every next token over a text, or logits, against those of the BTX model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from btx_merge import MergeRecipe, export, extract, merge
from tests.exporting.test_run import ROPES
from tests.sources.test_tokenizer_files import LINES, trained
from tests.support.common import force_expert, grow, load_float32, raw_bytes, save_seed, tensors_of

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1]
TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
VOCABULARY, TOKENS = 512, 200
SHAPE = {
    **{"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3},
    **{"max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.12},
}


def run(engine: str, script: str, *arguments: object) -> None:
    """Runs a script of tests/engines in an engine's environment. One that is not there is no reason to skip."""
    python = TESTS.parent / ".engines" / engine / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{engine} is not there. `make .engines/{engine}/installed` builds it, `make slow` all of them.")
    command = [str(python), str(TESTS / "engines" / script), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TESTS / "engines" / "hidden")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
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


def warnings_of(report) -> list[str]:
    """Return an export's warnings, but for the one that every one of `a_merge` has."""
    untrained, *others = map(str, report.warnings)
    assert "have not been trained yet" in untrained
    return others


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
    assert not warnings_of(export(str(merged), tmp_path / "out"))
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
    (warning,) = warnings_of(export(str(merged), tmp_path / "out"))
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
    run(engine, "run_transformers.py", json.dumps([TEXT[:500]]), *expected)
    for folder, ours in expected.items():
        theirs = torch.load(folder / "out.pt")
        assert theirs["class"] == "MixtralForCausalLM"
        assert theirs["ids"] == [AutoTokenizer.from_pretrained(folder / "merged")(TEXT[:500])["input_ids"]]
        if engine != "transformers-4" or ours.logits.dtype == torch.float32:
            assert torch.equal(theirs["logits"], ours.logits), folder.name
        difference = (theirs["logits"].float() - ours.logits.float()).std() / ours.logits.float().std()
        assert difference < 0.03, folder.name  # 0.017 was seen


def llama_tokenizer(folder: Path, form: str, raw: PreTrainedTokenizerFast) -> int:
    """Gives a model a tokenizer in one of the forms that Llama's have. Returns how many tokens it has.

    Args:
        raw: of the form `prepend`.
    """
    if form == "prepend":
        raw.save_pretrained(folder)
        return len(raw)
    values = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if form == "tokenizer.model":
        content = trained(TEXT.splitlines()[:500], VOCABULARY - 50)
        (folder / "tokenizer.model").write_bytes(content)
        values |= {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(values))
        return int(sentencepiece.SentencePieceProcessor(model_proto=content).get_piece_size())
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(values.values()), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT.splitlines(), trainer)
    if form == "byte-level":
        PreTrainedTokenizerFast(tokenizer_object=made, **values).save_pretrained(folder)
    else:
        made.model.save(str(folder))
        values["tokenizer_class"] = "GPT2Tokenizer"
        (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return made.get_vocab_size()


@pytest.mark.parametrize("form", ["byte-level", "prepend", "tokenizer.model", "vocab.json and merges.txt"])
@torch.no_grad()
def test_transformers_4_reads_every_form_of_tokenizer(tmp_path, tokenizer, form):
    """The export and an extracted expert: lines have the ids that they have in the seed, the logits within 1e-5."""
    seed = save_seed(tmp_path / "seed", tokenizer=False, **SHAPE)
    assert llama_tokenizer(seed, form, tokenizer) <= VOCABULARY
    expert = grow(seed, tmp_path / "e", random_seed=1, noise=0.5)
    for file in {*seed.glob("*token*"), *seed.glob("vocab.json"), *seed.glob("merges.txt")}:
        shutil.copyfile(file, expert / file.name)
    merge(MergeRecipe(str(seed), {"e": str(expert)}, router_std=0.5), tmp_path / "merged")
    lines = [*LINES, "<s>def f(x):\n    return x ** 2  # code", TEXT[:500]]
    ids = [AutoTokenizer.from_pretrained(seed)(line)["input_ids"] for line in lines]
    expected = {}
    for name in ("mixtral", "dense"):
        folder = tmp_path / name
        if name == "mixtral":
            export(str(tmp_path / "merged"), folder / "model")
        else:
            extract(str(tmp_path / "merged"), "e", folder / "model")
        torch.save(torch.tensor([ids[-1]]), folder / "ids.pt")
        expected[folder] = load_float32(folder / "model")(torch.tensor([ids[-1]])).logits
    run("transformers-4", "run_transformers.py", json.dumps(lines), *expected)
    for folder, logits in expected.items():
        theirs = torch.load(folder / "out.pt")
        assert theirs["ids"] == ids, folder.name
        torch.testing.assert_close(theirs["logits"], logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_to_gguf_by_the_real_converter(tmp_path, tokenizer, dtype, monkeypatch):
    """The matrices in the file are the model's bits; what llama.cpp computes of it, the tests above show."""
    merged = a_merge(tmp_path, tokenizer, dtype=dtype)
    monkeypatch.setenv("PATH", str(TESTS.parent / ".engines" / "llama-cpp" / "bin"), prepend=os.pathsep)
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    report = export(str(merged), tmp_path / "model.gguf", format="gguf")
    assert report.nbytes == (tmp_path / "model.gguf").stat().st_size
    (tmp_path / "read.py").write_text(
        "import gguf, sys\n"
        "one = next(t for t in gguf.GGUFReader(sys.argv[1]).tensors if t.name == 'blk.1.ffn_down_exps.weight')\n"
        "one.data.tofile(sys.argv[2])\n"
    )
    run("llama-cpp", str(tmp_path / "read.py"), tmp_path / "model.gguf", tmp_path / "raw")
    stored = tensors_of(merged)["model.layers.1.mlp.experts.down_proj"]
    assert (tmp_path / "raw").read_bytes() == raw_bytes(stored)
