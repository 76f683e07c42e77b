"""Models in memory: a merged one, whose routers may be overruled, the sources that it was made of, their mean, and any
other.

Each is what transformers makes of it, in one dtype on one device, and only one should be in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from btx_merge.architectures.llama import EMBEDDING, HEAD
from btx_merge.checkpoints.dtypes import Float32
from btx_merge.checkpoints.layout import portions
from btx_merge.errors import InputError, Problem
from btx_merge.modeling.routing_btx import routings_of
from btx_merge.reporting import first_line, without_loading_bars
from btx_merge.sources.locate import Located
from btx_merge.sources.segments import within
from btx_merge.sources.source import Source
from btx_merge.sources.vocabulary import Vocabulary, plan_vocabulary

_ROWS = 16_384
"""Rows of a tensor that are held in float32 at once."""

Rows = Callable[[str, int, int], Float32]
"""Rows [start, stop) of a tensor by its name in a Llama."""


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
    tied = all(source.config["tie_word_embeddings"] for source in sources)
    return _dense(sources[0], vocabulary.size, tied, partial(_mean, sources, vocabulary), dtype, device)


def load_folder(located: Located, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a causal language model of any kind that transformers knows, a merged one among them.

    Raises:
        InputError: transformers cannot load it.
    """
    try:
        with without_loading_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(located.folder, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # of any kind: transformers has code for every family
        found = f"transformers cannot load it ({type(error).__name__}: {first_line(error)})"
        expected = "a causal language model of transformers"
        raise InputError([Problem("model", str(located.folder), found, expected)]) from error
    return model.to(device).eval()


@contextmanager
def sent_to(model: Any, experts: Sequence[int]) -> Iterator[None]:
    """Send every token of every layer to these experts alone, each with weight 1.

    With one expert, or with all chunks of one source, each feed-forward block is then that source's, whatever the
    kind of router.

    Args:
        model: a `BTXForCausalLM`.
        experts: their numbers.
    """

    def force(module: Any, inputs: Any, out: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        weights, logits, _ = out  # [N, K], [N, E], [N, K]
        chosen = torch.tensor(experts, device=logits.device).expand(len(logits), -1)
        return torch.ones_like(chosen, dtype=weights.dtype), logits, chosen

    handles = [routing.register_forward_hook(force) for routing in routings_of(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
            for start, stop in portions(0, parameter.shape[0], 1, _ROWS):
                parameter[start:stop] = torch.from_numpy(rows(name, start, stop)).to(device)
    model.eval()
    return model  # type: ignore[no-any-return]


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
