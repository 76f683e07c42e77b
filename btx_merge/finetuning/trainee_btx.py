"""What `btx train` trains: a merged model, with its routers, and the balance of its experts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from btx_merge.checkpoints.copying import CopyLayout, same_layout
from btx_merge.checkpoints.stored import StoredTensor
from btx_merge.checkpoints.tensor_files import stored_tensors
from btx_merge.finetuning.card import training_section
from btx_merge.finetuning.metrics import LOAD_PER_LAYER, Meter
from btx_merge.finetuning.recipe import LORA_TARGETS, TrainRecipe
from btx_merge.lora import lora_config
from btx_merge.model.adapter_card import write_adapter_card
from btx_merge.model.card_update import update_card
from btx_merge.model.files import ROUTING, copy_files
from btx_merge.model.held_out import training_results
from btx_merge.model.records import append_record
from btx_merge.modeling import BTXForCausalLM
from btx_merge.reporting import Reporter
from btx_merge.sources.digest import model_digest
from btx_merge.sources.locate import Located
from btx_merge.sources.source import Source
from btx_merge.sources.tokenizer_files import copy_tokenizer
from btx_merge.training import GumbelAnnealing, RouterBiasUpdate

_OF_THE_CONFIG = ("router_grad", "router_aux_loss_coef", "router_aux_loss_scope")


def is_trained(mode: str, name: str) -> bool:
    """Return whether a parameter is trained in a mode, by its name."""
    if mode == "routers":
        return name.endswith(".mlp.gate.weight")
    return mode == "all" or ".mlp.experts." not in name


class MergedTrainee:
    """A merged model that is finetuned."""

    verb = "train"

    def __init__(self, recipe: TrainRecipe, located: Located, teachers: Sequence[Source]):
        self.recipe = recipe
        self.located = located
        self.teachers = teachers
        self.stored: Mapping[str, StoredTensor] = stored_tensors(located.folder)

    def digest(self) -> str:
        """Return a digest of all tensors."""
        return model_digest(self.stored)

    def read_model(self, **settings: Any) -> Any:
        """Return the model, with the recipe's routing in its config."""
        given = {name: getattr(self.recipe, name) for name in _OF_THE_CONFIG}
        config = {name: value for name, value in given.items() if value is not None}
        model = BTXForCausalLM.from_pretrained(self.located.folder, **settings, **config)
        self._config: Any = model.config
        return model

    def is_trained(self, name: str) -> bool:
        """Return whether the recipe trains a parameter, by its name."""
        return is_trained(self.recipe.train, name)

    def lora(self, model: nn.Module) -> LoraConfig:
        """Return the adapter's config for routers, attention or experts."""
        recipe = self.recipe
        return lora_config(LORA_TARGETS[recipe.lora_target], model, r=recipe.lora_r, lora_alpha=recipe.lora_alpha)

    def meter(self, model: nn.Module, domains: Sequence[str], reporter: Reporter) -> Meter:
        """Return a meter of losses and routing."""
        return Meter(model, domains, reporter)

    def callbacks(self) -> list[TrainerCallback]:
        """Return those that cool down the routing and balance the experts, where the model has such."""
        callbacks: list[TrainerCallback] = []
        if self._config.router_type == "sample_top_1":
            callbacks.append(GumbelAnnealing(relative=True))
        if self._config.router_selection_bias:
            callbacks.append(RouterBiasUpdate())
        return callbacks

    def layout(self) -> CopyLayout:
        """Return the model's own files."""
        return same_layout(self.located.folder)

    def settings(self) -> dict[str, Any]:
        """Return how tokens were routed and balanced, and who taught."""
        of_config = {name: getattr(self._config, name) for name in _OF_THE_CONFIG}
        return of_config if self.recipe.teacher is None else {**of_config, "teacher": self.recipe.teacher}

    def write_files(self, folder: Path, entry: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Write the model's other files, the training's part of recipe and card, and the load of every layer."""
        is_adapter = self.recipe.train == "lora"
        if is_adapter:
            write_adapter_card(folder, self.located, entry)
            copy_tokenizer(self.located.folder, folder)
        else:
            copy_files(self.located.folder, folder)
        loads = [
            json.dumps({"step": item["step"], "load": item[LOAD_PER_LAYER]})
            for item in history
            if LOAD_PER_LAYER in item
        ]
        (folder / ROUTING).write_text("".join(f"{line}\n" for line in loads), encoding="utf-8")
        append_record(folder, "training", entry)
        update_card(
            folder,
            training_section(self.verb, entry, history),
            " Trained: see [below](#training).",
            located=None if is_adapter else self.located,  # an adapter's card names its base already
            results=training_results(entry),
        )
