"""Which weights of a source are the seed's own bytes: every byte counts, and no file is read more than once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from btx_merge import MergeRecipe, check
from btx_merge.checkpoints.stored import StoredTensor
from btx_merge.cli.app import app
from tests.support.common import move_trainable, save_seed, tensors_of, tiny_tokenizer

SHARED = {"norms", "attention", "embeddings", "head"}
ALL = {*SHARED, "feed-forward"}


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seed(tmp_path_factory.mktemp("unchanged") / "seed", vocab_size=3000)


def changed_at(seed: Path, folder: Path, name: str, row: int) -> Path:
    """Copy the seed with another last bit in one number."""
    model = LlamaForCausalLM.from_pretrained(seed)
    model.save_pretrained(folder)
    tensors = tensors_of(folder)
    bits = tensors[name].view(torch.int32)
    bits.view(bits.shape[0], -1)[row, 0] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    return folder


def unchanged(seed: Path, **experts: Path) -> dict[str, set[str]]:
    checked = check(MergeRecipe(str(seed), {name: str(folder) for name, folder in experts.items()}))
    return {name: set(groups) for name, groups in (checked.unchanged or {}).items()}


@pytest.mark.parametrize(
    ("name", "row", "group"),
    [
        (
            "model.embed_tokens.weight",
            700,
            "embeddings",
        ),  # of no sampled row
        ("lm_head.weight", 2999, "head"),
        ("model.layers.1.self_attn.k_proj.weight", 20, "attention"),
        ("model.layers.0.mlp.down_proj.weight", 40, "feed-forward"),
        ("model.norm.weight", 63, "norms"),
    ],
)
def test_one_bit_is_enough(seed: Path, tmp_path: Path, name: str, row: int, group: str) -> None:
    code = changed_at(seed, tmp_path / "code", name, row)
    assert unchanged(seed, code=code) == {"code": ALL - {group}}


def test_what_the_command_says(seed: Path, tmp_path: Path) -> None:
    ours = changed_at(seed, tmp_path / "code", "model.layers.0.mlp.up_proj.weight", 50)
    theirs = changed_at(seed, tmp_path / "math", "model.norm.weight", 5)
    lossless = "shared weights      mean; every source has the seed's, averaging loses nothing"
    for experts, is_lossless in (({"code": ours}, True), ({"code": ours, "math": theirs}, False)):
        given = [f"--expert={name}={folder}" for name, folder in experts.items()]
        done = CliRunner().invoke(app, ["check", f"--seed={seed}", *given], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        assert (lossless in done.stdout) == is_lossless
        (row,) = [line.split() for line in done.stdout.splitlines() if line.split()[:2] == ["code", "code"]]
        assert sorted(row[3:]) == ["0.000", "=", "=", "=", "="]
        report = json.loads(CliRunner().invoke(app, ["check", f"--seed={seed}", *given, "--json"]).stdout)
        assert report["lossless"] == is_lossless
        assert set(report["unchanged"]["code"]) == SHARED


def test_an_adapter_has_what_it_does_not_adapt(seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is in the seed's own file, and nothing is read to know it but what is sampled."""
    config = LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(seed), config)
    move_trainable(adapted)
    adapted.save_pretrained(tmp_path / "code")
    plain, largest = StoredTensor.read_rows, []

    def counted(self: StoredTensor, start: int, stop: int) -> Any:
        largest.append((stop - start) * self.row_bytes)
        return plain(self, start, stop)

    monkeypatch.setattr(StoredTensor, "read_rows", counted)
    assert unchanged(seed, code=tmp_path / "code") == {"code": SHARED}
    assert max(largest) <= 4 * 1024


def test_each_file_is_read_once_at_most(seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the sample, for two sources that are compared to their end."""
    experts = {name: changed_at(seed, tmp_path / name, "model.norm.weight", 5) for name in ("code", "math")}
    plain, read = StoredTensor.read_rows, Counter[Path]()

    def counted(self: StoredTensor, start: int, stop: int) -> Any:
        if stop - start > 16:  # of matrices, a sampled place has fewer rows
            read[self.file] += (stop - start) * self.row_bytes
        return plain(self, start, stop)

    monkeypatch.setattr(StoredTensor, "read_rows", counted)
    unchanged(seed, **experts)
    sizes = {file: file.stat().st_size for file in read}
    assert len(sizes) == 3
    assert all(0.9 * sizes[file] < nbytes < 1.1 * sizes[file] for file, nbytes in read.items())
