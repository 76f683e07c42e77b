"""What the routers of a model do in one forward pass: hooks see the gates that the model itself uses.

An expert is here what one source became: weights of its chunks add up.

Legend: P positions of a pass, S those that are looked at, K experts per token, E experts, A active ones, X experts
with their chunks as one, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from btx_merge.architectures.btx import expert_names, experts_by_domain
from btx_merge.modeling.routing_btx import routings_of


@dataclass(frozen=True)
class LayerRoutes:
    """The routes of one layer."""

    gates: torch.Tensor
    """[S, X], weights with which experts are added up; 0 for those that do not run."""
    choices: torch.Tensor
    """[S, X], how many experts of weight above 0 were chosen; more than one only of chunks."""
    entropy: torch.Tensor
    """[S], of the router's probabilities over the active experts, in nats."""


def running_experts(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the experts that tokens may be sent to, each with its numbers: all that its config does not switch off.

    Args:
        config: config.json of a merged model.
    """
    names, active = expert_names(config), config.get("active_experts")
    running = range(len(names)) if active is None else [names.index(x) if isinstance(x, str) else x for x in active]
    experts = {}
    for name, numbers in experts_by_domain(config).items():
        if kept := [number for number in numbers if number in running]:
            experts[name] = kept
    return experts


class Routes:
    """Watches the routers of a model."""

    def __init__(self, model: Any, experts: Mapping[str, Sequence[int]]):
        """Find the routers.

        Args:
            experts: see `running_experts`.
        """
        self.experts = experts
        self._layers = routings_of(model)
        self._active = sorted(number for numbers in experts.values() for number in numbers)
        self._member = torch.zeros(model.config.num_local_experts, len(experts))  # [E, X]
        for column, numbers in enumerate(experts.values()):
            self._member[list(numbers), column] = 1

    @property
    def num_layers(self) -> int:
        """How many routers there are."""
        return len(self._layers)

    @contextmanager
    def watching(self, is_wanted: torch.Tensor) -> Iterator[list[LayerRoutes]]:
        """Yield a list that a forward pass inside fills, layer by layer.

        Args:
            is_wanted: [P] bool, the positions to look at.
        """
        seen: list[LayerRoutes] = []

        def look(_: Any, __: Any, out: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            wanted = is_wanted.to(out[0].device)
            seen.append(self._routes(*(part[wanted] for part in out)))

        handles = [layer.register_forward_hook(look) for layer in self._layers]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _routes(self, weights: torch.Tensor, logits: torch.Tensor, experts: torch.Tensor) -> LayerRoutes:
        """Group what a router returns by expert: weights [S, K], logits [S, E], experts [S, K]."""
        member = self._member.to(logits.device, torch.float32)
        weights = weights.float()
        none = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
        gates = none.scatter_add(1, experts, weights) @ member
        choices = none.scatter_add(1, experts, (weights > 0).float()) @ member
        probabilities = logits.float()[:, self._active].softmax(dim=-1) @ member[self._active]
        entropy = torch.special.entr(probabilities).sum(dim=-1)
        return LayerRoutes(gates.cpu(), choices.cpu(), entropy.cpu())
