"""Adapters that peft merges into their base: all kinds that it knows, except plain LoRA.

The base is loaded in float32 and the result is saved so, to be rounded once when it is written. The adapter is loaded
twice, with other random numbers: the model that the first loading gives must compute what the second gives after its
merge. So whatever peft does not restore from the files, or merges otherwise than it computes, is refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx_merge.architectures.llama import HEAD
from btx_merge.checkpoints.stored import StoredTensor
from btx_merge.errors import InputError, Problem
from btx_merge.reporting import first_line, without_loading_bars
from btx_merge.sources.adapters.lora_delta import SAVE_AGAIN

if TYPE_CHECKING:
    import torch


_SAVED_EMBEDDING = re.compile(r"embed_tokens\.((token_adapter\.)?base_layer\.|modules_to_save\.)?weight$")
_SAVED_HEAD = re.compile(r"lm_head\.((token_adapter\.)?base_layer\.|modules_to_save\.)?weight$")
_YOURSELF = "Merge it into its base yourself, save the whole model, and give that folder."
BY_NOBODY = "It cannot be merged by anybody. Train a LoRA, or leave this expert out."
"""The remedy for an adapter that changes more than weights."""
_CLOSE = 1e-3
"""How far logits before and after the merge may be apart, relative to the largest. Tiny models have 1e-6; a merge that
adds something twice, or leaves it out, is wrong by the adapter's whole effect."""


def grown_rows(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], base_rows: int, tied: bool
) -> int | None:
    """Return the rows of the embedding that the adapter was trained on, where it says so; else None.

    Raises:
        InputError: the vocabulary has grown, and the adapter lacks rows that its base has not either.
    """
    for key, tensor in stored.items():
        if _SAVED_EMBEDDING.search(key) and len(tensor.shape) == 2:
            return tensor.shape[0]
    trained = _trained_tokens(config)
    embedding = next((tokens for name, tokens in trained.items() if name != "lm_head"), [])
    new = set(range(base_rows, max([*embedding, *trained.get("lm_head", [])], default=-1) + 1))
    lacking = sorted(new - set(embedding))
    if not tied and not any(_SAVED_HEAD.search(key) for key in stored):
        lacking = sorted({*lacking, *(new - set(trained.get("lm_head", [])))})
    if lacking:
        found = f"the base has {base_rows} tokens, and the rows of token {lacking[0]} are not all in the adapter"
        remedy = "Save the adapter again with save_embedding_layers=True."
        raise InputError([Problem("", "adapter_config.json", found, "rows of every added token", remedy)])
    return base_rows + len(new) if new else None


def _trained_tokens(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the tokens of trainable_token_indices by module."""
    tokens = config.get("trainable_token_indices") or {}
    if config.get("peft_type") == "TRAINABLE_TOKENS":
        tokens = config.get("token_indices") or {}
    if isinstance(tokens, list):
        tokens = {"embed_tokens": tokens}
    lists = tokens.values() if isinstance(tokens, dict) else [None]
    if not all(isinstance(items, list) and all(type(token) is int for token in items) for items in lists):
        found = "trainable_token_indices cannot be understood"
        raise InputError([Problem("", "adapter_config.json", found, "lists of token ids", SAVE_AGAIN)])
    return {name.rpartition(".")[2]: items for name, items in tokens.items()}


def merge_through_peft(
    name: str, base: Path, adapter: Path, config: Mapping[str, Any], out: Path, rows: int | None
) -> list[Problem]:
    """Merge the adapter into its base, save config and tensors under `out`, and return peft's warnings.

    Needs memory for the whole base in float32. The base is loaded without its own code.

    Args:
        rows: of the embedding, where the adapter has grown the vocabulary.

    Raises:
        InputError: peft cannot load it, it is of a kind that cannot be merged into weights, or its files do not hold
            all that it was trained with.
    """
    _refuse_unmergeable(config)
    try:
        with without_loading_bars(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _merge_and_prove(base, adapter, _trained_tokens(config), out, rows)
    except InputError:
        raise
    except Exception as error:  # of any kind: peft has dozens of adapter types
        reason = f"{type(error).__name__}: {first_line(error)}"
        found = f"peft cannot merge an adapter of type {config['peft_type']} here ({reason})"
        remedy = "If peft's merge_and_unload can, save the whole model and give that; else leave this expert out."
        raise InputError([Problem(name, "adapter_config.json", found, "", remedy)]) from error
    return _as_problems(name, caught)


def _as_problems(name: str, caught: list[warnings.WarningMessage]) -> list[Problem]:
    """Return each of peft's warnings once; not what libraries say to programmers."""
    texts = [
        " ".join(str(warning.message).split())
        for warning in caught
        if not issubclass(warning.category, (DeprecationWarning, FutureWarning)) or "/peft/" in warning.filename
    ]
    return [Problem(name, "adapter_config.json", f"peft warns: {text}") for text in dict.fromkeys(texts)]


def _refuse_unmergeable(config: Mapping[str, Any]) -> None:
    from peft import __version__
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    kind = config.get("peft_type")
    tuners = {getattr(key, "value", key): tuner for key, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    found = expected = remedy = ""
    if not isinstance(kind, str) or kind not in tuners:
        found = f"peft_type is {kind!r}, which the installed peft {__version__} does not know"
        expected, remedy = "a type of adapter that it knows", "If it is of a newer peft: pip install -U peft."
    elif not hasattr(tuners[kind], "merge_and_unload"):
        found = f"an adapter of type {kind}, which changes what goes through the model and not its weights"
        remedy = BY_NOBODY
    if found:
        raise InputError([Problem("", "adapter_config.json", found, expected, remedy)])


def _merge_and_prove(base: Path, adapter: Path, tokens: Mapping[str, list[int]], out: Path, rows: int | None) -> None:
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        before = _logits(_load(base, adapter, rows, random_seed=1)[0], tokens)
        model, tied = _load(base, adapter, rows, random_seed=2)
        _unshare(model)
        model = model.merge_and_unload(safe_merge=True)
        if tied and torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        else:
            tied = False
        after = _logits(model, tokens)
    apart, largest = float((before - after).abs().max()), float(before.abs().max())
    if not apart <= _CLOSE * largest:
        found = f"merged by peft it computes something else than the adapter does: logits differ by {apart:.2g}"
        expected = f"less than {_CLOSE * largest:.2g}, a thousandth of the largest"
        remedy = "The adapter's files may lack a part of what it was trained with. " + _YOURSELF
        raise InputError([Problem("", "adapter_config.json", found, expected, remedy)])
    model.config.tie_word_embeddings = tied
    model.config.save_pretrained(out)
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items() if not (tied and key == HEAD)}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def _load(base: Path, adapter: Path, rows: int | None, random_seed: int) -> tuple[Any, bool]:
    """Load the base with the adapter on it, and say whether the base ties its head to its embedding."""
    import torch
    from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    torch.manual_seed(random_seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    model.config.use_cache = False
    if rows is not None and rows != model.config.vocab_size:
        model.resize_token_embeddings(rows, mean_resizing=False)  # the adapter has all that are new
    tied = bool(model.config.tie_word_embeddings)
    config = PeftConfig.from_pretrained(str(adapter))
    config.inference_mode = True
    adapted = get_peft_model(model, config)
    weights = load_peft_weights(str(adapter), device="cpu")
    loaded: Any = set_peft_model_state_dict(adapted, weights)
    _refuse_lost_tensors(adapted, weights, loaded.unexpected_keys)
    return adapted.eval(), tied


def _refuse_lost_tensors(adapted: Any, weights: Mapping[str, torch.Tensor], unexpected: list[str]) -> None:
    """Hold the file against what peft would save of this adapter."""
    from peft import get_peft_model_state_dict

    missing = sorted(set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - set(weights))
    # After a resize peft saves a trained embedding under three names, of which it needs one.
    strange = sorted(key for key in unexpected if not re.search(r"\.(modules_to_save|original_module)\.", key))
    # And trained rows of an embedding that is tied, once more as the head's.
    strange = [key for key in strange if not _is_embeddings(key, weights)]
    problems = []
    for kind, keys in (("lacks", missing), ("holds", strange)):
        if keys:
            found = f"{kind} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
            problems.append(Problem("", "adapter weights", found, "the tensors of adapter_config.json", SAVE_AGAIN))
    if problems:
        raise InputError(problems)


def _is_embeddings(key: str, weights: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a head's tensor is the embedding's, under another name."""
    other = weights.get(key.replace("lm_head.token_adapter.", "model.embed_tokens.token_adapter."))
    return "lm_head.token_adapter." in key and other is not None and bool(weights[key].equal(other))


def _unshare(model: Any) -> None:
    """Give every module a parameter of its own, so that what is merged into one does not change another."""
    import torch

    seen: set[int] = set()
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) in seen:
                module._parameters[key] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
            seen.add(id(parameter))


def _logits(model: Any, tokens: Mapping[str, list[int]]) -> torch.Tensor:
    """Return what the model says to some tokens from all over its vocabulary, and to those that were trained."""
    import torch

    rows = model.config.vocab_size
    ids = [*range(0, rows, max(1, rows // 24)), *(token for items in tokens.values() for token in items[:24])]
    logits: torch.Tensor = model(input_ids=torch.tensor([ids[: model.config.max_position_embeddings]])).logits
    return logits
