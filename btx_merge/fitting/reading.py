"""Weights on their way from files to the device: read in their own dtype, one step ahead of where they are needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from btx_merge.checkpoints.dtypes import TORCH_NAMES
from btx_merge.checkpoints.stored import StoredTensor

Tensors = dict[str, torch.Tensor]
"""Weights by name."""
_BLOCK_BYTES = 16 * 2**20
"""Bytes that are read at once, where a row is smaller. They are copied once more, so it bounds the memory for that."""


def read_stored(tensor: StoredTensor, device: torch.device, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Return rows [start, stop) of a tensor, all by default, in its own dtype and in the host's memory.

    Args:
        device: where they will go. For a GPU the memory is pinned, from which it copies without waiting.
    """
    stop = tensor.shape[0] if stop is None else stop
    dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
    out = torch.empty(stop - start, *tensor.shape[1:], dtype=dtype, pin_memory=device.type == "cuda")
    raw = out.reshape(-1).view(torch.uint8).numpy()
    rows = max(1, _BLOCK_BYTES // max(1, tensor.row_bytes))
    for first in range(start, stop, rows):
        block = tensor.read_rows(first, min(first + rows, stop))
        place = (first - start) * tensor.row_bytes
        np.copyto(raw[place : place + len(block)], block)
    return out


def gather_stored(tensor: StoredTensor, rows: torch.Tensor) -> torch.Tensor:
    """Return single rows of a tensor, in the order of `rows` [R], in its own dtype and in the host's memory."""
    raw = torch.from_numpy(tensor.gather_rows(rows.tolist()))
    return raw.view(getattr(torch, TORCH_NAMES[tensor.dtype])).reshape(len(rows), *tensor.shape[1:])


def on_device(stored: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return weights in float32 on the device. They go there in their own dtype, which may be half as large."""
    return stored.to(device, non_blocking=True).float()


def fill_layer(layer: Any, tensors: Tensors, device: torch.device, is_part: bool = False) -> Any:
    """Give a layer on the meta device its weights, one by one, so that `tensors` is empty in the end.

    Args:
        is_part: whether they are some of its weights only.
    """
    weights = {name: on_device(tensors.pop(name), device) for name in list(tensors)}
    layer.load_state_dict(weights, strict=not is_part, assign=True)
    return layer.eval()


class ReadAhead:
    """Reads in a given order, each in a thread while what was read before it is used.

    Memory holds one read more than without, however slowly they are taken.
    """

    def __init__(self, reads: Iterable[tuple[Hashable, Callable[[], Tensors]]]):
        """Begin with the first read.

        Args:
            reads: each with the name by which it will be asked for.
        """
        self._reads = iter(reads)
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._ahead: tuple[Hashable, Future[Tensors]] | None = None
        self._start_next()

    def _start_next(self) -> None:
        upcoming = next(self._reads, None)
        self._ahead = None if upcoming is None else (upcoming[0], self._pool.submit(upcoming[1]))

    def take(self, name: Hashable) -> Tensors:
        """Return what the next read gave, and start the one behind it.

        Raises:
            LookupError: the next read is another, which is a fault of btx-merge.
        """
        if self._ahead is None or self._ahead[0] != name:
            raise LookupError(f"{name} is wanted, but {self._ahead and self._ahead[0]} is read next")
        tensors = self._ahead[1].result()
        self._start_next()
        return tensors

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
