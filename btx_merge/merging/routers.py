"""The routers of a fresh merge: one [E, H] matrix per layer, stored in the checkpoint, not left to chance at load."""

from __future__ import annotations

import numpy as np

from btx_merge.checkpoints.dtypes import Float32
from btx_merge.merging.recipe import MergeRecipe


def initial_router(recipe: MergeRecipe, layer: int, num_experts: int, hidden_size: int, std: float) -> Float32:
    """Return a router [E, H]: rows of experts, columns of the norm's output.

    random: normal(0, std). Behind an RMSNorm |x| is about sqrt(H), so std = 0.02 gives logits of about 1 for
    H = 2048; std = 1 would send every token to one expert with certainty. Otherwise zeros: all experts tie.
    RandomState's stream is frozen by numpy's policy, so that a recipe gives the same bytes in years.
    """
    shape = (num_experts, hidden_size)
    if recipe.router_init != "random":
        return np.zeros(shape, np.float32)
    values = np.random.RandomState([recipe.random_seed, layer]).standard_normal(shape)
    return (std * values).astype(np.float32)
