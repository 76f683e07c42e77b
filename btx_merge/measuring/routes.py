"""A merged model whose routers have no say: every token goes where it is sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from btx_merge.modeling.routing_btx import BTXRouting


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

    routings = [module for module in model.modules() if isinstance(module, BTXRouting)]
    handles = [module.register_forward_hook(force) for module in routings]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
