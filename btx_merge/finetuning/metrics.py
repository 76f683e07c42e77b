"""Measurements of a training step: its domains, and the routing of a merged model.

Legend: B rows, T tokens, N = B * T, K experts per token, E experts, L layers, D domains, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn
from torch.nn import functional as F

from btx_merge.architectures.btx import DEAD
from btx_merge.finetuning.data import IGNORED
from btx_merge.measuring.losses import perplexity
from btx_merge.modeling.routing_btx import routings_of
from btx_merge.reporting import Reporter

LOAD_PER_LAYER = "load_per_layer"
HELD_OUT = "eval_perplexity/"
"""Before a domain's name, the perplexity of its held-out part."""


class DomainLosses:
    """Measures the losses of training steps by domain, from the logits."""

    def __init__(self, domains: Sequence[str], reporter: Reporter):
        self.domains = domains
        self.reporter = reporter
        self.experts: list[str] = []
        """Names of the experts whose load is measured, too."""
        self._start()

    def _start(self) -> None:
        self._losses: Any = torch.zeros(3, len(self.domains))  # sums, counts, sums of divergences from the teachers
        self._is_taught = False

    @contextmanager
    def watching(self, is_watching: bool) -> Iterator[None]:
        """Mark the pass whose losses will be added: a meter may look at the model while it computes."""
        yield

    @torch.no_grad()
    def add(self, outputs: Any, labels: torch.Tensor, domains: torch.Tensor) -> None:
        """Add the losses of a pass by domain: logits [B, T, V], labels [B, T], domains [B]."""
        for logits, row, domain in zip(outputs["logits"], labels, domains.tolist(), strict=True):
            # by row, since each has a domain of its own
            loss = F.cross_entropy(logits[:-1].float(), row[1:], ignore_index=IGNORED, reduction="sum")
            self._losses[0, domain] += loss.to(self._losses)
            self._losses[1, domain] += int((row[1:] != IGNORED).sum())

    def add_divergences(self, divergences: torch.Tensor) -> None:
        """Add a pass's divergences from the teachers, the sum over the tokens of each domain: [D]."""
        self._losses[2] += divergences.to(self._losses)
        self._is_taught = True

    def take(self, step: int, device: torch.device) -> tuple[dict[str, float], list[list[float]] | None]:
        """Return what was measured since the last call, on all ranks: values to log, and the load [L, E] as shares."""
        (losses,), _ = _summed([self._losses], device)
        log = self._logged(losses)
        self._start()
        return log, None

    def _logged(self, losses: torch.Tensor) -> dict[str, float]:
        """Return the perplexity of each domain that came; with teachers also the two parts of the loss, per token."""
        log = {}
        for name, total, count, _ in zip(self.domains, *losses.tolist(), strict=True):
            if count:
                log[f"perplexity/{name}"] = perplexity(total / count)
        if self._is_taught:
            total, count, divergence = losses.sum(dim=1).tolist()
            log |= {"lm_loss": total / max(count, 1), "teacher_loss": divergence / max(count, 1)}
        return log


class Meter(DomainLosses):
    """Measures the routing of a merged model, too, by hooks on its routers."""

    def __init__(self, model: nn.Module, domains: Sequence[str], reporter: Reporter):
        config: Any = model.config
        names = [str(name) for name in config.expert_names or range(config.num_local_experts)]
        self._layers = routings_of(model)
        for layer, routing in enumerate(self._layers):
            routing.register_forward_hook(lambda _, __, out, layer=layer: self._routed(layer, *out))
        self._is_watching = False
        self._dead: set[tuple[int, int]] = set()
        self._sizes = len(self._layers), len(names)
        super().__init__(domains, reporter)
        self.experts = names

    def _start(self) -> None:
        super()._start()
        rows, columns = self._sizes
        self._choices: Any = torch.zeros(rows, columns)
        self._entropy: Any = torch.zeros(rows)
        self._tokens = 0
        self._balance: list[torch.Tensor] = []

    @contextmanager
    def watching(self, is_watching: bool) -> Iterator[None]:
        """Look at routers only inside: a layer that is computed again for its gradient is not counted twice."""
        self._is_watching = is_watching
        yield
        self._is_watching = False

    @torch.no_grad()
    def _routed(self, layer: int, weights: torch.Tensor, logits: torch.Tensor, experts: torch.Tensor) -> None:
        """Count the weights [N, K] and logits [N, E] of a layer; an expert of weight 0 was not chosen."""
        if not self._is_watching:
            return
        counts = torch.bincount(experts[weights > 0], minlength=len(self.experts))
        self._choices[layer] += counts.to(self._choices)
        logs = logits.float().log_softmax(dim=-1)
        self._entropy[layer] -= (logs.exp() * logs).sum().to(self._entropy)
        if layer == 0:
            self._tokens += logits.shape[0]

    def add(self, outputs: Any, labels: torch.Tensor, domains: torch.Tensor) -> None:
        """Add the losses of a pass by domain, and its balancing loss."""
        super().add(outputs, labels, domains)
        if outputs.get("aux_loss") is not None:
            self._balance.append(outputs["aux_loss"].detach())

    def take(self, step: int, device: torch.device) -> tuple[dict[str, float], list[list[float]] | None]:
        """Return what was measured since the last call, on all ranks: values to log, and the load [L, E] as shares."""
        balance = self._balance[-1].to(device, torch.float32) if self._balance else torch.zeros((), device=device)
        parts = [self._choices, self._entropy, torch.tensor([float(self._tokens)]), self._losses, balance[None]]
        (choices, entropy, tokens, losses, balances), ranks = _summed(parts, device)
        load = choices / choices.sum(dim=-1, keepdim=True).clamp(min=1)
        log = {f"load/{name}": share for name, share in zip(self.experts, load.mean(dim=0).tolist(), strict=True)}
        worst = (load * len(self.experts) - 1).abs().amax(dim=-1).tolist()
        log |= {f"load_deviation/layer_{layer}": value for layer, value in enumerate(worst)}
        log["router_entropy"] = float(entropy.mean() / tokens.clamp(min=1))
        log["dead_experts"] = self._warn_of_dead(step, load)
        if self._balance:
            log["aux_loss"] = float(balances) / ranks
        log |= self._logged(losses)
        self._start()
        return log, load.tolist()

    def _warn_of_dead(self, step: int, load: torch.Tensor) -> int:
        """Count the experts of a layer that get next to nothing, and name each when it dies."""
        ideal = 1 / len(self.experts)
        dead = {(layer, expert) for layer, expert in (load < DEAD * ideal).nonzero().tolist()}
        for layer, expert in sorted(dead - self._dead):
            share = float(load[layer, expert])
            name = self.experts[expert]
            found = f"{share:.2%} of the choices, ideal {ideal:.0%}"
            self.reporter.warn(f"step {step}, layer {layer}: the expert {name} is dead: {found}")
        self._dead = dead
        return len(dead)


def _summed(parts: Sequence[torch.Tensor], device: torch.device) -> tuple[list[torch.Tensor], int]:
    """Add up tensors over all ranks; return the sums on the CPU, in their shapes, and the number of ranks."""
    # one for everything: each costs a round trip between the ranks
    flat: Any = reduce(torch.cat([part.flatten().to(device) for part in parts]), "sum")
    pieces: Any = torch.split(flat.cpu(), [part.numel() for part in parts])
    return [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)], PartialState().num_processes
