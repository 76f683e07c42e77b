"""Routers by multinomial logistic regression: the likeliest domain of a token, by the router's own softmax.

Of N tokens x_n with domains d_n and weights a_n, which add up to 1,

    W = argmin_W  sum_n a_n (log sum_d exp(w_d . x_n) - w_(d_n) . x_n)  +  lambda / 2 * mu |W|^2

with mu the mean square of the inputs. W are the rows that are fitted. The softmax is over others, too, which stay as
they are: those of domains without text are zero. Ridge regression fits labels of 0 and 1, and spends its weights on
tokens that are far on the right side already; this does not. It is convex: whatever it sets out from, it comes to the
same rows.

Legend: N tokens, H hidden, D rows that are fitted, F rows that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn import functional as F

_ROUNDS = 100
"""Steps of L-BFGS, at most; some tens are enough."""
_GRADIENT = 3e-4
"""Largest entry of the gradient at which it ends, where inputs are white and losses are nats per token. The loss is
then nearer to its optimum than so many tokens could tell: with 1e-5 a fit took three times as many passes, and its
merge closed the same part of the gap to 0.1 points."""


class Labelled(NamedTuple):
    """Tokens of one domain. A norm stands in front of a router: token n's input is `scales[n] * gain * states[n]`.

    Taken apart like this it need not be computed in each pass, of which it would be most.
    """

    states: torch.Tensor
    """[N, H]"""
    scales: torch.Tensor
    """[N]"""
    domain: int
    """The number of its row: one of D that are fitted, or D and more for one that stays."""
    weight: float
    """Of each token."""


def logistic_solution(
    batches: Callable[[], Iterator[Labelled]],
    gain: torch.Tensor,
    gram: torch.Tensor,
    start: torch.Tensor,
    penalty: float,
    fixed: torch.Tensor,
) -> torch.Tensor:
    """Go from the rows `start` [D, H] to the optimum; return it, [D, H] in float32.

    Args:
        batches: gives out all tokens once, in the same order each time. Weights add up to 1.
        gain: the norm's weight, [H].
        gram: `sum_n a_n x_n x_n^T`, [H, H].
        penalty: lambda.
        fixed: rows that stay, [F, H].
    """
    gram = gram.double()
    scale = penalty * gram.diagonal().mean()
    # in coordinates in which the inputs are white, L-BFGS needs few steps: V = W L with gram + lambda = L L^T
    factor = torch.linalg.cholesky(gram + scale * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    if not len(fixed):  # the softmax does not see what all rows have in common, so at the optimum that is nothing
        start = start - start.mean(dim=0)
    white = (start.double() @ factor).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [white], max_iter=_ROUNDS, tolerance_grad=_GRADIENT, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def dyed(white: torch.Tensor) -> torch.Tensor:
        """Return W = V L^-1."""
        return torch.as_tensor(torch.linalg.solve_triangular(factor, white, upper=False, left=False))

    def closure() -> torch.Tensor:
        """Compute the loss and, into `white.grad`, its gradient."""
        rows = dyed(white.detach())
        loss, gradient = _loss(batches(), gain, rows, fixed)
        loss += scale / 2 * rows.square().sum()
        gradient += scale * rows
        white.grad = torch.linalg.solve_triangular(factor.T, gradient, upper=True, left=False).contiguous()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return dyed(white.detach()).float()


def _loss(
    batches: Iterator[Labelled], gain: torch.Tensor, rows: torch.Tensor, fixed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens' weighed loss, and its gradient by the rows [D, H], in float64."""
    loss = torch.zeros((), dtype=torch.float64, device=rows.device)
    gradient = torch.zeros_like(rows)
    narrow = torch.cat([rows.float(), fixed.float()]) * gain
    for states, scales, domain, weight in batches:
        # [D + F, N]: a softmax over a few columns would take as long as the product
        logs = F.log_softmax(scales * (narrow @ states.T), dim=0)
        loss -= weight * logs[domain].sum().double()
        errors = logs[: len(rows)].exp()
        if domain < len(rows):
            errors[domain] -= 1
        gradient += weight * ((scales * errors) @ states).double()
    return loss, gradient * gain
