"""Models to be measured: a merged one, the sources that its own recipe names, their mean, and any other.

Each is what transformers makes of it, in one dtype on one device, and only one should be in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging

from btx_merge.architectures.llama import EMBEDDING, HEAD
from btx_merge.checkpoints.dtypes import Float32
from btx_merge.errors import InputError, Problem
from btx_merge.model.merged import MergedModel
from btx_merge.model.records import RECIPE_FILE, anchor_sources, read_record
from btx_merge.sources.digest import changed_problems
from btx_merge.sources.locate import Located, is_folder
from btx_merge.sources.opening import open_each
from btx_merge.sources.segments import within
from btx_merge.sources.source import SEED, ExpertSpec, Source, as_spec
from btx_merge.sources.vocabulary import Vocabulary, plan_vocabulary

_ROWS = 16_384
"""Rows of a tensor that are held in float32 at once."""

Rows = Callable[[str, int, int], Float32]
"""Rows [start, stop) of a tensor by its name in a Llama."""


def source_specs(model: MergedModel, moved: Mapping[str, str]) -> dict[str, ExpertSpec]:
    """Return the models that a merged one was made of, by its own recipe: the seed, then the experts.

    Args:
        moved: source to where it lies now, for those that are not where the recipe says.

    Raises:
        InputError: the model has no recipe, or none of the sources has the name of one that has moved.
    """
    folder = model.located.folder.resolve()
    where, values = str(folder / RECIPE_FILE), read_record(folder)
    if not values.get("seed"):
        remedy = "Copy it there from the model that this one was made of, or give --no-sources."
        raise InputError([Problem("model", where, "no recipe, which would name the sources", "", remedy)])
    values = anchor_sources(values, [folder, folder.parent])
    experts = {name: as_spec(name, spec) for name, spec in (values.get("experts") or {}).items()}
    specs = {SEED: ExpertSpec(values["seed"]), **experts}
    known = f"one of {', '.join(specs)}"
    if unknown := [Problem("command", "--source", f"no source {name}", known) for name in moved if name not in specs]:
        raise InputError(unknown)
    return {name: replace(spec, model=moved.get(name, spec.model)) for name, spec in specs.items()}


def open_sources(
    model: MergedModel, moved: Mapping[str, str], scratch: Callable[[], Path]
) -> tuple[dict[str, Source], list[Problem]]:
    """Open the models that a merged one was made of, without reading weights, the seed first.

    Returns with them warnings: sources that are not what was merged.

    Args:
        scratch: makes a folder for what peft has to merge itself.

    Raises:
        InputError: every source that cannot be opened.
    """
    specs = source_specs(model, moved)
    seed, problems = open_each({SEED: specs[SEED]}, None, scratch)
    experts, more = open_each({name: spec for name, spec in specs.items() if name != SEED}, seed.get(SEED), scratch)
    if problems or more:
        raise InputError([_with_ways_out(problem, specs) for problem in (*problems, *more)])
    sources = {**seed, **experts}
    digests = (read_record(model.located.folder).get("resolved") or {}).get("sources")
    changed = changed_problems(sources.values(), digests if isinstance(digests, Mapping) else {})
    return sources, [replace(problem, remedy="Give the one that was merged by --source.") for problem in changed]


def _with_ways_out(problem: Problem, specs: Mapping[str, ExpertSpec]) -> Problem:
    """Add to what can be done about a source that its place came from a recipe, and that it can be done without."""
    model, option = specs[problem.source].model, f"--source {problem.source}=MODEL"
    is_path = "/" not in model or model.startswith(("/", ".", "~"))  # otherwise the Hub's, whose answer says more
    if is_path and not is_folder(model):
        return replace(problem, remedy=f"Give {option} where it lies now, or --no-sources.")
    otherwise = f"{option}, another copy of it, or --no-sources."
    return replace(problem, remedy=f"{problem.remedy} Or give {otherwise}" if problem.remedy else f"Give {otherwise}")


def load_source(source: Source, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """Return a source as a dense Llama, an adapter with its base; every value is rounded once."""
    tied = bool(source.config["tie_word_embeddings"])
    return _dense(source, source.config["vocab_size"], tied, source.rows, dtype, device)


def load_mean(sources: Sequence[Source], dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """Return the dense mean of sources that were grown from the first of them, a "soup".

    Every value is the mean in float32 over the sources that have it, and rounded once. A token that only some of the
    sources have is the mean over these.

    Raises:
        InputError: vocabularies that do not fit each other.
    """
    vocabulary = plan_vocabulary(sources)
    rows: Rows = lambda name, start, stop: _mean(sources, vocabulary, name, start, stop)  # noqa: E731
    tied = all(source.config["tie_word_embeddings"] for source in sources)
    return _dense(sources[0], vocabulary.size, tied, rows, dtype, device)


def load_folder(located: Located, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a causal language model of any kind that transformers knows, a merged one among them.

    Raises:
        InputError: transformers cannot load it.
    """
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a measurement has its own
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(located.folder, dtype=dtype, trust_remote_code=False)
    except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        found = f"transformers cannot load it ({type(error).__name__}: {reason})"
        expected = "a causal language model of transformers"
        raise InputError([Problem("model", str(located.folder), found, expected)]) from error
    finally:
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    return model.to(device).eval()


def _dense(
    source: Source, vocabulary_size: int, tied: bool, rows: Rows, dtype: torch.dtype, device: torch.device
) -> LlamaForCausalLM:
    """Build a Llama of a source's shape and fill it, a block of rows at a time."""
    values = {key: value for key, value in source.raw_config.items() if key not in ("dtype", "torch_dtype")}
    config = LlamaConfig.from_dict({**values, "vocab_size": vocabulary_size, "tie_word_embeddings": tied})
    config.dtype = dtype
    with torch.device("meta"):  # no memory, and no random values, for weights that are replaced
        model: Any = LlamaForCausalLM(config)
    model.to(dtype).to_empty(device=device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # it computes its buffers when it is made
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied head comes once, as the embedding
            for start, stop in _blocks(parameter.shape[0]):
                parameter[start:stop] = torch.from_numpy(rows(name, start, stop)).to(device)
    model.eval()
    return model  # type: ignore[no-any-return]


def _blocks(rows: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS))


def _mean(sources: Sequence[Source], vocabulary: Vocabulary, name: str, start: int, stop: int) -> Float32:
    """Return rows [start, stop) of the mean."""
    by_token = name in (EMBEDDING, HEAD)
    width = sources[0].tensors[sources[0].stored_name(name)].shape[1:]
    total = np.zeros((stop - start, *width), np.float32)
    count = np.zeros((stop - start, *(1 for _ in width)), np.float32)
    for source in sources:
        if not by_token:
            total += source.rows(name, start, stop)
            count += 1
            continue
        for part in within(vocabulary.segments[source.name], start, stop):
            here = slice(part.out - start, part.out - start + part.count)
            total[here] += source.rows(name, part.row, part.row + part.count)
            count[here] += 1
    total /= np.maximum(count, 1)
    return total
