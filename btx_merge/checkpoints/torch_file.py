"""torch's own file format, read without running its code or loading its data: where its tensors lie."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

from btx_merge.checkpoints.dtypes import TORCH_NAMES
from btx_merge.checkpoints.stored import FETCH_AGAIN, MAX_HEADER, StoredTensor, checked_file, file_problem
from btx_merge.errors import InputError, Problem
from btx_merge.reporting import first_line

_SAVE_AGAIN = "Save it as safetensors: load it in transformers and call save_pretrained."


def read_torch(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a `pytorch_model.bin` or `adapter_model.bin`, as ranges of the zip file that it is.

    torch's restricted unpickler (`weights_only`) reads the index under fake tensors: no code of the file
    runs, no data is loaded.

    Raises:
        InputError: not torch's zip format, something else than plain tensors in it, or truncated.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    names = {getattr(torch, torch_name): name for name, torch_name in TORCH_NAMES.items()}
    records = _uncompressed_records(checked_file(file))
    try:
        with FakeTensorMode():
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a bad file; each means the same to us
        found = f"torch cannot read it with weights_only ({first_line(error)})"
        raise InputError([file_problem(file, found, "", _SAVE_AGAIN)]) from error
    problems: list[Problem] = []
    tensors: dict[str, StoredTensor] = {}
    if not isinstance(loaded, dict):
        raise InputError([file_problem(file, f"holds a {type(loaded).__name__}", "names and tensors", _SAVE_AGAIN)])
    for name, tensor in loaded.items():
        if not isinstance(tensor, torch.Tensor) or not isinstance(name, str):
            kind = "tensor" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            found = f"{name!r} is a {kind}"
            problems.append(file_problem(file, found, "names and tensors", _SAVE_AGAIN))
            continue
        storage = tensor.untyped_storage() if tensor.layout == torch.strided else None
        offset = getattr(storage, "_checkpoint_offset", None)  # torch sets it where it loads no data
        if storage is None or offset is None or not tensor.is_contiguous():
            found = f"{name} does not lie in one piece (old format, or a transposed view)"
            problems.append(file_problem(file, found, "", _SAVE_AGAIN))
            continue
        if records.get(offset) != storage.nbytes():
            found = f"{name} takes {storage.nbytes():,} bytes, which do not lie plainly in the file"
            problems.append(file_problem(file, found, "", _SAVE_AGAIN))
        dtype = names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        start = offset + tensor.storage_offset() * tensor.element_size()
        nbytes = tensor.numel() * tensor.element_size()
        tensors[name] = StoredTensor(name, file, dtype, tuple(tensor.shape), start, nbytes)
    if problems:
        raise InputError(problems)
    return tensors


def _uncompressed_records(file: Path) -> dict[int, int]:
    """Return where each member of the zip file that is not compressed begins, and its size; nothing of another format.

    Raises:
        InputError: big-endian numbers, at which torch would crash under fake tensors; members besides the tensors'
            data that would fill the memory; a zip file that is broken.
    """
    out: dict[int, int] = {}
    try:
        if not zipfile.is_zipfile(file):  # which raises, too: of a file that says it is one of several
            return out
        with zipfile.ZipFile(file) as archive, file.open("rb") as handle:
            for member in archive.infolist():
                if "/data/" not in member.filename and member.file_size > MAX_HEADER:
                    found = f"{member.filename} announces {member.file_size:,} bytes"
                    raise InputError([file_problem(file, found, f"at most {MAX_HEADER:,}", _SAVE_AGAIN)])
                if member.filename.endswith("/byteorder") and archive.open(member).read(16) != b"little":
                    raise InputError([file_problem(file, "its numbers are big-endian", "little-endian", _SAVE_AGAIN)])
                handle.seek(member.header_offset + 26)  # the lengths of the name and of the extra field behind it
                name_length, extra_length = struct.unpack("<HH", handle.read(4))
                if member.compress_type == zipfile.ZIP_STORED:
                    out[member.header_offset + 30 + name_length + extra_length] = member.file_size
    except InputError:
        raise
    except Exception as error:  # zipfile and its decompressors raise many kinds; each means the same to us
        reason = str(error) or type(error).__name__
        raise InputError([file_problem(file, f"a broken zip file ({reason})", "", FETCH_AGAIN)]) from error
    return out
