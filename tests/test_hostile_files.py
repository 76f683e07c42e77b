"""Files that nobody vouches for: whatever lies in a folder, opening it ends well or in an `InputError`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from btx_merge.errors import BTXError, InputError
from btx_merge.folder_files import checked, is_plain_name, read_json
from btx_merge.hub import Located
from btx_merge.merged_model import open_merged
from btx_merge.recipe import ExpertSpec
from btx_merge.source_tensors import read_tensors
from btx_merge.sources import open_source
from btx_merge.tensorfiles import read_tensor_file
from btx_merge.textfiles import READERS, read_file
from tests.common import save_seed

QUICK = settings(max_examples=120, deadline=10_000, suppress_health_check=list(HealthCheck), database=None)
LONG = settings(QUICK, max_examples=12_000)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, 10**400, -1, 0, 2**63])
    | st.floats()
    | st.text()
    | st.sampled_from(["../../x", "/etc/passwd", "\ud800", "model.safetensors", "x" * 300, "F32", "llama", "btx"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def watched(call: Any, *arguments: Any) -> None:
    """Call something that may refuse; only our own errors, and within 10 seconds."""
    began = time.perf_counter()
    with contextlib.suppress(BTXError):
        call(*arguments)
    assert time.perf_counter() - began < 10


def mutated(draw: Any, content: bytes) -> bytes:
    """A valid file with bytes changed, cut out or put in."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(changed) - 1)))
        kind = draw(st.sampled_from(["set", "cut", "insert"]))
        if kind == "set" and changed:
            changed[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del changed[place : place + draw(st.integers(1, 200))]
        else:
            changed[place:place] = draw(st.binary(max_size=20))
    return bytes(changed)


def header(values: Any, data: bytes = b"\0" * 16) -> bytes:
    text = json.dumps(values).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seed(tmp_path_factory.mktemp("valid") / "seed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, valid: Path) -> Path:
    """A copy of a checkpoint, one of whose files each example overwrites."""
    copy = tmp_path_factory.mktemp("hostile") / "model"
    shutil.copytree(valid, copy)
    return copy


def with_file(folder: Path, valid: Path, name: str, content: bytes, call: Any) -> None:
    (folder / name).write_bytes(content)
    before = set(folder.parent.iterdir())
    try:
        watched(call)
        assert set(folder.parent.iterdir()) == before
    finally:
        (folder / name).unlink()
        if (valid / name).exists():
            shutil.copyfile(valid / name, folder / name)


def run_config(data: st.DataObject, folder: Path, valid: Path) -> None:
    values = json.loads((valid / "config.json").read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=3)):
        values[key] = data.draw(JSON)
    content = json.dumps(values).encode()
    if data.draw(st.booleans()):
        content = mutated(data.draw, content)
    with_file(
        folder, valid, "config.json", content, lambda: open_source("x", ExpertSpec(str(folder)), None, lambda: folder)
    )


def run_merged_config(data: st.DataObject, folder: Path, valid: Path) -> None:
    values = json.loads((valid / "config.json").read_text()) | {"model_type": "btx", "num_local_experts": 2}
    keys = [*sorted(values), "num_chunks", "expert_names", "num_experts_per_tok", "active_experts"]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        values[key] = data.draw(JSON)
    content = json.dumps(values).encode()
    with_file(folder, valid, "config.json", content, lambda: open_merged(Located(folder)))


def run_header(data: st.DataObject, folder: Path, valid: Path) -> None:
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F64", "X"]) | JSON,
            "shape": st.lists(st.integers(0, 2**70), max_size=20) | JSON,
            "data_offsets": st.lists(st.integers(-1, 2**70), max_size=3) | JSON,
        }
    )
    content = data.draw(
        st.one_of(
            st.dictionaries(st.text(max_size=5), entry | JSON, max_size=4).map(header),
            JSON.map(header),
            st.binary(max_size=60),
            st.just((valid / "model.safetensors").read_bytes()[:4000]),
        )
    )
    if data.draw(st.booleans()):
        content = mutated(data.draw, content)
    with_file(folder, valid, "x.safetensors", content, lambda: read_tensor_file(folder / "x.safetensors"))


def run_index(data: st.DataObject, folder: Path, valid: Path) -> None:
    names = st.text(max_size=8) | st.sampled_from(["../x", "/dev/zero", "x" * 300, "\ud800", "", ".", "model.bin"])
    values = data.draw(
        st.builds(lambda m: {"weight_map": m}, st.dictionaries(st.text(max_size=5), names) | JSON) | JSON
    )
    content = json.dumps(values).encode()
    if data.draw(st.booleans()):
        content = mutated(data.draw, content)
    name = "model.safetensors.index.json"
    weights = folder / "model.safetensors"
    weights.rename(folder / "away")
    try:
        with_file(folder, valid, name, content, lambda: read_tensors("x", folder))
    finally:
        (folder / "away").rename(weights)


def run_adapter(data: st.DataObject, folder: Path, valid: Path) -> None:
    content = json.dumps(data.draw(JSON)).encode()
    with_file(
        folder,
        valid,
        "adapter_config.json",
        content,
        lambda: open_source("x", ExpertSpec(str(folder)), None, lambda: folder),
    )


def run_text(data: st.DataObject, folder: Path, valid: Path) -> None:
    suffix = data.draw(st.sampled_from([name for name in READERS if name != ".parquet"]))
    lines = st.lists(JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30), max_size=4)
    content = b"\n".join(data.draw(lines))
    file = folder / f"x{suffix}"
    with_file(folder, valid, file.name, content, lambda: list(read_file("x", file)))


PARSERS = [run_config, run_merged_config, run_header, run_index, run_adapter, run_text]


@pytest.mark.parametrize("run", PARSERS)
def test_whatever_a_file_holds(run: Any, folder: Path, valid: Path) -> None:
    QUICK(given(st.data())(lambda data: run(data, folder, valid)))()


@pytest.mark.slow
@pytest.mark.parametrize("run", PARSERS)
def test_whatever_a_file_holds_many_times(run: Any, folder: Path, valid: Path) -> None:
    LONG(given(st.data())(lambda data: run(data, folder, valid)))()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "/a", "a\\b", "C:a", "a\0", "a\nb", "\ud800", "é" * 128]
)
def test_names_that_may_mean_another_place(name: str) -> None:
    assert not is_plain_name(name)
    assert is_plain_name("model-00001-of-00002.safetensors")


@pytest.mark.parametrize("name", ["config.json", "README.md", "chat_template.jinja", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "large", "loop"])
def test_files_that_are_not_what_they_seem(folder: Path, valid: Path, tmp_path: Path, name: str, kind: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(valid, model)
    (model / name).unlink(missing_ok=True)
    if kind == "link":
        (model / name).symlink_to("/etc/hostname")
    elif kind == "pipe":
        os.mkfifo(model / name)
    elif kind == "folder":
        (model / name).mkdir()
    elif kind == "loop":
        (model / name).symlink_to(name)
    else:
        with (model / name).open("wb") as file:
            file.truncate(100_000_000)
    with pytest.raises(InputError) as caught:
        open_source("x", ExpertSpec(str(model)), None, lambda: tmp_path)
    assert name in str(caught.value)
    with pytest.raises(InputError):
        checked(model / name)


@pytest.mark.parametrize(
    "text", ['{"x": "\\ud800"}', '{"x": 1' + "0" * 400 + "}", "[" * 100_000, '{"x": 1', "[]", "\xff"]
)
def test_json_that_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json"):
        read_json(tmp_path / "config.json")
