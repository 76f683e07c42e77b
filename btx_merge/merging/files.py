"""All files of the result that are not weights: config, model code, tokenizer, generation config, recipe, index."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from btx_merge.architectures.llama import DEFAULTS
from btx_merge.checkpoints.dtypes import TORCH_NAMES
from btx_merge.checkpoints.layout import write_index
from btx_merge.files.bounded_json import parse_json
from btx_merge.files.folder import read_json, write_json
from btx_merge.merging.card import model_card
from btx_merge.merging.plan import Plan
from btx_merge.merging.recipe import DIFFERENCE_METHODS
from btx_merge.model.files import copy_model_code
from btx_merge.model.held_out import Fitted
from btx_merge.model.records import RECIPE_FILE
from btx_merge.sources.digest import source_digest
from btx_merge.sources.source import Source
from btx_merge.sources.tokenizer_files import (
    PRIVATE_KEYS,
    SPEECH_FILES,
    VOCABULARY_FILES,
    copy_files,
    copy_templates,
    has_speech,
)
from btx_merge.sources.vocabulary import tokenizer_json
from btx_merge.texts.references import public_reference

_AUTO_MAP = {
    "AutoConfig": "configuration_btx.BTXConfig",
    "AutoModel": "modeling_btx.BTXModel",
    "AutoModelForCausalLM": "modeling_btx.BTXForCausalLM",
    "AutoModelForSequenceClassification": "modeling_btx.BTXForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_btx.BTXForTokenClassification",
}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_eos_token_id")


def write_files(plan: Plan, folder: Path, fitted: Fitted = Fitted()) -> None:
    """Write all files beside the weights into `folder`; config.json last, for without it this is no model yet.

    Args:
        fitted: how what was fitted came out.
    """
    chat = next(source for source in plan.sources if source.name == plan.recipe.tokenizer_source)
    write_index(plan, folder)
    folders = (chat.located.folder, *([chat.base.folder] if chat.base else []))
    generation = next(filter(None, (_read_json(path / "generation_config.json") for path in folders)), None)
    if generation:
        generation.pop("_from_model_config", None)
        write_json(folder / "generation_config.json", _with_union_ids(plan, chat, generation))
    _write_tokenizer(plan, chat, folder)
    copy_model_code(folder)
    recipe = yaml.safe_dump(resolved_recipe(plan), sort_keys=False, allow_unicode=True)
    (folder / RECIPE_FILE).write_text(recipe, encoding="utf-8")
    (folder / "README.md").write_text(model_card(plan, fitted), encoding="utf-8")
    write_json(folder / "config.json", output_config(plan, chat))


def output_config(plan: Plan, chat: Source) -> dict[str, Any]:
    """Return the config.json of the result: the seed's architecture, BTX's fields, the code that loads it.

    Only keys that a Llama config has are taken over: no private path and no code reference of the seed's.
    """
    seed = plan.seed.config
    config: dict[str, Any] = {
        "architectures": ["BTXForCausalLM"],
        "auto_map": _AUTO_MAP,
        "model_type": "btx",
        **{key: seed[key] for key in (*DEFAULTS, "rope_parameters")},
        **{key: chat.config[key] for key in _TOKEN_IDS if key in DEFAULTS},
        "dtype": TORCH_NAMES[plan.dtype],
        "vocab_size": plan.vocabulary.size,
        "tie_word_embeddings": plan.tied,
        "intermediate_size": plan.expert_width,
        "num_local_experts": plan.num_experts,
        "num_experts_per_tok": plan.recipe.num_experts_per_tok,
        "router_type": plan.recipe.router_type,
        "router_pre_softmax": plan.recipe.router_pre_softmax,
        "num_chunks": plan.recipe.num_chunks if plan.recipe.expert_mode == "split" else 1,
        "router_aux_loss_coef": plan.recipe.router_aux_loss_coef,
        "output_router_logits": False,
        "expert_names": plan.expert_names,
    }
    return _with_union_ids(plan, chat, config)


def resolved_recipe(plan: Plan) -> dict[str, Any]:
    """Return the recipe with everything that was left open filled in, and what it was carried out with.

    It can be given to `btx merge --recipe`. A folder stands there by its name alone, without its path.
    """
    values = plan.recipe.to_dict()
    values["seed"] = plan.seed.located.public_reference
    for source in plan.sources[1:]:
        values["experts"][source.name]["model"] = source.located.public_reference
        if values["experts"][source.name]["base"] is not None and source.base:
            values["experts"][source.name]["base"] = source.base.public_name
    for text in values["domain_text"].values():
        text["text"] = [public_reference(reference) for reference in text["text"]]
    values["dtype"] = TORCH_NAMES[plan.dtype]
    if values["router_std"] is None:
        values["router_std"] = plan.seed.config["initializer_range"]
    needs_peft, is_fitted = plan.recipe.combine in DIFFERENCE_METHODS, plan.recipe.is_fitted
    packages = {"torch": needs_peft or is_fitted, "peft": needs_peft, "transformers": is_fitted}
    tools = ("btx-merge", "numpy", *(name for name, is_used in packages.items() if is_used))
    values["resolved"] = {
        "sources": {source.name: source_digest(source) for source in plan.sources},
        "expert_names": plan.expert_names,
        "tools": {"python": platform.python_version(), **{tool: version(tool) for tool in tools}},
    }
    return values


def _write_tokenizer(plan: Plan, chat: Source, folder: Path) -> None:
    """Write the seed's tokenizer with the union's tokens; template and special tokens are the named source's."""
    # A seed without one has the tokenizer on which all others agree (`vocabulary`).
    origin = next((source.tokenizer_folder for source in plan.sources if source.tokenizer_folder), None)
    if origin is None:
        return
    copy_files(VOCABULARY_FILES, origin, folder)
    speech = next((path for path in chat.folders if has_speech(path)), chat.tokenizer_folder or origin)
    copy_files(SPEECH_FILES, speech, folder)
    copy_templates(speech, folder)
    config = _read_json(folder / "tokenizer_config.json")
    for key in PRIVATE_KEYS:
        config.pop(key, None)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        (folder / "tokenizer.json").write_bytes(tokenizer_json(origin))
        for name in ("vocab.json", "merges.txt", "added_tokens.json"):  # all that they say stands there now
            (folder / name).unlink(missing_ok=True)
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.setdefault("tokenizer_class", _default_class(folder))
    if plan.vocabulary.new_tokens:
        add_tokens(folder, parse_json(tokenizer_json(origin)), plan.vocabulary.new_tokens)
    added = _read_json(folder / "tokenizer.json").get("added_tokens")
    if "added_tokens_decoder" in config and added:  # as older versions saved it, perhaps by another source's ids
        config["added_tokens_decoder"] = {str(entry["id"]): _decoder_entry(entry) for entry in added}
    write_json(folder / "tokenizer_config.json", config)


def _decoder_entry(added: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of tokenizer.json's `added_tokens` as tokenizer_config.json repeats it, without the id."""
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {key: added[key] for key in keys if key in added}


def _default_class(folder: Path) -> str:
    """Return the class that transformers takes for a Llama whose tokenizer names none."""
    model = _read_json(folder / "tokenizer.json").get("model", {"byte_fallback": True})  # sentencepiece's
    return "LlamaTokenizer" if model.get("byte_fallback") else "PreTrainedTokenizerFast"


def add_tokens(folder: Path, data: dict[str, Any], new_tokens: Sequence[Mapping[str, Any]]) -> None:
    """Write tokenizer.json, of which `data` is the content, with more tokens."""
    data["added_tokens"] = [*(data.get("added_tokens") or []), *new_tokens]
    write_json(folder / "tokenizer.json", data)
    for name in ("tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt"):  # they lack the new tokens
        (folder / name).unlink(missing_ok=True)


def _with_union_ids(plan: Plan, chat: Source, values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate token ids of a source's config to ids of the result: the same token, by its string."""
    out = dict(values)
    if chat is plan.seed or plan.vocabulary.ids is None:
        return out
    moved = {}  # a row of the source to the row of the result
    for segment in plan.vocabulary.segments[chat.name]:
        for offset in range(segment.count):
            moved[segment.row + offset] = segment.out + offset
    for key in _TOKEN_IDS:
        if isinstance(out.get(key), int):
            out[key] = moved.get(out[key], out[key])
        elif isinstance(out.get(key), list):
            out[key] = [moved.get(token, token) for token in out[key]]
    return out


def _read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is no such file."""
    return read_json(file) if os.path.lexists(file) else {}
