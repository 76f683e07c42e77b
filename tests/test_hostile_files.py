"""Files that nobody vouches for: whatever lies in a folder, opening it ends well or in an `InputError`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from btx_merge import EditRecipe, MergeRecipe, Options, edit, export, merge
from btx_merge.checkpoints.tensor_files import read_tensor_file
from btx_merge.errors import BTXError, InputError, MergeError
from btx_merge.files.folder import checked, is_plain_name, read_json
from btx_merge.model.merged import open_merged
from btx_merge.sources.locate import Located
from btx_merge.sources.opening import open_source
from btx_merge.sources.source import ExpertSpec
from btx_merge.sources.tensors import read_tensors
from btx_merge.texts.readers import READERS, read_file
from tests.support.common import Told, files_of, grow, save_seed

LIMIT_S = 10
LIMIT_BYTES = 3_000_000_000
"""Of address space that one call may take beyond what the process has: threads reserve much that they never use."""
SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)

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


class TooSlow(BaseException):
    """No `except Exception` keeps it from the test."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Ends what takes too long, and lets what takes too much memory fail."""

    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if Path("/proc/self/statm").exists():
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + LIMIT_BYTES, hard))
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


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


def with_changes(data: st.DataObject, values: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """The values with some keys set to anything."""
    return {**values, **{key: data.draw(JSON) for key in data.draw(st.lists(st.sampled_from(keys), max_size=3))}}


@dataclass(frozen=True)
class Room:
    """Where hostile folders lie, beside what must stay as it is."""

    root: Path
    seed: Path
    code: Path
    checkpoint: Path
    """A copy of the seed, one of whose files each example overwrites; so are the next two."""
    merged: Path
    adapter: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    def state(self, besides: Path) -> set[tuple[str, int, int]]:
        """Every file but that one and what an example may write, with its size and time."""
        files = {path for path in self.root.rglob("*") if path.is_file() and path != besides}
        stats = {(path.relative_to(self.root), path.stat()) for path in files}
        return {(str(path), s.st_size, s.st_mtime_ns) for path, s in stats if not path.parts[0].startswith("out")}

    def try_file(self, file: Path, content: bytes, call: Callable[[], Any]) -> None:
        """Call something with a file overwritten: it succeeds or raises one of our errors, and leaves all else."""
        before = file.read_bytes() if file.exists() else None
        state = self.state(file)
        file.write_bytes(content)
        try:
            with limited(), contextlib.suppress(BTXError):
                call()
            assert self.state(file) == state
        finally:
            file.unlink()
            if before is not None:
                file.write_bytes(before)
            for path in self.root.glob("out*"):
                shutil.rmtree(path)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    root = tmp_path_factory.mktemp("hostile")
    seed = save_seed(root / "seed")
    code = grow(seed, root / "code")
    shutil.copytree(seed, root / "checkpoint")
    merge(MergeRecipe(str(seed), {"code": str(code)}), root / "merged")
    targets = ["q_proj", "down_proj", "embed_tokens"]
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM.from_pretrained(seed), lora).save_pretrained(root / "adapter")
    return Room(root, seed, code, root / "checkpoint", root / "merged", root / "adapter")


@pytest.fixture(scope="module")
def valid(room: Room) -> Path:
    return room.seed


def run_config(data: st.DataObject, room: Room) -> None:
    file = room.checkpoint / "config.json"
    values = json.loads(file.read_text())
    content = json.dumps(with_changes(data, values, sorted(values))).encode()
    if data.draw(st.booleans()):
        content = mutated(data.draw, content)
    room.try_file(file, content, lambda: open_source("x", ExpertSpec(str(room.checkpoint)), None, lambda: room.out))


def run_merged_config(data: st.DataObject, room: Room) -> None:
    file = room.merged / "config.json"
    values = json.loads(file.read_text())
    content = json.dumps(with_changes(data, values, [*sorted(values), "active_experts"])).encode()
    room.try_file(file, content, lambda: open_merged(Located(room.merged)))


def run_header(data: st.DataObject, room: Room) -> None:
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
            st.just((room.seed / "model.safetensors").read_bytes()[:4000]),
        )
    )
    if data.draw(st.booleans()):
        content = mutated(data.draw, content)
    file = room.checkpoint / "x.safetensors"
    room.try_file(file, content, lambda: read_tensor_file(file))


def run_torch(data: st.DataObject, room: Room) -> None:
    """A zip file with its bytes changed, or one whose members are changed and packed again, perhaps compressed."""
    buffer, content = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.arange(6.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}, buffer)
    changed = buffer.getvalue()
    if data.draw(st.booleans()):
        changed = mutated(data.draw, changed)
    else:
        method = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
        with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(content, "w") as new:
            for member in old.infolist():
                stored = old.read(member)
                if stored and data.draw(st.booleans()):
                    stored = mutated(data.draw, stored)
                new.writestr(member, stored, data.draw(method))
        changed = content.getvalue()
    file = room.checkpoint / "pytorch_model.bin"
    room.try_file(file, changed, lambda: read_tensor_file(file))


def run_index(data: st.DataObject, room: Room) -> None:
    names = st.text(max_size=8) | st.sampled_from(["../x", "/dev/zero", "x" * 300, "\ud800", "", ".", "model.bin"])
    values = data.draw(
        st.builds(lambda m: {"weight_map": m}, st.dictionaries(st.text(max_size=5), names) | JSON) | JSON
    )
    content = json.dumps(values).encode()
    if data.draw(st.booleans()):
        content = mutated(data.draw, content)
    weights, file = room.checkpoint / "model.safetensors", room.checkpoint / "model.safetensors.index.json"
    weights.rename(room.checkpoint / "away")
    try:
        room.try_file(file, content, lambda: read_tensors("x", room.checkpoint))
    finally:
        (room.checkpoint / "away").rename(weights)


def open_adapter_of(room: Room) -> None:
    seed = open_source("seed", ExpertSpec(str(room.seed)), None, lambda: room.out)

    def scratch() -> Path:
        room.out.mkdir(exist_ok=True)
        return room.out

    source = open_source("x", ExpertSpec(str(room.adapter)), seed, scratch)
    for name in source.deltas:
        source.rows(name, 0, 2)


def run_adapter(data: st.DataObject, room: Room) -> None:
    file = room.adapter / "adapter_config.json"
    values = json.loads(file.read_text())
    keys = [*sorted(values), "alpha_pattern", "rank_pattern", "target_modules", "lora_alpha", "r"]
    content = json.dumps(with_changes(data, values, keys)).encode()
    room.try_file(file, content, lambda: open_adapter_of(room))


def run_adapter_weights(data: st.DataObject, room: Room) -> None:
    """Tensors under other names, of other shapes or kinds, or gone; the file itself is right."""
    file = room.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    words = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=5)
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
        tensor = tensors.pop(name)
        if data.draw(st.booleans()):
            kind = data.draw(st.sampled_from([torch.float32, torch.int8, torch.float64, torch.bool]))
            tensor = torch.zeros(data.draw(st.lists(st.integers(0, 5), max_size=3)), dtype=kind)
        part = data.draw(st.sampled_from(["lora_A", "layers", "base_model.", "weight", "nothing of it"]))
        other = data.draw(st.sampled_from(names)) if data.draw(st.booleans()) else name
        if data.draw(st.booleans()):
            tensors[other.replace(part, data.draw(words))] = tensor
    room.try_file(file, save(tensors), lambda: open_adapter_of(room))


def run_text(data: st.DataObject, room: Room) -> None:
    suffix = data.draw(st.sampled_from([name for name in READERS if name != ".parquet"]))
    lines = st.lists(JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30), max_size=4)
    file = room.root / f"x{suffix}"
    room.try_file(file, b"\n".join(data.draw(lines)), lambda: list(read_file("x", file)))


def run_parquet(data: st.DataObject, room: Room) -> None:
    import pyarrow
    from pyarrow import parquet

    written, file = io.BytesIO(), room.root / "x.parquet"
    parquet.write_table(pyarrow.table({"text": ["some words"] * 20, "number": list(range(20))}), written)
    content = mutated(data.draw, written.getvalue())
    room.try_file(file, content, lambda: list(read_file("x", file)))


def run_generation(data: st.DataObject, room: Room) -> None:
    file = room.checkpoint / "generation_config.json"
    keys = ["eos_token_id", "bos_token_id", "pad_token_id", "temperature", "max_length", "do_sample", "x"]
    content = json.dumps(with_changes(data, json.loads(file.read_text()), keys)).encode()
    if data.draw(st.booleans()):
        content = mutated(data.draw, content)
    recipe = MergeRecipe(str(room.checkpoint), {"code": str(room.code)})
    room.try_file(file, content, lambda: merge(recipe, room.out, Options(workers=1)))


def run_recipe(data: st.DataObject, room: Room) -> None:
    file = room.merged / "btx_recipe.yaml"
    values = yaml.safe_load(file.read_text())
    keys = [*sorted(values), "edits", "training", "fits", "shared_over", "experts"]
    content = yaml.safe_dump(with_changes(data, values, keys), sort_keys=False).encode("utf-8", "surrogatepass")
    if data.draw(st.booleans()):
        content = mutated(data.draw, content)
    recipe = EditRecipe(str(room.merged), replace={"code": str(room.code)}, num_experts_per_tok=1)
    room.try_file(file, content, lambda: edit(recipe, room.out, Options(workers=1)))


def run_export(data: st.DataObject, room: Room) -> None:
    """The whole way, from a config that anybody wrote to an export's files and to an edit's."""
    file = room.merged / "config.json"
    values = json.loads(file.read_text())
    content = json.dumps(with_changes(data, values, [*sorted(values), "active_experts"])).encode()
    if data.draw(st.booleans()):
        room.try_file(file, content, lambda: export(str(room.merged), room.out, Options(workers=1)))
    else:
        recipe = EditRecipe(str(room.merged), rename={"code": "python"})
        room.try_file(file, content, lambda: edit(recipe, room.out, Options(workers=1)))


def unfinished(room: Room, recipe: MergeRecipe) -> Path:
    """What a merge that a full disk stopped has left, made once."""
    folder = room.root / "unfinished"
    if not folder.exists():
        done = 0

        def fill_the_disk(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if done > 200_000:
                raise OSError(28, "No space left on device")

        with pytest.raises(MergeError):
            merge(recipe, room.out, Options(workers=1), reporter=Told(bytes_done=fill_the_disk))
        room.out.with_name("out.btx-partial").rename(folder)
        merge(recipe, room.root / "whole")
    return folder


def run_journal(data: st.DataObject, room: Room) -> None:
    """Whatever the journal says of what is finished, the result is the one of an undisturbed merge."""
    recipe = MergeRecipe(str(room.seed), {"code": str(room.code)})
    left, partial = unfinished(room, recipe), room.root / "out.btx-partial"
    journal = next(left.glob("btx_journal*")).name
    first, *lines = (left / journal).read_bytes().splitlines()
    keys = [json.loads(line)["job"] for line in lines]
    entry = st.builds(lambda job, crc: {"job": job, "crc32": crc}, st.sampled_from(keys) | JSON, JSON) | JSON
    text = entry.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20) | st.just(b"[" * 100_000)
    added = data.draw(st.lists(text, max_size=6))
    first = data.draw(st.sampled_from([first, first, first, b"[" * 100_000]))
    contents = {journal: b"\n".join([first, *data.draw(st.permutations([*lines, *added])), b""])}
    contents |= {shard.name: shard.read_bytes() for shard in left.glob("*.safetensors")}
    for name in data.draw(st.lists(st.sampled_from(sorted(contents)), unique=True)):
        contents[name] = mutated(data.draw, contents[name])
    shutil.copytree(left, partial)
    for name, content in contents.items():
        (partial / name).write_bytes(content)

    def continued() -> None:
        merge(recipe, room.out, Options(workers=1))
        assert files_of(room.out) == files_of(room.root / "whole")

    room.try_file(room.root / "unused", b"", continued)


CASES: dict[Callable[[st.DataObject, Room], None], tuple[int, int]] = {  # in `make test`, and in `make slow`
    run_config: (140, 14_000),
    run_merged_config: (80, 13_000),
    run_header: (120, 20_000),
    run_torch: (100, 8_000),
    run_index: (120, 14_000),
    run_text: (120, 14_000),
    run_parquet: (60, 4_000),
    run_adapter: (60, 9_400),
    run_adapter_weights: (40, 1_600),
    run_generation: (40, 500),
    run_recipe: (40, 500),
    run_export: (40, 500),
    run_journal: (40, 500),
}
"""A thousand and a hundred thousand in all."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("run", CASES)
def test_whatever_a_file_holds(run: Any, room: Room) -> None:
    settings(SETTINGS, max_examples=CASES[run][0])(given(st.data())(lambda data: run(data, room)))()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("run", CASES)
def test_whatever_a_file_holds_many_times(run: Any, room: Room) -> None:
    settings(SETTINGS, max_examples=CASES[run][1])(given(st.data())(lambda data: run(data, room)))()


def test_the_limits_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the tests above are able to fail."""
    with pytest.raises(MemoryError), limited():
        bytearray(LIMIT_BYTES + 1_000_000_000)
    monkeypatch.setattr("tests.test_hostile_files.LIMIT_S", 1)
    with pytest.raises(TooSlow), limited():
        time.sleep(5)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "/a", "a\\b", "C:a", "a\0", "a\nb", "\ud800", "é" * 128]
)
def test_names_that_may_mean_another_place(name: str) -> None:
    assert not is_plain_name(name)
    assert is_plain_name("model-00001-of-00002.safetensors")


@pytest.mark.parametrize("name", ["config.json", "README.md", "chat_template.jinja", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "large", "loop"])
def test_files_that_are_not_what_they_seem(valid: Path, tmp_path: Path, name: str, kind: str) -> None:
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
