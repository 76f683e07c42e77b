"""A merge beside its sources, whose folders its recipe knows by their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from btx_merge import MergeRecipe, merge
from tests.conftest import Family


@pytest.fixture(scope="session")
def measured(family: Family) -> Path:
    folder = family.seed.parent / "evaluated"
    merge(MergeRecipe(str(family.seed), family.experts), folder)
    return folder
