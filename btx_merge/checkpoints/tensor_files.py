"""Checkpoint files of either format, one or a folder of them."""

from __future__ import annotations

from pathlib import Path

from btx_merge.checkpoints.safetensors_file import read_safetensors
from btx_merge.checkpoints.stored import StoredTensor, file_problem
from btx_merge.checkpoints.torch_file import read_torch
from btx_merge.errors import InputError


def read_tensor_file(file: Path) -> dict[str, StoredTensor]:
    """Read where the tensors of a checkpoint file of either format lie."""
    try:
        return read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
    except OSError as error:
        raise InputError([file_problem(file, error.strerror or str(error), "a file that can be read")]) from error


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint's safetensors files, by its name.

    Raises:
        InputError: a file that cannot be read.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= read_tensor_file(file)
    return tensors
