"""The routers of a fresh merge."""

import numpy as np
import torch

from btx_merge import MergeRecipe, merge
from btx_merge.merging.experts import initial_router
from tests.support.common import HIDDEN, LAYERS, tensors_of

LAYER = "model.layers.{}.mlp.gate.weight"


def test_routers_are_normal_and_every_layer_has_its_own():
    recipe = MergeRecipe("seed", {"a": "a"}, random_seed=5)
    router = initial_router(recipe, 0, 500, 1000, std=0.02)
    assert router.shape == (500, 1000)
    assert router.dtype == np.float32
    # of 500,000 values: five standard errors of the mean and of the deviation
    assert abs(router.mean()) < 5 * 0.02 / np.sqrt(router.size)
    assert abs(router.std() - 0.02) < 5 * 0.02 / np.sqrt(2 * router.size)
    beyond = np.mean(np.abs(router) > 0.04)  # a normal variable leaves two deviations 4.55 % of the time
    assert abs(beyond - 0.0455) < 5 * np.sqrt(0.0455 * 0.9545 / router.size)
    assert np.abs(np.corrcoef(router[:20]) - np.eye(20)).max() < 5 / np.sqrt(1000)
    other_layer = initial_router(recipe, 1, 500, 1000, std=0.02)
    assert abs(np.corrcoef(router.ravel(), other_layer.ravel())[0, 1]) < 5 / np.sqrt(router.size)


def test_routers_are_the_same_in_years():
    """numpy promises RandomState's stream; these are its first numbers for seed [3, 1]."""
    router = initial_router(MergeRecipe("seed", {"a": "a"}, random_seed=3), 1, 2, 2, std=1.0)
    expected = [[1.7919541597366333, 1.4370195865631104], [0.89842689037323, -0.16526012122631073]]
    assert router.tolist() == expected


def test_routers_in_the_result(family, tmp_path):
    merge(MergeRecipe(str(family.seed), family.experts), tmp_path / "default")
    merge(MergeRecipe(str(family.seed), family.experts, router_std=0.5), tmp_path / "wide")
    merge(MergeRecipe(str(family.seed), family.experts, router_init="zeros"), tmp_path / "zeros")
    default, wide, zeros = (tensors_of(tmp_path / name) for name in ("default", "wide", "zeros"))
    for layer in range(LAYERS):
        name = LAYER.format(layer)
        assert default[name].shape == (3, HIDDEN)
        assert 0.016 < default[name].std() < 0.024  # initializer_range 0.02; 192 values: four standard errors
        torch.testing.assert_close(wide[name], default[name] * 25, atol=0, rtol=1e-6)  # 0.5 / 0.02
        assert not zeros[name].any()
    first, second = (default[LAYER.format(layer)] for layer in (0, 1))
    assert not torch.equal(first, second)
