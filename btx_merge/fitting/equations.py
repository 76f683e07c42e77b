"""The closed forms of a fit: what is minimised, and the weights that do so. No gradients, no steps.

Legend: N tokens, H hidden, E experts, I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from btx_merge.errors import InputError, Problem
from btx_merge.files.folder import read_json

OFF_DIAGONAL = 0.9
"""RegMean's factor on what inputs have in common (arXiv 2212.09849, section 4.2: alpha)."""
STATISTICS_FORMAT = 3
"""Of what is kept in a folder of statistics. Others cannot be told from those of another model."""
_KEY_FILE = "statistics.json"
"""What the moments in a folder were collected from. It is written last: without it the folder is incomplete."""

Moments = dict[str, torch.Tensor]
"""Sums over tokens, by name, from which a layer's weights are solved."""


def ridge_solution(
    gram: torch.Tensor, cross: torch.Tensor, penalty: float, prior: torch.Tensor | None = None
) -> torch.Tensor:
    """Solve for the W that minimises `sum_n |W x_n - y_n|^2 + lambda |W - prior|^2`, in float64.

    W = (Y X^T + lambda prior)(X X^T + lambda)^-1, with the tokens x_n and y_n as columns of X and Y.

    Args:
        gram: `sum_n x_n x_n^T`, [I, I].
        cross: `sum_n x_n y_n^T`, [I, O].
        penalty: lambda, in units of the mean of gram's diagonal.
        prior: [O, I]; zeros where not given.

    Returns:
        [O, I] in float32.
    """
    gram, cross = gram.double(), cross.double()
    # lambda I; relative to the inputs, so that one penalty means the same in every layer
    regular = gram + penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if prior is None:
        prior = torch.zeros(cross.shape[::-1], device=gram.device)
    prior = prior.double()
    # W = prior + D: then (X X^T + lambda) D^T = X Y^T - X X^T prior^T, and a large lambda gives the prior itself
    change: torch.Tensor = torch.linalg.solve(regular, cross - gram @ prior.T)
    return (prior + change.T).float()


def mean_square(states: torch.Tensor) -> torch.Tensor:
    """Return the mean square of each token's state, [..., 1], of states [..., H].

    Whatever reads a state stands behind a norm, which divides by its root. So a squared error counts by what it is
    relative to this. Else a few first tokens, whose states may be a hundred times as large as all others', would count
    ten thousand times.
    """
    return states.square().mean(dim=-1, keepdim=True).clamp(min=1e-30)


def scaled_off_diagonal(gram: torch.Tensor) -> torch.Tensor:
    """Multiply everything off the diagonal of a Gram matrix [I, I] by `OFF_DIAGONAL` (RegMean).

    >>> scaled_off_diagonal(torch.tensor([[4.0, 2.0], [2.0, 1.0]]))
    tensor([[4.0000, 1.8000],
            [1.8000, 1.0000]])
    """
    return OFF_DIAGONAL * gram + (1 - OFF_DIAGONAL) * torch.diag(gram.diagonal())


def prompt_rows(means: dict[int, torch.Tensor], inputs: torch.Tensor, experts: int) -> torch.Tensor:
    """Compute a router [E, H] from the mean router input [H] of each expert's prompts.

    What the means have in common moves all logits alike, so it is taken out; an expert without prompts gets zeros,
    the middle of the others. The scale is that of logits with a deviation of 1 over the prompts' tokens.

    Args:
        means: by the expert's number.
        inputs: of all prompts' tokens, [N, H].
    """
    # float64: differences of means that are nearly alike
    rows = torch.zeros(experts, inputs.shape[1], dtype=torch.float64, device=inputs.device)
    middle = torch.stack([mean.double() for mean in means.values()]).mean(dim=0)
    for expert, mean in means.items():
        rows[expert] = mean.double() - middle
    deviation = (inputs.double() @ rows.T).std()
    return (rows / deviation.clamp(min=1e-30)).float()


class Statistics:
    """What a pass over the texts collected: moments of inputs and targets. Kept in a folder, they are solved again
    without the texts: for another penalty, with which the lower layers were not fitted while it was collected.
    """

    def __init__(self, folder: Path | None, key: dict[str, Any]):
        """Open the statistics of an earlier fit in the folder, or prepare to keep new ones there.

        Raises:
            InputError: the folder holds those of something else.
        """
        self.folder, self.key = folder, key
        self.are_there = False
        if folder is None:
            return
        if (folder / _KEY_FILE).exists():
            recorded = read_json(folder / _KEY_FILE)
            differing = [name for name in key if recorded.get(name) != key[name]]
            if differing:
                found = f"they were collected with another {', '.join(differing)}"
                if "format" in differing:
                    found = "another version of btx-merge has collected them"
                remedy = "Give another --statistics, or remove this folder to collect them anew."
                raise InputError([Problem("statistics", str(folder), found, "", remedy)])
            self.are_there = True
        elif folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise InputError([Problem("statistics", str(folder), "something else", "a new or an empty folder")])
        else:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, collect: Callable[[], Moments]) -> Moments:
        """Return the moments of that name: those that are kept, or what `collect` returns, which is then kept."""
        file = self.folder / f"{name}.safetensors" if self.folder else None
        if self.are_there and file:
            return {key: tensor.clone() for key, tensor in load_file(file).items()}  # aligned as they were
        moments = collect()
        if file:
            save_file({key: tensor.cpu().contiguous() for key, tensor in moments.items()}, file)
        return moments

    def complete(self) -> None:
        """Mark the folder as complete: without the mark it is no folder of statistics."""
        if self.folder and not self.are_there:
            (self.folder / _KEY_FILE).write_text(json.dumps(self.key, indent=2), encoding="utf-8")
