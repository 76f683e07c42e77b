"""Files of tensors: found where they lie, and never believed."""

from __future__ import annotations

import json
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from btx_merge import InputError
from btx_merge.checkpoints.dtypes import to_float32
from btx_merge.checkpoints.stored import StoredTensor
from btx_merge.checkpoints.tensor_files import read_tensor_file

Header = dict[str, Any]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def some_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"matrix": (5, 3), "vector": (4,), "empty": (0, 3), "cube": (2, 3, 2)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def as_torch(tensor: StoredTensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows of a stored tensor, by the way that the merge reads them."""
    stop = tensor.shape[0] if stop is None else stop
    values = to_float32(tensor.read_rows(start, stop), tensor.dtype)
    return torch.from_numpy(values).reshape(stop - start, *tensor.shape[1:])


def write_raw(file: Path, header: Header | bytes, data: bytes, length: int | None = None) -> Path:
    """A safetensors file with exactly this header and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def refusal(file: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_tensor_file(file)
    lines = str(caught.value).split("\n")
    assert all(line.startswith(f"{file.parent.name}: {file.name}: ") for line in lines)
    assert len(lines) == len(caught.value.problems)  # one line each
    return "\n".join(line.removeprefix(f"{file.parent.name}: {file.name}: ") for line in lines)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("name", DTYPES)
def test_every_tensor_is_found(suffix: str, name: str, tmp_path: Path) -> None:
    tensors = some_tensors(DTYPES[name])
    file = tmp_path / f"weights.{suffix}"
    save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    stored = read_tensor_file(file)
    assert stored.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert (stored[key].dtype, stored[key].shape) == (name, tuple(tensor.shape))
        assert torch.equal(as_torch(stored[key]), tensor.float())
    assert torch.equal(as_torch(stored["matrix"], 2, 4), tensors["matrix"][2:4].float())
    assert torch.equal(as_torch(stored["cube"], 1, 2), tensors["cube"][1:2].float())


def test_bin_with_parameters_views_and_one_storage_for_two_names(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(4, 3)
    file = tmp_path / "pytorch_model.bin"
    torch.save({"whole": torch.nn.Parameter(whole), "tail": whole[2:], "again": whole}, file)
    stored = read_tensor_file(file)
    assert torch.equal(as_torch(stored["whole"]), whole)
    assert torch.equal(as_torch(stored["tail"]), whole[2:])
    assert torch.equal(as_torch(stored["again"]), whole)


def test_metadata_and_padding_of_a_header(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": entry}).encode() + b"     "
    stored = read_tensor_file(write_raw(tmp_path / "a.safetensors", header, b"\0\0\x80\x3f"))
    assert list(stored) == ["a"]
    assert as_torch(stored["a"]).tolist() == [1.0]


def entry(begin: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> Header:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


LIES: dict[str, tuple[Header | bytes, int, str]] = {  # header, bytes of data, what is said of it
    "gap": ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "the header puts b at byte {at:12}; expected byte {at:8}"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "the header puts b at byte {at:4}; expected byte {at:8}"),
    "the same place": (
        {"a": entry(0, 8), "b": entry(0, 8)},
        8,
        "the header puts b at byte {at:0}; expected byte {at:8}",
    ),
    "begins late": ({"a": entry(4, 12)}, 12, "the header puts a at byte {at:4}; expected byte {at:0}"),
    "too few bytes for the shape": (
        {"a": entry(0, 8, (3,))},
        8,
        "the header gives a 8 bytes; expected 12 for shape [3] in F32",
    ),
    "too many bytes for the shape": (
        {"a": entry(0, 16, (3,))},
        16,
        "the header gives a 16 bytes; expected 12 for shape [3] in F32",
    ),
    "shape beyond everything": (
        {"a": entry(0, 8, (2**62, 2**62))},
        8,
        "the header's entry for a is malformed: ",
    ),
    "longer than the file": ({"a": entry(0, 8)}, 4, "truncated: {size:4} bytes; expected {at:8}"),
    "far longer than the file": (
        {"a": entry(0, 4 * 10**12, (10**12,))},
        8,
        "truncated: {size:8} bytes; expected 4,000,000,",
    ),
    "shorter than the file": ({"a": entry(0, 8)}, 12, "4 bytes behind the last tensor; expected {at:8} bytes in all"),
    "no tensors but data": ({}, 3, "3 bytes behind the last tensor; expected {at:0} bytes in all"),
    "negative offset": ({"a": entry(-8, 0)}, 8, "the header's entry for a is malformed"),
    "ends before it begins": ({"a": entry(8, 0, (2,), "F8_E4M3")}, 8, "the header's entry for a is malformed"),
    "negative shape": ({"a": entry(0, 8, (-2,))}, 8, "the header's entry for a is malformed"),
    "truth as a number": ({"a": entry(False, True, (True,), "U8")}, 1, "the header's entry for a is malformed"),
    "offsets as text": ({"a": entry("0", "8")}, 8, "the header's entry for a is malformed"),
    "shape as text": ({"a": entry(0, 8, "2")}, 8, "the header's entry for a is malformed"),
    "dtype as a list": ({"a": entry(0, 8, (2,), ["F32"])}, 8, "the header's entry for a is malformed"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "the header's entry for a is malformed"),
    "entry that is no object": ({"a": 5}, 0, "the header's entry for a is malformed: 5"),
    "not JSON": (b"garbage!", 8, "unreadable header: Expecting value"),
    "not UTF-8": (b'{"\xff\xfe": 1}', 8, "unreadable header: 'utf-8' codec"),
    "a list": (b"[1, 2, 3]", 8, "unreadable header: it is no JSON object"),
    "nested without end": (b"[" * 100_000, 8, "unreadable header: "),
    "a name twice": (
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        b' "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        8,
        "unreadable header: the key a stands there twice",
    ),
    "a key twice in an entry": (
        b'{"a": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}',
        8,
        "unreadable header: the key shape stands there twice",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(lie: str, tmp_path: Path) -> None:
    header, count, said = LIES[lie]
    file = write_raw(tmp_path / "model.safetensors", header, b"\1" * count)
    start = file.stat().st_size - count
    for number in range(0, 20):
        said = said.replace(f"{{at:{number}}}", f"{start + number:,}").replace(
            f"{{size:{number}}}", f"{start + number:,}"
        )
    assert refusal(file).startswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes, not even a header"),
        (b"\x08\0\0", "3 bytes, not even a header"),
        ((16).to_bytes(8, "little") + b"{}", "10 bytes, too few for the 16 bytes of header that it announces"),
        ((2**63).to_bytes(8, "little") + b"{}", f"10 bytes, too few for the {2**63:,} bytes of header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "56 bytes, too few for the "),
    ],
)
def test_headers_longer_than_the_file(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    found = refusal(file)
    assert found.startswith(said)
    assert found.endswith("Download or copy the file again.")


def test_all_lies_of_a_file_in_one_report(tmp_path: Path) -> None:
    header = {"a": entry(0, 8, (3,)), "b": entry(12, 20), "c": 5, "d": entry(20, 40, (5,))}
    found = refusal(write_raw(tmp_path / "model.safetensors", header, b"\0" * 24)).split("\n")
    assert [line.split(" at ")[0].split(" 8 bytes")[0].split(":")[0] for line in found] == [
        "the header's entry for c is malformed",
        "the header gives a",
        "the header puts b",
        "truncated",
    ]


@pytest.mark.parametrize("cut", [1, 7, 40, 100])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_truncated_files(suffix: str, cut: int, tmp_path: Path) -> None:
    file = tmp_path / f"weights.{suffix}"
    tensors = {"a": torch.ones(100)}
    save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    file.write_bytes(file.read_bytes()[:-cut])
    found = refusal(file)
    if suffix == "safetensors":
        assert found.startswith("truncated: ")
    else:
        assert found.startswith("torch cannot read it with weights_only (")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(10, 4)}, file)
    tensor = read_tensor_file(file)["a"]
    file.write_bytes(file.read_bytes()[:-8])
    assert as_torch(tensor, 0, 9).shape == (9, 4)
    with pytest.raises(
        InputError, match=r"model\.safetensors: ends inside tensor a\. Download or copy the file again"
    ):
        tensor.read_rows(0, 10)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_in_place_of_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert "a folder; expected a plain file" in refusal(tmp_path / name)


class Malicious:
    """Unpickled without restriction, it creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("form", ["zip", "old torch", "plain pickle"])
def test_a_malicious_pickle_is_refused_and_does_not_run(form: str, tmp_path: Path) -> None:
    file, marker = tmp_path / "pytorch_model.bin", tmp_path / "it-ran"
    content = {"model.norm.weight": torch.ones(2), "evil": Malicious(marker)}
    if form == "plain pickle":
        file.write_bytes(pickle.dumps(Malicious(marker), protocol=2))
        pickle.loads(file.read_bytes())
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
        torch.load(file, weights_only=False)
    assert marker.exists()  # so this test is able to fail
    marker.unlink()
    found = refusal(file)
    assert found.startswith("torch cannot read it with weights_only (")
    assert found.endswith("Save it as safetensors: load it in transformers and call save_pretrained.")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([torch.ones(2)], "holds a list; expected names and tensors"),
        ({"state_dict": {"a": torch.ones(2)}}, "'state_dict' is a dict; expected names and tensors"),
        ({"a": torch.ones(2), "step": 5}, "'step' is a int; expected names and tensors"),
        ({5: torch.ones(2)}, "5 is a tensor; expected names and tensors"),
        ({"a": torch.arange(6.0).reshape(2, 3).T}, "a does not lie in one piece (old format, or a transposed view)"),
        ({"a": torch.eye(3).to_sparse()}, "a does not lie in one piece (old format, or a transposed view)"),
    ],
)
def test_bin_files_that_hold_something_else(content: Any, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    found = refusal(tmp_path / "pytorch_model.bin")
    assert found == f"{said}. Save it as safetensors: load it in transformers and call save_pretrained."


def test_bin_of_the_old_format_is_refused(tmp_path: Path) -> None:
    """Its tensors have no fixed places that torch would tell."""
    torch.save({"a": torch.ones(2)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    assert refusal(tmp_path / "a.bin").startswith("a does not lie in one piece (old format")


def rezip(source: Path, target: Path, compression: int, change: dict[str, bytes]) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for member in old.infolist():
            last = member.filename.split("/", 1)[1]
            new.writestr(member.filename, change.get(last, old.read(member)))


def test_bin_whose_data_is_not_what_its_index_says(tmp_path: Path) -> None:
    """torch finds the tensor's place from the zip file, but not whether its bytes lie there as they are."""
    plain = tmp_path / "plain.bin"
    torch.save({"a": torch.arange(64.0)}, plain)
    rezip(plain, tmp_path / "same.bin", zipfile.ZIP_STORED, {})
    assert as_torch(read_tensor_file(tmp_path / "same.bin")["a"]).tolist() == list(range(64))
    rezip(plain, tmp_path / "compressed.bin", zipfile.ZIP_DEFLATED, {})
    rezip(plain, tmp_path / "short.bin", zipfile.ZIP_STORED, {"data/0": b"\0" * 128})
    rezip(plain, tmp_path / "big-endian.bin", zipfile.ZIP_STORED, {"byteorder": b"big"})
    for name in ("compressed", "short"):
        assert refusal(tmp_path / f"{name}.bin").startswith("a takes 256 bytes, which do not lie plainly in the file")
    assert refusal(tmp_path / "big-endian.bin").startswith("its numbers are big-endian; expected little-endian")


def zip_with(target: Path, record: str, content: bytes, compression: int) -> Path:
    """A torch file one of whose records is another, compressed."""
    plain = target.with_name("plain.bin")
    torch.save({"a": torch.arange(64.0)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            is_it = member.filename.endswith("/" + record)
            new.writestr(member, content if is_it else old.read(member), compression if is_it else None)
    return target


@pytest.mark.parametrize("record", ["byteorder", "data.pkl", "version"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_bin_whose_records_unpack_to_much_more(record: str, compression: int, tmp_path: Path) -> None:
    """A file of some KB; reading it takes no more memory than that."""
    file = zip_with(tmp_path / "a.bin", record, bytes(30_000_000), compression)
    assert file.stat().st_size < 200_000
    tracemalloc.start()
    found = refusal(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"/{record} announces 30,000,000 bytes" in found
    assert peak < 5_000_000


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("damage", ["other bytes", "cut off", "encrypted", "unknown method"])
def test_bin_whose_byte_order_cannot_be_unpacked(compression: int, damage: str, tmp_path: Path) -> None:
    file = zip_with(tmp_path / "a.bin", "byteorder", b"little" * 2, compression)
    with zipfile.ZipFile(file) as archive:
        member = next(item for item in archive.infolist() if item.filename.endswith("/byteorder"))
        entry = archive.start_dir
    content = bytearray(file.read_bytes())
    data = member.header_offset + 30 + int.from_bytes(content[member.header_offset + 26 :][:2], "little")
    data += int.from_bytes(content[member.header_offset + 28 :][:2], "little")
    if damage == "other bytes":
        content[data : data + member.compress_size] = b"\xff" * member.compress_size
    elif damage == "cut off":  # the sizes in both headers say so too
        for place in (member.header_offset + 18, content.index(member.filename.encode(), entry) - 46 + 20):
            content[place : place + 4] = (member.compress_size // 2).to_bytes(4, "little")
    else:
        place, bits = (6, 1) if damage == "encrypted" else (8, 77)
        for where in (member.header_offset + place, content.index(member.filename.encode(), entry) - 46 + place + 2):
            content[where] = bits
    file.write_bytes(content)
    found = refusal(file)
    assert found.startswith(("a broken zip file (", "its numbers are big-endian")), found


def test_bin_that_is_one_of_several_disks(tmp_path: Path) -> None:
    """At which zipfile raises already where it is asked whether this is a zip file."""
    file = tmp_path / "a.bin"
    torch.save({"a": torch.arange(64.0)}, file)
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x06\x07") + 4] = 1  # the number of the disk in the ZIP64 locator
    file.write_bytes(content)
    assert refusal(file).startswith("a broken zip file (zipfiles that span multiple disks are not supported)")


def many(kind: str, count: int = 10_000) -> Header:
    if kind == "malformed":
        return {f"t{number}": {} for number in range(count)}
    if kind == "of one place":
        return {f"t{number}": entry(0, 8) for number in range(count)}
    return {f"t{number}": entry(8 * number, 8 * number + 8, (9,)) for number in range(count)}


@pytest.mark.parametrize("kind", ["malformed", "of one place", "of another size"])
def test_very_many_lies_are_told_in_a_few_lines(kind: str, tmp_path: Path) -> None:
    found = refusal(write_raw(tmp_path / "model.safetensors", many(kind), b""))
    assert found.count("\n") < 10
    assert len(found) < 5_000
    assert "more like these" in found


def test_a_header_longer_than_any_that_is_meant(tmp_path: Path) -> None:
    """It lies in the file as announced, but to read it would take much memory."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((30_000_000).to_bytes(8, "little"))
        file.truncate(30_000_008)
    assert refusal(tmp_path / "model.safetensors").startswith("a header of 30,000,000 bytes; expected at most 25,000,")


class Beyond:
    """A tensor that claims more numbers than its storage has."""

    def __init__(self, count: int, offset: int):
        self.arguments = (torch.ones(4)._typed_storage(), offset, (count,), (1,), False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.parametrize(("count", "offset"), [(5, 0), (4, 1), (10**12, 0), (1, 10**12), (1, -1)])
def test_bin_with_a_tensor_larger_than_its_storage(count: int, offset: int, tmp_path: Path) -> None:
    torch.save({"a": Beyond(count, offset), "b": torch.ones(100)}, tmp_path / "a.bin")
    found = refusal(tmp_path / "a.bin")
    assert found.startswith("a takes ") or found.startswith("torch cannot read it with weights_only (")


def test_other_dtypes_keep_their_name(tmp_path: Path) -> None:
    """They are refused later, by the checks, with the tensor named."""
    tensors = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(3).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.bin")
    found = {name: tensor.dtype for name, tensor in read_tensor_file(tmp_path / "a.safetensors").items()}
    assert found == {"a": "I8", "b": "F8_E4M3"}
    found = {name: tensor.dtype for name, tensor in read_tensor_file(tmp_path / "a.bin").items()}
    assert found == {"a": "int8", "b": "float8_e4m3fn"}
