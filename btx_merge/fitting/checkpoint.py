"""A merged checkpoint in a folder, read tensor by tensor and changed in place."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from btx_merge.checkpoints.dtypes import all_finite, from_float32
from btx_merge.checkpoints.stored import StoredTensor
from btx_merge.checkpoints.tensor_files import stored_tensors
from btx_merge.errors import NonFiniteError
from btx_merge.fitting.reading import Tensors, on_device, read_stored

_SAMPLED_PLACES, _SAMPLED_BYTES = 16, 4096
"""Places of each tensor, and bytes from each, by which a checkpoint is known again: any training changes them."""


class Checkpoint:
    """The tensors of a folder's safetensors files, by name. Values come and go in float32."""

    def __init__(self, folder: Path, device: torch.device):
        """Open all files of weights in the folder."""
        self.folder, self.device = folder, device
        self.tensors = stored_tensors(folder)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows [start, stop) of a tensor, all by default. Exact."""
        return on_device(read_stored(self.tensors[name], self.device, start, stop), self.device)

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

    def read_layer(self, index: int) -> Tensors:
        """Return all tensors of a layer as they are stored, by their names in it and in the host's memory."""
        prefix = f"model.layers.{index}."
        found = {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): read_stored(tensor, self.device) for name, tensor in found.items()}

    def digest(self) -> str:
        """Tell checkpoints apart by names, shapes and some bytes of every tensor but the routers."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.tensors.items()):
            if not name.endswith(".mlp.gate.weight"):
                digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
                digest.update(_sample(tensor))
        return digest.hexdigest()


def _sample(tensor: StoredTensor) -> bytes:
    """Return bytes from places spread evenly over a tensor; of experts [E, ...], from each of them."""
    places = max(_SAMPLED_PLACES, tensor.shape[0] if len(tensor.shape) == 3 else 0)
    found = bytearray()
    with tensor.file.open("rb", buffering=0) as file:
        for place in range(places):
            first = tensor.nbytes * place // places
            file.seek(tensor.start + first)
            found += file.read(min(_SAMPLED_BYTES, tensor.nbytes - first))
    return bytes(found)
