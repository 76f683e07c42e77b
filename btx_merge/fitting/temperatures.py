"""The temperature of a fitted router: the factor that brings its layer nearest to what the layer should give.

Legend: N tokens, H hidden, E experts, K experts per token, P pairs of an expert and a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from btx_merge.fitting.equations import mean_square
from btx_merge.fitting.passing import expert_output
from btx_merge.model.held_out import LayerFit
from btx_merge.modeling.modeling_btx import BTXDecoderLayer
from btx_merge.modeling.routing_btx import RouterCall

TEMPERATURES = tuple(2 ** (half / 2) for half in range(17))
"""Factors on a fitted router that are tried: 1 to 256, in steps of sqrt(2). Ridge's targets are 0 and 1, so that its
solution is softer than any router should be; at 256 its choice is as good as certain."""
_NEARLY_ALL = 0.9
"""A part of the tokens is ambiguous, and the last would ask for a factor that takes tokens from all other experts."""


class HeldOutTokens(NamedTuple):
    """Tokens of one domain that factors are tried on."""

    experts: list[int]
    """The domain's own."""
    states: torch.Tensor
    """Before the norm of the feed-forward block, [N, H]."""
    aims: torch.Tensor | None
    """Where the states should stand behind the block, [N, H]; None for where the own experts bring them."""


class Temperatures:
    """Tries factors on rows of a layer's router; its other rows stay as they are."""

    def __init__(
        self,
        layer: BTXDecoderLayer,
        solution: torch.Tensor,
        rows: Sequence[int],
        texts: Sequence[HeldOutTokens],
        experts_per_token: int,
    ):
        """Set up; no factor is tried yet.

        Args:
            solution: a router, [E, H].
            rows: those of the solution that are tried.
        """
        self.layer, self.solution, self.rows, self.texts = layer, solution, list(rows), texts
        self.inputs = [layer.post_attention_layernorm(text.states) for text in texts]  # what the router reads
        self.call = RouterCall(experts_per_token)

    def best(self, index: int, factors: Sequence[float] = TEMPERATURES) -> tuple[LayerFit, torch.Tensor]:
        """Return the best factor with its figures, and the router [E, H] that it gives.

        The best has the smallest mean over domains of `sum |y - target|^2 / sum |target|^2`, each token relative to
        the state that it should come to.

        Args:
            index: the layer's number.
            factors: those that are tried.
        """
        errors: dict[float, list[float]] = {factor: [] for factor in factors}
        own_errors = []
        for text, inputs in zip(self.texts, self.inputs, strict=True):
            routes = {factor: self._route(inputs, factor) for factor in factors}
            own = torch.tensor([text.experts] * len(inputs), device=inputs.device)  # [N, chunks]
            given = outputs_of(self.layer, inputs, [own, *(chosen for _, chosen in routes.values())])
            by_own = given(own).sum(dim=1)
            targets = by_own if text.aims is None else text.aims - text.states
            error_of = partial(_relative_error, targets, mean_square(text.states + targets))
            own_errors.append(error_of(by_own))
            for factor, (weights, chosen) in routes.items():
                errors[factor].append(error_of((weights[..., None] * given(chosen)).sum(dim=1)))
        # a tie goes to the softer router
        error, factor = min((round(_mean(found), 6), factor) for factor, found in errors.items())
        return LayerFit(index, factor, self._right(factor), error, _mean(own_errors)), self._router(factor)

    def winning(self) -> float:
        """Return the smallest factor that makes own experts the likeliest for nearly all tokens.

        For rows that are fitted on their own text alone: nothing tells there how much is too much.
        """
        return next((factor for factor in TEMPERATURES if self._right(factor) >= _NEARLY_ALL), TEMPERATURES[-1])

    def _router(self, factor: float) -> torch.Tensor:
        """Return the layer's router [E, H] with the factor on the rows that are tried."""
        rows = torch.as_tensor(self.layer.mlp.gate.weight.clone())
        rows[self.rows] = factor * self.solution[self.rows]
        return rows

    def _route(self, inputs: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the experts' weights and numbers, each [N, K], by the model's own routing."""
        weights, _, chosen = self.layer.mlp.routing(inputs @ self._router(factor).T, self.call)
        return weights, chosen

    def _right(self, factor: float) -> float:
        """Return the mean over domains of the part of tokens for which an own expert is the likeliest."""
        rows, parts = self._router(factor), []
        for text, inputs in zip(self.texts, self.inputs, strict=True):
            own = torch.tensor(text.experts, device=rows.device)
            parts.append(torch.isin((inputs @ rows.T).argmax(dim=-1), own).float().mean().item())
        return _mean(parts)


def outputs_of(
    layer: BTXDecoderLayer, inputs: torch.Tensor, choices: Iterable[torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Run each expert once, on the tokens that some choice sends to it. Factors change weights more than choices.

    Args:
        inputs: [N, H].
        choices: numbers of experts, [N, K] each.

    Returns:
        A function that gives the outputs of a choice, [N, K, H].
    """
    needed = inputs.new_zeros(len(layer.mlp.gate.weight), len(inputs), dtype=torch.bool)  # [E, N]
    for chosen in choices:
        needed.scatter_(0, chosen.T, True)
    outputs = torch.cat(
        [expert_output(layer, expert, inputs[tokens]) for expert, tokens in enumerate(needed)]
    )  # [P, H]
    places = torch.full(needed.shape, -1, device=inputs.device)
    places[needed] = torch.arange(len(outputs), device=inputs.device)  # by expert, then by token, as outputs are
    tokens = torch.arange(len(inputs), device=inputs.device)[:, None]
    return lambda chosen: outputs[places[chosen, tokens]]


def _relative_error(targets: torch.Tensor, squares: torch.Tensor, outputs: torch.Tensor) -> float:
    """Return `sum |y - target|^2 / sum |target|^2`: no domain weighs more because its targets are larger.

    Args:
        targets: [N, H], and outputs as well.
        squares: what each token's are relative to, [N, 1].
    """
    distance, size = (((outputs - targets).square() / squares).sum(), (targets.square() / squares).sum())
    return (distance / size.clamp(min=1e-30)).item()  # a target may be all zeros


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
