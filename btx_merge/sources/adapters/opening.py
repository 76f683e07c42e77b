"""A PEFT adapter as a source: its config is read, checked against its base and its files, and laid over the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from btx_merge.architectures.llama import EMBEDDING, HEAD
from btx_merge.checkpoints.stored import StoredTensor, same_bytes
from btx_merge.checkpoints.tensor_files import read_tensor_file
from btx_merge.errors import InputError, Problem
from btx_merge.files.folder import read_json
from btx_merge.sources.adapters.base import adapter_base
from btx_merge.sources.adapters.lora_delta import SAVE_AGAIN, LoraDelta, is_plain_lora, same_delta, split_adapter
from btx_merge.sources.adapters.targets import Matches, modules_of, saved_whole, targeted
from btx_merge.sources.adapters.through_peft import BY_NOBODY, grown_rows, merge_through_peft
from btx_merge.sources.locate import Located
from btx_merge.sources.source import ExpertSpec, Source, open_checkpoint

_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_WHOLE_MODELS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_IS_IT_ITS_BASE = "Was it trained on this model? --base NAME=MODEL (`base:` in the recipe) names another."
_AS_LORA = "Save it as a plain LoRA: peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)."
_MANY = 4
"""Tensors of one kind that are named one by one, as `errors.capped` does; more become one line."""


@dataclass(frozen=True)
class _PlainLora:
    """A plain LoRA as it was read, before it is known whether it fits its base."""

    name: str
    """The source's name."""
    file: Path
    """The file of its tensors."""
    base: Source
    """What it was trained on."""
    deltas: Mapping[str, LoraDelta]
    """By the weight that each changes."""
    replaced: Mapping[str, StoredTensor]
    """Tensors that take the place of the base's, by their names there."""
    targets: set[str]
    """Modules that have factors, by its config."""
    whole: set[str]
    """Tensors that are saved whole, by its config."""

    def problem(self, found: str, expected: str, remedy: str) -> Problem:
        """Return what is wrong with the file."""
        return Problem(self.name, self.file.name, found, expected, remedy)


def open_adapter(
    name: str, spec: ExpertSpec, located: Located, seed: Source | None, scratch: Callable[[], Path]
) -> Source:
    """Open an adapter over its base. A plain LoRA is read when its rows are; others are merged by peft here.

    Raises:
        InputError: its config or files are damaged or incomplete, it does not fit its base, or it cannot be merged.
    """
    config = read_json(located.folder / _CONFIG)
    file = _weights(name, located.folder)
    _refuse_unmergeable(name, config)
    base, warnings = adapter_base(name, config, spec.base, seed)
    stored = read_tensor_file(file)
    if not stored:
        raise InputError([Problem(name, file.name, "holds no tensor at all", "the adapter's", SAVE_AGAIN)])
    modules = modules_of(list(base.tensors))
    try:
        matches = Matches(config, modules)
        if is_plain_lora(config):
            targets = targeted(config, modules, matches)
            whole = saved_whole(config, list(base.tensors), targets)
    except ValueError as error:
        expected = "names of modules, or expressions that match some"
        raise InputError([Problem(name, _CONFIG, str(error), expected, SAVE_AGAIN)]) from error
    if is_plain_lora(config):
        deltas, replaced = split_adapter(config, stored, matches)
        source = _over(_PlainLora(name, file, base, deltas, replaced, targets, whole))
    else:
        source, told = _merged_by_peft(name, base, located.folder, config, stored, scratch)
        warnings = (*warnings, *told)
        source = replace(source, origin=(located.folder / _CONFIG, file, *base.files), base_dtype=base.dtype)
    if any((located.folder / whole_model).exists() for whole_model in _WHOLE_MODELS):
        found = f"a whole model lies there too; the adapter is taken, over {base.located.public_name}"
        remedy = f"If the model is meant, remove {_CONFIG}."
        warnings = (*warnings, Problem(name, str(located.folder), found, "", remedy))
    return replace(source, name=name, located=located, base=base.located, weight=spec.weight, warnings=tuple(warnings))


def _weights(name: str, folder: Path) -> Path:
    """Return the file of an adapter's tensors.

    Raises:
        InputError: there is none.
    """
    for file in _FILES:
        if (folder / file).exists():
            return folder / file
    if any((folder / file).exists() for file in _WHOLE_MODELS):
        found, remedy = "no adapter weights, but a whole model", f"If the model is meant, remove {_CONFIG}."
    else:
        found, remedy = "no weights", "Give another folder, or copy the missing file there."
    raise InputError([Problem(name, str(folder), found, " or ".join(_FILES), remedy)])


def _refuse_unmergeable(name: str, config: Mapping[str, Any]) -> None:
    """Refuse what changes the model in a way that its files do not tell, or only for some tokens."""
    start = config.get("init_lora_weights")
    found = expected = remedy = ""
    if config.get("peft_type") in ("POLY", "XLORA"):
        found = f"an adapter of type {config['peft_type']}, which mixes its parts anew for each input"
        remedy = BY_NOBODY
    elif config.get("alora_invocation_tokens"):
        found = "alora_invocation_tokens: an activated LoRA, which works from certain tokens on only"
        remedy = BY_NOBODY
    elif isinstance(start, str) and (start.startswith("pissa_niter") or start in ("lora_ga", "corda")):
        found = f"init_lora_weights is {start}, which moved the base's weights in a way that cannot be repeated"
        expected, remedy = "an adapter on the base as it is published", _AS_LORA
    if found:
        raise InputError([Problem(name, _CONFIG, found, expected, remedy)])


def _merged_by_peft(
    name: str,
    base: Source,
    adapter: Path,
    config: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    scratch: Callable[[], Path],
) -> tuple[Source, list[Problem]]:
    """Have peft merge the adapter into its base in a scratch folder; return that as a source, with warnings."""
    rows = grown_rows(config, stored, base.config["vocab_size"], base.config["tie_word_embeddings"])
    merged = scratch()
    warnings = merge_through_peft(name, base.located.folder, adapter, config, merged, rows)
    return open_checkpoint(name, Located(merged), 1.0), warnings


def _over(lora: _PlainLora) -> Source:
    """Lay a plain LoRA over its base.

    Where the base ties its head to its embedding and the adapter changes them apart, the source has both.

    Raises:
        InputError: everything in which it does not fit its config or its base.
    """
    base, deltas, replaced = lora.base, lora.deltas, lora.replaced
    tensors, tied = dict(base.tensors), base.config["tie_word_embeddings"]
    changed = {*deltas, *replaced}
    if tied and changed & {EMBEDDING, HEAD}:
        tensors[HEAD] = base.tensors[EMBEDDING]
        tied = _is_still_tied(deltas, replaced)
    tensors |= replaced
    if problems := [*_lost(lora), *_unfitting(lora, tensors)]:
        raise InputError(problems)
    if tied and changed & {EMBEDDING, HEAD}:
        tensors.pop(HEAD)
        deltas = {key: delta for key, delta in deltas.items() if key != HEAD}
    rows = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else base.config["vocab_size"]
    config = {**base.config, "vocab_size": rows, "tie_word_embeddings": tied}
    return replace(base, config=config, tensors=tensors, deltas=deltas)


def _is_still_tied(deltas: Mapping[str, LoraDelta], replaced: Mapping[str, StoredTensor]) -> bool:
    """Return whether embedding and head are changed alike, as after ensure_weight_tying or a resize of both."""
    if (EMBEDDING in replaced) != (HEAD in replaced) or (EMBEDDING in deltas) != (HEAD in deltas):
        return False
    if EMBEDDING in replaced and not same_bytes(replaced[EMBEDDING], replaced[HEAD]):
        return False
    return EMBEDDING not in deltas or same_delta(deltas[EMBEDDING], deltas[HEAD])


def _lost(lora: _PlainLora) -> list[Problem]:
    """Compare the file with the config: what it lacks, and factors that peft would pass over."""
    problems = []
    factors = {key.removesuffix(".weight") for key in lora.deltas}
    untargeted = {module for module in factors - lora.targets if f"{module}.weight" in lora.base.tensors}
    if lora.base.config["tie_word_embeddings"] and EMBEDDING in lora.deltas:
        untargeted.discard(HEAD.removesuffix(".weight"))  # ensure_weight_tying has them in the file, not in the config
    for kind, names, expected in (
        ("lacks the factors of", lora.targets - factors, f"them, by {_CONFIG}"),
        ("holds factors of", untargeted, f"only what {_CONFIG} names"),
        ("lacks", lora.whole - lora.replaced.keys(), f"it, by {_CONFIG}"),
    ):
        shown = sorted(names)
        for item in shown[:_MANY]:
            problems.append(lora.problem(f"{kind} {item}", expected, SAVE_AGAIN))
        if len(shown) > _MANY:
            problems.append(lora.problem(f"{kind} {len(shown) - _MANY} more", expected, SAVE_AGAIN))
    return problems


def _unfitting(lora: _PlainLora, tensors: Mapping[str, StoredTensor]) -> list[Problem]:
    """Compare what the adapter changes with its base.

    Args:
        tensors: the base's, with those of the adapter that take their place.
    """
    problems = []
    known = {*lora.base.tensors, *({HEAD} if lora.base.config["tie_word_embeddings"] else ())}
    for key in sorted({*lora.deltas, *lora.replaced} - known):
        problems.append(lora.problem(f"changes {key}, which its base does not have", "", _IS_IT_ITS_BASE))
    for key, tensor in lora.replaced.items():
        if len(tensor.shape) not in (1, 2):
            found = f"{key} has shape {list(tensor.shape)}"
            problems.append(lora.problem(found, "a matrix or a vector", SAVE_AGAIN))
    for key, delta in lora.deltas.items():
        if key in tensors and tensors[key].shape != delta.shape:
            found, expected = f"the delta of {key} is {list(delta.shape)}", f"{list(tensors[key].shape)}"
            problems.append(lora.problem(found, expected, _IS_IT_ITS_BASE))
    return problems
