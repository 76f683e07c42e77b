"""One model on one domain."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from btx_merge.errors import InputError, Problem
from btx_merge.evaluation.report import Score
from btx_merge.measuring.losses import perplexity, token_losses
from btx_merge.measuring.windows import Domain, amount_of

Losses = dict[tuple[int, int], NDArray[np.float32]]
"""Of one model, by the place of a window (`Window.place`): those of its scored tokens, in nats."""


def score(
    model: Any,
    domain: Domain,
    tokenizer: Any,
    batch_tokens: int,
    told: Callable[[int], None],
    kept: Losses | None = None,
) -> Score:
    """Measure a model on a domain.

    Args:
        tokenizer: the model's own.
        batch_tokens: tokens that are computed together, at most.
        told: takes bytes of text as they are done.
        kept: gets the losses of all tokens.

    Raises:
        InputError: the model's tokenizer gives ids for which its embedding has no row.
    """
    same_tokens = domain.reads_alike(tokenizer)
    amount = domain.amount if same_tokens else amount_of(domain.windows(tokenizer, False))
    rows = model.get_input_embeddings().weight.shape[0]
    if amount.largest_id >= rows:
        found = f"gives the id {amount.largest_id}"
        raise InputError(
            [Problem("tokenizer", str(tokenizer.name_or_path), found, f"below {rows}, the embedding's rows")]
        )
    loss = 0.0  # in nats; a sum of float32 losses in float64
    for window, losses in token_losses(model, domain.windows(tokenizer, same_tokens), batch_tokens):
        loss += float(losses.double().sum())
        if kept is not None:
            kept[window.place] = losses.numpy()
        told(window.nbytes)
    bits = loss / math.log(2) / domain.amount.nbytes
    return Score(bits, perplexity(loss / amount.tokens), amount.tokens, same_tokens)
