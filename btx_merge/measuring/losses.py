"""The loss of every scored token of windows, by any causal language model of transformers.

Windows of similar length are computed together, padded on the right. Losses are computed in float32, for some tokens
at a time: logits of a whole batch, [B, T, V] in float32, would be most of the memory that a model needs.

Legend: B windows, T tokens of the longest, N scored tokens of a batch, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from btx_merge.measuring.windows import Window

_BATCHES_AHEAD = 16
"""Batches' worth of windows that are sorted by length together."""
_NUMBERS_AT_ONCE = 16_000_000
"""Logits that are in memory in float32 at a time."""
_PLAIN_HEADS = ("btx", "llama", "mistral", "mixtral", "qwen2")
"""Models whose logits are their head's output and nothing else, so that the head need not run on a batch at once."""


class Batch(NamedTuple):
    """Windows that are computed together."""

    windows: tuple[Window, ...]
    ids: torch.Tensor
    """[B, T], what the model reads: a window's ids but for its last, then zeros."""
    mask: torch.Tensor
    """[B, T], 0 for padding."""
    is_scored: torch.Tensor
    """[B, T] bool: where the next token is scored. True N times, in the order of the windows and of their tokens."""
    targets: torch.Tensor
    """[N], the scored tokens."""


def batches(windows: Iterable[Window], tokens: int) -> Iterator[Batch]:
    """Put windows of similar length together, so that no batch has more than `tokens` with its padding; at least one.

    Batches come in another order than the windows, and hold them.
    """
    waiting: list[Window] = []
    held = 0
    for window in windows:
        waiting.append(window)
        held += len(window.ids) - 1
        if held >= _BATCHES_AHEAD * tokens:
            yield from _batches_of(waiting, tokens)
            waiting, held = [], 0
    yield from _batches_of(waiting, tokens)


def _batches_of(windows: list[Window], tokens: int) -> Iterator[Batch]:
    """Deal windows out, the longest first: if memory does not suffice, that shows at the beginning."""
    windows.sort(key=lambda window: -len(window.ids))
    begin = 0
    while begin < len(windows):
        count = max(1, tokens // (len(windows[begin].ids) - 1))
        yield _batch(windows[begin : begin + count])
        begin += count


def _batch(windows: list[Window]) -> Batch:
    shape = len(windows), max(len(window.ids) for window in windows) - 1
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    is_scored = torch.zeros(shape, dtype=torch.bool)
    targets: list[int] = []
    for row, window in enumerate(windows):
        read = len(window.ids) - 1
        ids[row, :read] = torch.tensor(window.ids[:-1])
        mask[row, :read] = 1
        is_scored[row, read - window.scored : read] = True
        targets += window.ids[-window.scored :]
    return Batch(tuple(windows), ids, mask, is_scored, torch.tensor(targets))


@torch.inference_mode()
def batch_losses(model: Any, batch: Batch, **call: Any) -> list[torch.Tensor]:
    """Run a model on a batch; return for each of its windows the scored tokens' negative log-likelihoods, in nats.

    Args:
        model: in evaluation mode, on any device.
        call: what the model's forward pass takes besides, such as `active_experts`.

    Returns:
        Tensors in float32 on the CPU, each [T] of its window.
    """
    device = model.device
    inputs = {"input_ids": batch.ids.to(device), "use_cache": False, **call}
    if not batch.mask.all():  # without a mask torch has a faster attention
        inputs["attention_mask"] = batch.mask.to(device)
    is_scored, targets = batch.is_scored.to(device), batch.targets.to(device)
    head: Any = None
    if model.config.model_type in _PLAIN_HEADS:
        head = model.get_output_embeddings()
        rows = model.get_decoder()(**inputs).last_hidden_state[is_scored]  # [N, H]
    else:
        rows = model(**inputs).logits[is_scored]  # [N, V]
    losses = torch.empty(len(targets))
    step = max(1, _NUMBERS_AT_ONCE // model.config.get_text_config().vocab_size)
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        logits = rows[part] if head is None else head(rows[part])
        losses[part] = F.cross_entropy(logits.float(), targets[part], reduction="none").cpu()
    return list(torch.split(losses, [window.scored for window in batch.windows]))


def token_losses(
    model: Any, windows: Iterable[Window], tokens: int, **call: Any
) -> Iterator[tuple[Window, torch.Tensor]]:
    """Compute the losses of windows; yield each with its own, in the order of `batches`. See `batch_losses`."""
    for batch in batches(windows, tokens):
        yield from zip(batch.windows, batch_losses(model, batch, **call), strict=True)


def perplexity(loss: float) -> float:
    """Return exp(loss); infinite where that would be too large for a number."""
    return math.exp(loss) if loss < 700 else math.inf  # exp(710) is no float any more
