"""A merged checkpoint in a folder, read tensor by tensor and changed in place."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from btx_merge.checkpoints.dtypes import all_finite, from_float32, to_float32
from btx_merge.checkpoints.tensor_files import stored_tensors
from btx_merge.errors import NonFiniteError

_SAMPLE_ROWS = 16
"""Rows of each tensor by which a checkpoint is known again: any training changes them, and they are soon read."""


class Checkpoint:
    """The tensors of a folder's safetensors files, by name. Values come and go in float32."""

    def __init__(self, folder: Path, device: torch.device):
        """Open all files of weights in the folder."""
        self.folder, self.device = folder, device
        self.tensors = stored_tensors(folder)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows [start, stop) of a tensor, all by default. Exact."""
        tensor = self.tensors[name]
        stop = tensor.shape[0] if stop is None else stop
        values = to_float32(tensor.read_rows(start, stop), tensor.dtype)
        return torch.from_numpy(values.reshape(stop - start, *tensor.shape[1:])).to(self.device)

    def write(self, name: str, values: torch.Tensor, start: int = 0) -> None:
        """Put rows in their place, rounded once to the dtype that the tensor has there.

        Raises:
            NonFiniteError: a value is NaN, Inf or outside of the dtype's range.
        """
        tensor = self.tensors[name]
        raw = from_float32(values.float().cpu().numpy(), tensor.dtype)
        if not all_finite(raw, tensor.dtype):
            raise NonFiniteError(f"{name}: a fitted value is not finite in {tensor.dtype}. Give more text.")
        with tensor.file.open("r+b") as stream:
            stream.seek(tensor.start + start * tensor.row_bytes)
            stream.write(raw.tobytes())

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Return all tensors of a layer, by their names in it."""
        prefix = f"model.layers.{index}."
        return {name.removeprefix(prefix): self.read(name) for name in self.tensors if name.startswith(prefix)}

    def digest(self) -> str:
        """Tell checkpoints apart by names, shapes and the first rows of every tensor but the routers."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.tensors.items()):
            if not name.endswith(".mlp.gate.weight"):
                digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
                digest.update(tensor.read_rows(0, min(_SAMPLE_ROWS, tensor.shape[0])).tobytes())
        return digest.hexdigest()
