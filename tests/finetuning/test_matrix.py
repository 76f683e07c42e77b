"""Every way to train, on a tied and an untied model, up to the written result; several ranks beside one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from btx_merge import MergeRecipe, merge
from btx_merge.finetuning.recipe import TRAIN_MODES
from tests.finetuning.test_ranks import on_one_rank, run, torchrun
from tests.finetuning.test_run import changed, recipe
from tests.support.common import (
    assert_complete,
    grow,
    load_float32,
    logits_of,
    problems_of,
    raw_bytes,
    save_seed,
    tensors_of,
)

SHARDS = {"fsdp_size": 2}
SPREAD = {"fsdp_size": 2, "ep_size": 2}
Alone = Callable[[str, str], tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two experts each, so that two ranks can have one of them."""
    root = tmp_path_factory.mktemp("models")
    for name in ("tied", "untied"):
        seed = save_seed(root / f"{name}-seed", tie_word_embeddings=name == "tied")
        expert = grow(seed, root / f"{name}-expert")
        merge(MergeRecipe(str(seed), {"code": str(expert)}), root / name)
    return {name: root / name for name in ("tied", "untied")}


@pytest.fixture(scope="module")
def alone(models: dict[str, Path], texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """What one process makes of a model in a mode, made once."""
    done: dict[tuple[str, str], tuple[dict[str, Any], Path]] = {}

    def look_up(model: str, mode: str) -> tuple[dict[str, Any], Path]:
        if (model, mode) not in done:
            out = tmp_path_factory.mktemp(f"{model}-{mode}") / "out"
            done[model, mode] = on_one_rank(models[model], texts, out, train=mode)
        return done[model, mode]

    return look_up


@torch.no_grad()
def assert_usable(base: Path, out: Path, mode: str) -> None:
    """The result loads in plain transformers or peft, is whole, and answers otherwise than before."""
    before = logits_of(load_float32(base))
    if mode == "lora":
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
        assert (logits_of(model) - before).abs().max() > 1e-3
        return
    assert_complete(out)
    assert (logits_of(load_float32(out)) - before).abs().max() > 1e-3
    assert ("lm_head.weight" in tensors_of(out)) == (base.name == "untied")
    names = set(tensors_of(base))
    frozen = {
        "routers": {name for name in names if not name.endswith("mlp.gate.weight")},
        "shared": {name for name in names if ".experts." in name},
        "all": set(),
    }[mode]
    assert changed(base, out) == names - frozen


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("mode", TRAIN_MODES)
def test_one_process(models, alone, model, mode):
    assert_usable(models[model], alone(model, mode)[1], mode)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("mode", TRAIN_MODES)
@pytest.mark.parametrize("sizes", [{}, SHARDS, SPREAD], ids=["copies", "shards", "experts spread"])
def test_two_ranks(models, alone, texts, tmp_path, model, mode, sizes):
    """As one process with the same batch: losses to four digits, weights of about 1e-2 within 1e-3."""
    if mode == "lora" and sizes:
        (line,) = problems_of(recipe, models[model], texts, train=mode, **sizes)
        assert "lora on sharded parameters" in line
        return
    flags = [f"--{name.replace('_', '-')}={size}" for name, size in sizes.items()]
    flags += ["--train", mode, "-o", str(tmp_path / "out"), "--per-device-train-batch-size=2"]
    ours = run(torchrun(), models[model], texts, *flags)
    expected, folder = alone(model, mode)
    assert ours["world_size"] == 2
    assert ours["lines"] == expected["lines"]
    assert_usable(models[model], tmp_path / "out", mode)
    theirs, before = tensors_of(folder), tensors_of(models[model])
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert (tensor - theirs[name]).abs().max() <= 1e-3, name
        if name in before and raw_bytes(theirs[name]) == raw_bytes(before[name]):
            assert raw_bytes(tensor) == raw_bytes(before[name]), name
