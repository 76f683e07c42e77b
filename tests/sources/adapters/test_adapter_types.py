"""Every type of adapter that the installed peft has: merged as peft computes it unmerged, or refused by its name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import LlamaForCausalLM

from btx_merge import InputError, MergeRecipe, merge
from tests.support.common import load_float32, logits_of, move_trainable, save_seed

# What peft and transformers say to who trains is not about us.
pytestmark = [pytest.mark.filterwarnings("ignore:::peft"), pytest.mark.filterwarnings("ignore:::transformers")]

LINEAR: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}
VIRTUAL: dict[str, Any] = {"num_virtual_tokens": 3}

MERGED: dict[str, dict[str, Any]] = {
    "ADALORA": {**LINEAR, "total_step": 10},
    "ADAMSS": {**LINEAR, "r": 16, "num_subspaces": 4},
    "BEFT": {"target_modules": ["q_proj"]},
    "BOFT": LINEAR,
    "C3A": {**LINEAR, "block_size": 32},
    "DEFT": LINEAR,
    "DELORA": LINEAR,
    "FOURIERFT": {**LINEAR, "n_frequency": 20, "scaling": 5.0},
    "FROD": LINEAR,
    "GLORA": LINEAR,
    "GRALORA": LINEAR,
    "HIRA": LINEAR,
    "HRA": LINEAR,
    "IA3": {**LINEAR, "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": LINEAR,
    "LOKR": LINEAR,
    "LORA": LINEAR,
    "MISS": LINEAR,
    "OFT": LINEAR,
    "OSF": LINEAR,
    "PEANUT": LINEAR,
    "PSOFT": LINEAR,
    "PVERA": LINEAR,
    "RANDLORA": {**LINEAR, "r": 4, "randlora_alpha": 8},
    "ROAD": LINEAR,
    "SHIRA": LINEAR,
    "SUPERTUNING": LINEAR,
    "TINYLORA": LINEAR,
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [5, 37]},
    "UNILORA": LINEAR,
    "VBLORA": {**LINEAR, "vector_length": 16, "num_vectors": 8},
    "VERA": LINEAR,
    "WAVEFT": {**LINEAR, "n_frequency": 20, "scaling": 1.0},
}
"""Types that change weights, with options that fit a tiny model."""
REFUSED: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "CARTRIDGE": VIRTUAL,
    "CPT": {},
    "LILY": LINEAR,
    "MULTITASK_PROMPT_TUNING": {**VIRTUAL, "num_tasks": 1},
    "POLY": LINEAR,
    "PREFIX_TUNING": VIRTUAL,
    "PROMPT_TUNING": VIRTUAL,
    "P_TUNING": VIRTUAL,
    "SHADOW": LINEAR,
    "XLORA": {"hidden_size": 64},
}
"""Types that add to what goes through the model, that depend on the input, or that peft does not merge."""
QUICK = ["BEFT", "FOURIERFT", "IA3", "LN_TUNING", "LOHA", "LORA", "OFT", "SHIRA", "TRAINABLE_TOKENS", "VERA"]
QUICK += ["LILY", "POLY", "PROMPT_TUNING"]
"""One of each family, on a tied base; the others and the untied base are slow."""

TYPES = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
WALK = [
    pytest.param(kind, tied, id=f"{kind}-{'tied' if tied else 'untied'}", marks=[] if quick else [pytest.mark.slow])
    for kind in TYPES
    for tied in (True, False)
    for quick in [tied and kind in QUICK]
]


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    root = tmp_path_factory.mktemp("bases")

    @functools.cache
    def make(tied: bool) -> Path:
        return save_seed(root / ("tied" if tied else "untied"), tie_word_embeddings=tied, attention_bias=True)

    return make


def adapted(base: Path, folder: Path, config: Any) -> Any:
    """Save an adapter all of whose trainable numbers are random, and return the model with it."""
    model = LlamaForCausalLM.from_pretrained(base)
    model.config.use_cache = False  # X-LoRA refuses it
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    move_trainable(model)
    model.eval().save_pretrained(folder)
    return model


def alone(base: Path, adapter: Path) -> MergeRecipe:
    return MergeRecipe(str(base), {"expert": str(adapter)}, seed_expert=False, num_experts_per_tok=1)


def assert_merged_as_unmerged(base: Path, adapter: Path, model: Any, out: Path) -> None:
    merge(alone(base, adapter), out)
    found, wanted, untouched = logits_of(load_float32(out)), logits_of(model), logits_of(load_float32(base))
    largest = float(wanted.abs().max())
    assert float((untouched - wanted).abs().max()) > 1e-4 * largest  # so that an adapter that is nothing would be seen
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * largest)


def test_the_walk_knows_every_type() -> None:
    known = {*MERGED, *REFUSED}
    assert set(TYPES) <= known, "a type that peft has gained: put it into the table that fits"
    assert set(QUICK) <= known


@pytest.mark.parametrize(("kind", "tied"), WALK)
def test_every_type_is_merged_exactly_or_refused(
    kind: str, tied: bool, base_of: Callable[[bool], Path], tmp_path: Path
) -> None:
    options = {**MERGED, **REFUSED}[kind]
    base = base_of(tied)
    if kind == "XLORA":  # a mixture of adapters, which lie elsewhere
        adapted(base, tmp_path / "one", LoraConfig(task_type="CAUSAL_LM", **LINEAR))
        options = {**options, "adapters": {"one": str(tmp_path / "one")}}
    make = {key.value: config for key, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}[kind]
    model = adapted(base, tmp_path / "adapter", make(task_type="CAUSAL_LM", **options))
    if kind in MERGED:
        assert_merged_as_unmerged(base, tmp_path / "adapter", model, tmp_path / "out")
        return
    with pytest.raises(InputError, match=f"an adapter of type {kind}"):
        merge(alone(base, tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
