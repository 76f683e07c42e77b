"""What `btx branch` trains: a copy of a seed, a dense Llama."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from torch import nn
from transformers import LlamaForCausalLM, TrainerCallback

from btx_merge.architectures.llama import HEAD, is_computed
from btx_merge.checkpoints.copying import CopyLayout, copy_layout
from btx_merge.checkpoints.layout import write_index
from btx_merge.checkpoints.stored import StoredTensor
from btx_merge.finetuning.card import branch_card, branch_section
from btx_merge.finetuning.metrics import DomainLosses
from btx_merge.finetuning.recipe import BranchRecipe
from btx_merge.lora import ATTENTION
from btx_merge.model.adapter_card import OF_A_SEED, write_adapter_card
from btx_merge.model.card_update import updated_card
from btx_merge.model.files import BRANCH
from btx_merge.model.held_out import training_results
from btx_merge.reporting import Reporter
from btx_merge.sources.digest import source_digest
from btx_merge.sources.source import Source
from btx_merge.sources.tokenizer_files import copy_files, copy_tokenizer

FEED_FORWARD = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
_SHARD_BYTES = 5_000_000_000
"""Largest weights file, as transformers cut them."""


class SeedTrainee:
    """A copy of a seed that becomes an expert."""

    verb = "branch"

    def __init__(self, recipe: BranchRecipe, source: Source):
        self.recipe = recipe
        self.source = source
        self.located = source.located
        self.teachers: Sequence[Source] = ()
        # left out is what a Llama computes: buffers, and the head of a tied one, which may be stored once more
        computed = {HEAD} if source.config["tie_word_embeddings"] else set()
        kept = [name for name in source.tensors if name not in computed and not is_computed(name)]
        self.stored: Mapping[str, StoredTensor] = {name: source.tensors[name] for name in kept}

    def digest(self) -> str:
        """Return the digest by which a merge knows this seed."""
        return source_digest(self.source)

    def read_model(self, **settings: Any) -> Any:
        """Return the model as transformers has it."""
        return LlamaForCausalLM.from_pretrained(self.located.folder, **settings)

    def is_trained(self, name: str) -> bool:
        """Return whether the recipe trains a parameter, by its name."""
        return self.recipe.train == "all" or any(f".{module}." in name for module in FEED_FORWARD)

    def lora(self, model: nn.Module) -> LoraConfig:
        """Return the adapter's config for the feed-forward blocks, or all linear layers of the blocks."""
        modules = FEED_FORWARD if self.recipe.lora_target == "ff" else [*ATTENTION, *FEED_FORWARD]
        alpha: Any = self.recipe.lora_alpha  # peft's scaling divides it, so that it need not be whole
        return LoraConfig(task_type="CAUSAL_LM", target_modules=modules, r=self.recipe.lora_r, lora_alpha=alpha)

    def meter(self, model: nn.Module, domains: Sequence[str], reporter: Reporter) -> DomainLosses:
        """Return a meter of losses."""
        return DomainLosses(domains, reporter)

    def callbacks(self) -> list[TrainerCallback]:
        """Return none: a dense model has no routers."""
        return []

    def layout(self) -> CopyLayout:
        """Return files of safetensors, whatever the seed's are."""
        return copy_layout(self.stored, _SHARD_BYTES)

    def settings(self) -> dict[str, Any]:
        """Return nothing: all of a branch's settings are those of every run."""
        return {}

    def write_files(self, folder: Path, entry: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Write the seed's config and tokenizer, a card, and the record of the run."""
        seed = self.located
        if self.recipe.train == "lora":
            write_adapter_card(folder, seed, entry, OF_A_SEED)
            card = (folder / "README.md").read_text(encoding="utf-8")
        else:
            write_index(self.layout(), folder)
            copy_files(("config.json", "generation_config.json"), seed.folder, folder)
            card = branch_card(seed, entry)
        copy_tokenizer(seed.folder, folder)
        card = updated_card(card, branch_section(seed, entry, history), "", None, training_results(entry))
        (folder / "README.md").write_text(card, encoding="utf-8")
        record = yaml.safe_dump({"seed": seed.public_reference, **entry}, sort_keys=False, allow_unicode=True)
        (folder / BRANCH).write_text(record, encoding="utf-8")
