from btx_merge import MergeRecipe, merge
from tests.common import assert_complete


def test_smoke(family, tmp_path):
    merge(MergeRecipe(str(family.seed), family.experts), tmp_path / "out")
    assert_complete(tmp_path / "out")
