"""The package as others get it: sdist, wheel, console script, and the public names."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import btx_merge
from btx_merge.model.files import MODEL_CODE
from tests.support import warm

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def test_public_names():
    """A contract: what is added or removed here is so for everybody."""
    assert btx_merge.__all__ == [
        "BTXError",
        "BranchRecipe",
        "BranchTrainMerge",
        "Check",
        "DomainText",
        "EditRecipe",
        "EditReport",
        "EvalRecipe",
        "EvalReport",
        "ExpertSpec",
        "ExportReport",
        "FitRecipe",
        "FitReport",
        "InputError",
        "MergeError",
        "MergeInterrupted",
        "MergeRecipe",
        "ModelInfo",
        "NonFiniteError",
        "Options",
        "Problem",
        "PushReport",
        "Report",
        "Reporter",
        "RoutingRecipe",
        "RoutingReport",
        "TrainRecipe",
        "TrainReport",
        "branch",
        "check",
        "edit",
        "evaluate",
        "export",
        "extract",
        "fit",
        "info",
        "merge",
        "push",
        "routing",
        "train",
    ]
    for name in btx_merge.__all__:
        value = getattr(btx_merge, name)
        assert value.__name__ == name
        assert name in btx_merge._HOMES[value.__module__.removeprefix("btx_merge.")]
    assert sorted(name for names in btx_merge._HOMES.values() for name in names) == btx_merge.__all__


def test_the_package_imports_a_public_name_when_it_is_first_used():
    script = """
import sys
before = set(sys.modules)
import btx_merge
own = {name for name in sys.modules if name.startswith("btx_merge")}
assert own == {"btx_merge", "btx_merge._auto_classes"}, own
assert not {"typing", "numpy", "yaml", "importlib.abc"} & (set(sys.modules) - before)
assert set(btx_merge.__all__) <= set(dir(btx_merge))
assert "btx_merge.errors" not in sys.modules
from btx_merge import Problem
assert Problem is btx_merge.Problem and Problem.__module__ == "btx_merge.errors"
assert "btx_merge.merging.run" not in sys.modules
from btx_merge import *
assert merge is btx_merge.merge
try:
    btx_merge.mergee
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "module 'btx_merge' has no attribute 'mergee'\n"


def test_version():
    assert btx_merge.__version__ == version("btx-merge")


def built(kind: str, folder: Path, out: Path) -> Path:
    """What the build backend makes of a folder; pip would call the same."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built from a copy of the sources, so that nothing is left behind in them."""
    root = tmp_path_factory.mktemp("build")
    copy = root / "copy"
    copy.mkdir()
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, copy)
    for folder in ("btx_merge", "modeling"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return built("sdist", copy, root)


@pytest.fixture(scope="module")
def wheel(sdist):
    """Built from the unpacked sdist, which so is shown to be complete."""
    with tarfile.open(sdist) as archive:
        # Python 3.11.3 and older know no filter, 3.14 wants one.
        known: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(sdist.parent / "unpacked", **known)
    [folder] = (sdist.parent / "unpacked").iterdir()
    return built("wheel", folder, sdist.parent)


@pytest.fixture(scope="module")
def installed(wheel):
    """The wheel alone in a folder; what it depends on comes from this environment."""
    target = wheel.parent / "installed"
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *options, str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def test_sdist(sdist):
    name = f"btx_merge-{btx_merge.__version__}"
    assert sdist.name == f"{name}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = set(archive.getnames())
    for file in (
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "setup.cfg",
        "btx_merge/cli/app.py",
        "modeling/modeling_btx.py",
    ):
        assert f"{name}/{file}" in names


def test_wheel(wheel):
    name = f"btx_merge-{btx_merge.__version__}"
    assert wheel.name == f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(f"{name}.dist-info/METADATA"))
        licence = archive.read(f"{name}.dist-info/licenses/LICENSE").decode()
    assert {file.split("/")[0] for file in names} == {"btx_merge", f"{name}.dist-info"}
    ours = {file.relative_to(ROOT).as_posix() for file in (ROOT / "btx_merge").rglob("*.py")}
    ours |= {f"btx_merge/modeling/{file.name}" for file in (ROOT / "modeling").glob("*.py")}
    assert {file for file in names if file.endswith(".py")} == ours
    assert "btx_merge/py.typed" in names
    assert "btx_merge/inspecting/page.html" in names
    assert metadata["Name"] == "btx-merge"
    assert metadata["Version"] == btx_merge.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata["Requires-Python"].split(",")) == {">=3.10", "<3.14"}
    assert "Apache License" in licence
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {line.split(">")[0].split("<")[0] for line in needed} == {
        "einops",
        "filelock",
        "huggingface-hub",
        "numpy",
        "peft",
        "pyyaml",
        "rich",
        "safetensors",
        "sentencepiece",
        "torch",
        "transformers",
        "typer",
    }


SCRIPT = """
import importlib.util, json, sys
import btx_merge
from btx_merge.model.files import MODEL_CODE
from btx_merge import MergeRecipe, merge
from btx_merge.model.files import model_code_folder
merge(MergeRecipe(sys.argv[1], {"code": sys.argv[2]}), "out")
print(json.dumps({
    "package": btx_merge.__file__,
    "code": str(model_code_folder()),
    "top-level": importlib.util.find_spec("modeling") is not None,
    "torch": "torch" in sys.modules,
}))
"""
LOADING = """
import json, sys
import btx_merge
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("out")
print(json.dumps([type(model).__module__, sys.modules[type(model).__module__].__file__]))
"""


def test_the_installed_wheel_merges_and_loads(installed, family, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", SCRIPT, str(family.seed), str(family.code)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before = json.loads(done.stdout)
    assert before == {
        "package": str(installed / "btx_merge" / "__init__.py"),
        "code": str(installed / "btx_merge" / "modeling"),
        "top-level": False,
        "torch": False,  # a plain merge needs none of it
    }
    done = warm.run([sys.executable, "-c", LOADING], cwd=tmp_path, env=environment, level="transformers")
    assert done.returncode == 0, done.stderr
    after = json.loads(done.stdout)
    modeling = str(installed / "btx_merge" / "modeling" / "modeling_btx.py")
    assert after == ["btx_merge.modeling.modeling_btx", modeling]
    for name in MODEL_CODE:
        assert (tmp_path / "out" / name).read_bytes() == (ROOT / "modeling" / name).read_bytes()


def test_the_command_of_the_installed_wheel(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [str(installed / "bin" / "btx"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "merge" in done.stdout
    assert "check" in done.stdout
    where = "import btx_merge.cli.app; print(btx_merge.cli.app.__file__)"
    done = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(installed / "btx_merge" / "cli" / "app.py")
