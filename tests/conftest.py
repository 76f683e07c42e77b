"""Fixtures. Nothing here or in any test needs the internet, a GPU or a token."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face is imported
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other

import gc
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from btx_merge import MergeRecipe, merge
from tests.support import pictures, warm


@dataclass(frozen=True)
class Family:
    """A seed and two experts grown from it, float32, untied."""

    seed: Path
    code: Path
    math: Path

    @property
    def experts(self) -> dict[str, str]:
        return {"code": str(self.code), "math": str(self.math)}


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector, which every training calls, need not look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _unpainted() -> Iterator[None]:
    with pictures.unpainted():
        yield


@pytest.fixture
def painted() -> Iterator[None]:
    """For a test that looks at a picture, or whose picture is like no other test's."""
    with pictures.painted():
        yield


@pytest.fixture(scope="session", autouse=True)
def _warm_processes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The servers of `warm` are common to all workers of a run."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "warm"
    folder.mkdir(exist_ok=True)
    warm.use_folder(folder)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Built once; tests that change a checkpoint copy it first."""
    from tests.support.common import (  # imports torch, which the process that only starts others needs not
        grow,
        save_seed,
    )

    root = tmp_path_factory.mktemp("family")
    seed = save_seed(root / "llama-seed")
    code = grow(seed, root / "llama-code", random_seed=1)
    math = grow(seed, root / "llama-math", random_seed=2, max_shard_size="100KB")  # sharded
    return Family(seed, code, math)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two domains of words of their own."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    for name, first in (("code", 0), ("math", 60)):
        rows = [[f"w{first + rng.randint(0, 50)}" for _ in range(rng.randint(5, 40))] for _ in range(120)]
        lines = "".join(json.dumps({"text": " ".join(row)}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return {name: str(folder / f"{name}.jsonl") for name in ("code", "math")}


@pytest.fixture(scope="session")
def merged(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of the family, in several files."""
    folder = tmp_path_factory.mktemp("merged") / "merged"
    merge(MergeRecipe(str(family.seed), family.experts, max_shard_size="300KB"), folder)
    return folder


@pytest.fixture
def folder_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Give the folder in which transformers keeps code that lies beside a model and is run in this process.

    transformers reads the variable for it once, when it is imported. It appends the folder to `sys.path`, where
    another one that came before would be searched for its modules, so all of it ends with the test.
    """
    from transformers import dynamic_module_utils

    def imported() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]

    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    for name in imported():
        monkeypatch.delitem(sys.modules, name)
    yield folder
    for name in imported():
        del sys.modules[name]


@pytest.fixture
def loaded_here(monkeypatch: pytest.MonkeyPatch, folder_code: Path) -> None:
    """Load what is published in this process, for another one takes seconds to import torch."""
    from btx_merge.publishing import checks, load_alone

    monkeypatch.setattr(checks, "_load", lambda folder: load_alone.load(str(folder)))
