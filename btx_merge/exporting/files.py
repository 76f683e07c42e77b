"""Everything of an exported model that is not weights, in spellings that transformers 4 and 5 both read."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from btx_merge.architectures.llama import DEFAULTS
from btx_merge.checkpoints.dtypes import TORCH_NAMES, config_dtype
from btx_merge.errors import InputError, Problem
from btx_merge.files.bounded_yaml import read_yaml
from btx_merge.files.folder import copy_file, read_text, write_json
from btx_merge.model.card import PAPER, UNTRAINED, hub_ids, project_link, take_over_terms, with_metadata
from btx_merge.model.card_update import title_of
from btx_merge.model.held_out import MODEL_INDEX
from btx_merge.model.merged import MergedModel
from btx_merge.model.records import RECIPE_FILE
from btx_merge.model.router_state import untrained_experts
from btx_merge.sources.cards import card_texts, code_in_card, front_matter, hub_link
from btx_merge.sources.locate import Located
from btx_merge.sources.tokenizer_files import check_alike, has_tokenizer, write_portable

_OWN_TAGS = ("btx", "branch-train-mix", "mixture-of-experts")
_NOT_OF_EVERY_LLAMA = ("attention_bias", "mlp_bias", "pretraining_tp")


def shared_config(model: MergedModel) -> dict[str, Any]:
    """Return what a Llama and a Mixtral both have in their config.json.

    Rotary parameters stand there as transformers 4 wrote them, `rope_theta` and `rope_scaling`, which everybody reads;
    the dtype has its old name for the same reason.
    """
    dense = model.dense_config
    out = {key: dense[key] for key in DEFAULTS if key not in _NOT_OF_EVERY_LLAMA}
    rope = dict(dense["rope_parameters"])
    out["rope_theta"] = rope.pop("rope_theta")
    out["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if rope["rope_type"] == "longrope":
        # transformers 4 takes the trained length from here, and only 5 takes the factor from where it stands
        out["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        rope["attention_factor"] = _longrope_attention(rope, dense["max_position_embeddings"])
    out["torch_dtype"] = config_dtype(model.config) or TORCH_NAMES[model.dtype]
    return out


def _longrope_attention(rope: Mapping[str, Any], length: int) -> float:
    """Compute what transformers 5 computes where it is not given (LongRoPE, arXiv 2402.13753)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    trained = rope["original_max_position_embeddings"]
    factor = length / trained if rope.get("factor") is None else rope["factor"]
    return math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0


def write_export_files(
    model: MergedModel, folder: Path, config: Mapping[str, Any], tags: list[str], card: str, keeps_figures: bool
) -> None:
    """Write all files beside the weights into `folder`; config.json last, for without it this is no model yet.

    Args:
        card: the model card's text, below the metadata.
        keeps_figures: whether it computes what the model does, so that held-out figures hold for it too.
    """
    source = model.located.folder
    if has_tokenizer(source):
        write_portable(source, folder)
    for name in ("generation_config.json", RECIPE_FILE):
        if os.path.lexists(source / name):
            copy_file(source / name, folder / name)
    metadata = _metadata(model.located, tags)
    if keeps_figures and (figures := _figures(model.located, title_of(card))):
        metadata[MODEL_INDEX] = figures
    (folder / "README.md").write_text(with_metadata(metadata, f"\n{card}"), encoding="utf-8")
    write_json(folder / "config.json", config)


def check_tokenizer(model: MergedModel, config: Mapping[str, Any]) -> list[Problem]:
    """Hold the tokenizer that will be written against the model's own; a warning where there is none.

    Raises:
        InputError: it cannot be read, or it would read a line differently; the line is shown.
    """
    source = model.located.folder
    if not has_tokenizer(source):
        return [Problem("model", str(source), "no tokenizer", "", "The result has none either: copy one there.")]
    with tempfile.TemporaryDirectory(prefix="btx-tokenizer-") as place:
        tokenizer = write_portable(source, Path(place))
        write_json(Path(place) / "config.json", config)
        check_alike(tokenizer, Path(place))
    return []


def origin(model: MergedModel, command: str) -> str:
    """Write the card's sentence about where the model comes from, with the name of a folder in place of its path."""
    located = model.located
    name = hub_link(located.repo_id, located.revision) if located.repo_id else code_in_card(located.public_name)
    recipe = f" Its recipe is `{RECIPE_FILE}`." if (located.folder / RECIPE_FILE).exists() else ""
    return (
        f"Made from {name}, Llama models merged by [Branch-Train-MiX]({PAPER}), by "
        f"`{command}` of {project_link()} {version('btx-merge')}.{recipe}"
    )


def untrained_routers(model: MergedModel) -> list[str]:
    """Return the experts whose router rows nobody has trained yet, as far as the model's recipe or card says.

    Raises:
        InputError: btx_recipe.yaml cannot be read.
    """
    folder = model.located.folder
    if (folder / RECIPE_FILE).exists():
        values = read_yaml(folder / RECIPE_FILE, "model", "what `btx merge` wrote")
        if "router_init" in values:
            return untrained_experts(values, model.config)
    return list(model.expert_names) if UNTRAINED in _card_of(model.located) else []


def _card_of(located: Located) -> str:
    """Return the model's card; nothing where there is none that can be read."""
    try:
        return read_text(located.folder / "README.md")
    except InputError:  # none, or no UTF-8
        return ""


def _figures(located: Located, title: str) -> list[Any]:
    """Return the held-out figures in the model's card, under the title of another card."""
    figures = front_matter(_card_of(located))[0].get(MODEL_INDEX)
    if not isinstance(figures, list):
        return []
    return [{**entry, "name": title} if isinstance(entry, dict) else entry for entry in figures]


def _metadata(located: Located, tags: list[str]) -> dict[str, Any]:
    """Return the metadata of the merged model's card as far as they hold for what is made of it."""
    known = card_texts(located.folder)
    given = known.get("tags", [])
    given = [given] if isinstance(given, str) else given
    out: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys([*tags, *(tag for tag in given if tag not in _OWN_TAGS)])),
    }
    if bases := hub_ids(known.get("base_model")):
        out["base_model"] = bases
        out |= {key: known[key] for key in ("base_model_relation",) if key in known}
    take_over_terms(out, located)
    return out
