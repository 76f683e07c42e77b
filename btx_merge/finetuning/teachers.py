"""The sources of a merged model as teachers of its finetuning: distillation of each domain by its own source.

The loss of a step gets, beside the language model's, the mean over the predicted tokens of
`KL(p || q) = sum_v p_v (log p_v - log q_v)`, p the distribution of the source that the window's domain names and q the
merged model's, as in Hinton et al. (arXiv 1503.02531) at temperature 1.

A source never has to lie beside another in memory: its last hidden states are computed for a block of steps ahead and
kept on the host, where they are V / H times smaller than its logits, from which its head, the only part that stays,
makes the logits again when their step comes.

Legend: B rows, T tokens, N predicted tokens of a row, H hidden, V vocabulary, D domains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from btx_merge.finetuning.data import IGNORED
from btx_merge.measuring.models import load_source
from btx_merge.sources.source import Source

STATES = "teacher_states"
"""Of a micro-batch, the last hidden states of each row's own source, [B, T, H]."""
_BLOCK_BYTES = 2_000_000_000
"""Hidden states that are kept at a time: 100 steps of 4,096 tokens of a model of 1 B parameters in bfloat16."""


class Divergence(torch.autograd.Function):
    """`sum_n KL(p_n || q_n)`, with the gradient `q - p` of q's logits.

    The gradient is computed in the forward pass, so that it is all that is kept: one tensor of the size of the logits,
    where autograd would keep both distributions.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        """Take the model's logits [N, V] and the source's [N, V'], V' <= V: a source gives rows that it lacks 0."""
        logs = logits.float().log_softmax(dim=-1)
        theirs = taught.float().log_softmax(dim=-1)
        p, shared = theirs.exp(), slice(0, taught.shape[-1])
        total = (p * (theirs - logs[:, shared])).sum()
        gradient = logs.exp_()
        gradient[:, shared] -= p
        ctx.save_for_backward(gradient.to(logits.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return the gradient of the model's logits; the source has none."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None


class Teachers:
    """The source of each domain, and what it says of the windows that come next."""

    def __init__(self, sources: Sequence[Source], dtype: torch.dtype, device: torch.device, tokens: int):
        """Take the sources in the order of the domains.

        Args:
            dtype: of their forward passes.
            tokens: of a step on this rank. All ranks have as many, so that all look ahead together.
        """
        self.sources, self.dtype, self.device = sources, dtype, device
        size = sources[0].config["hidden_size"] * dtype.itemsize
        self.steps_ahead: int = max(1, _BLOCK_BYTES // (tokens * size))
        """Steps for which hidden states are computed at a time."""
        self.last = torch.zeros(len(sources), device=device)
        """Divergence of the last micro-batch, its sum over the tokens of each domain, [D]."""
        self._heads: list[torch.Tensor] = []
        self._given: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def look_at(self, batches: Iterable[dict[str, Any]]) -> None:
        """Add to micro-batches the hidden states of their rows, each by the source of its domain, one after another.

        Rows of a micro-batch that have one domain are computed together, so how many micro-batches are given at a
        time changes no bit.
        """
        batches, self._heads = list(batches), []
        for domain, source in enumerate(self.sources):
            model: Any = load_source(source, self.dtype, self.device)
            self._heads.append(model.lm_head.weight.detach())
            for batch in batches:
                rows = (batch["domain"] == domain).nonzero().flatten()
                if len(rows):
                    inputs = {name: batch[name][rows].to(self.device) for name in ("input_ids", "position_ids")}
                    states = model.model(**inputs, use_cache=False).last_hidden_state.cpu()
                    shape = (*batch["input_ids"].shape, states.shape[-1])
                    batch.setdefault(STATES, torch.zeros(shape, dtype=self.dtype))[rows.cpu()] = states
            del model  # before the next one comes

    @contextmanager
    def teaching(self, states: torch.Tensor | None, domains: torch.Tensor) -> Iterator[None]:
        """Have the model's loss inside be joined by the divergence of rows: states [B, T, H], domains [B]."""
        self._given = None if states is None else (states, domains)
        yield
        self._given = None

    def join(self, model: Any) -> None:
        """Let a model's own loss function add the divergence, so that it is scaled in all cases as the loss is."""
        plain: Callable[..., torch.Tensor] = model.loss_function

        def taught(*, logits: torch.Tensor, labels: torch.Tensor, **call: Any) -> torch.Tensor:
            loss = plain(logits=logits, labels=labels, **call)
            if self._given is None:
                return loss
            total = self._divergence(logits, labels, *self._given)
            count = call.get("num_items_in_batch")
            return loss + total / ((labels[:, 1:] != IGNORED).sum() if count is None else count)

        model.loss_function = taught

    def _divergence(
        self, logits: torch.Tensor, labels: torch.Tensor, states: torch.Tensor, domains: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum over the tokens that are predicted in logits [B, T, V]; put its parts into `last`."""
        parts = [logits.new_zeros((), dtype=torch.float32) for _ in self.sources]
        for row, domain in enumerate(domains.tolist()):
            counted = labels[row, 1:] != IGNORED  # a row at a time: two distributions of a batch are much memory
            theirs = F.linear(states[row, :-1][counted], self._heads[domain])
            ours = logits[row, :-1][counted]
            parts[domain] = parts[domain] + Divergence.apply(ours, theirs)  # type: ignore[no-untyped-call]
        self.last = torch.stack(parts).detach()
        return torch.stack(parts).sum()
