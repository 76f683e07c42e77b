"""A merged checkpoint in a folder, read tensor by tensor and changed in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from btx_merge.checkpoints.dtypes import Raw, all_finite, from_float32
from btx_merge.checkpoints.tensor_files import stored_tensors
from btx_merge.errors import NonFiniteError
from btx_merge.fitting.reading import Tensors, gather_stored, on_device, read_stored
from btx_merge.sources.digest import model_digest


class Checkpoint:
    """The tensors of a folder's safetensors files, by name. Values come and go in float32."""

    def __init__(self, folder: Path, device: torch.device):
        """Open all files of weights in the folder."""
        self.folder, self.device = folder, device
        self.tensors = stored_tensors(folder)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows [start, stop) of a tensor, all by default. Exact."""
        return on_device(read_stored(self.tensors[name], self.device, start, stop), self.device)

    def gather(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return single rows of a tensor, in the order of `rows` [R]. Exact."""
        return on_device(gather_stored(self.tensors[name], rows), self.device)

    def write(self, name: str, values: torch.Tensor, start: int = 0) -> None:
        """Put rows in their place, rounded once to the dtype that the tensor has there.

        Raises:
            NonFiniteError: a value is NaN, Inf or outside of the dtype's range.
        """
        raw, tensor = self._rounded(name, values), self.tensors[name]
        with tensor.file.open("r+b") as file:
            file.seek(tensor.start + start * tensor.row_bytes)
            file.write(raw.tobytes())

    def scatter(self, name: str, values: torch.Tensor, rows: torch.Tensor) -> None:
        """Put single rows in their places, `rows` [R], as `write` does.

        Raises:
            NonFiniteError: a value is NaN, Inf or outside of the dtype's range.
        """
        raw, tensor = self._rounded(name, values), self.tensors[name]
        with tensor.file.open("r+b", buffering=0) as file:
            for row, part in zip(rows.tolist(), np.split(raw, len(rows)), strict=True):
                file.seek(tensor.start + row * tensor.row_bytes)
                file.write(part.tobytes())

    def _rounded(self, name: str, values: torch.Tensor) -> Raw:
        """Return values as bytes of the dtype that the tensor has."""
        dtype = self.tensors[name].dtype
        raw = from_float32(values.float().cpu().numpy(), dtype)
        if not all_finite(raw, dtype):
            raise NonFiniteError(f"{name}: a fitted value is not finite in {dtype}. Give more text.")
        return raw

    def read_layer(self, index: int) -> Tensors:
        """Return all tensors of a layer as they are stored, by their names in it and in the host's memory."""
        prefix = f"model.layers.{index}."
        found = {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): read_stored(tensor, self.device) for name, tensor in found.items()}

    def digest(self) -> str:
        """Return a digest of all tensors but the routers, on which no statistics depend."""
        return model_digest({name: at for name, at in self.tensors.items() if not name.endswith(".mlp.gate.weight")})
