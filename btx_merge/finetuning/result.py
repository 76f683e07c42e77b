"""The result of a run: the checkpoint that it began with, with other bytes where something was trained.

All is written as a merge writes (`Staging`): whatever ends it, the target is absent or as it was, and `--resume`
writes what is missing.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from btx_merge.checkpoints.copying import NO_TENSORS, fill_copy
from btx_merge.checkpoints.dtypes import TORCH_NAMES, Raw
from btx_merge.checkpoints.layout import BLOCK_BYTES, Block, Job, portions
from btx_merge.checkpoints.staging import Staging
from btx_merge.checkpoints.stored import StoredTensor
from btx_merge.errors import InputError, NonFiniteError, Problem
from btx_merge.files.changes import ReadFiles
from btx_merge.finetuning.trainee import Trainee
from btx_merge.reporting import Reporter


def check_stored(model: Trainee, trained: Mapping[str, torch.Tensor]) -> None:
    """Refuse a checkpoint in which a trained tensor has no place.

    Raises:
        InputError: tensors that are missing, or of another shape or kind.
    """
    stored, problems = model.stored, []
    for name, tensor in trained.items():
        place = stored.get(name)
        if place is None or place.shape != tuple(tensor.shape) or place.dtype not in TORCH_NAMES:
            found = f"{name}: {place.dtype} {list(place.shape)}" if place else f"{name} is missing"
            problems.append(Problem("model", str(model.located.folder), found, f"a float tensor {list(tensor.shape)}"))
    if problems:
        raise InputError(problems)


def check_finite(stored: Mapping[str, StoredTensor], trained: Mapping[str, torch.Tensor], work: Path) -> None:
    """Refuse trained values that the checkpoint cannot hold.

    Args:
        stored: the model's tensors, in whose dtypes the values are written; what has no place there keeps its own.
        work: where the run's checkpoints are kept.

    Raises:
        NonFiniteError: a value that is NaN, Inf or outside of the dtype's range.
    """
    for name, tensor in trained.items():
        dtype = getattr(torch, TORCH_NAMES[stored[name].dtype]) if name in stored else tensor.dtype
        for start, stop in portions(0, len(tensor), tensor[:1].nbytes, BLOCK_BYTES):
            if not tensor[start:stop].to(dtype).isfinite().all():
                raise NonFiniteError(
                    f"{name}: training ended with values that are not finite in {dtype}. Nothing was written. The "
                    f"checkpoints are kept in {work}: look where the loss left, remove that folder, and train again, "
                    f"with a smaller --learning-rate for instance."
                )


def result_staging(
    model: Trainee,
    target: Path,
    trained: Mapping[str, torch.Tensor],
    read: ReadFiles,
    reporter: Reporter,
    is_adapter: bool,
) -> Staging:
    """Return the folder in which the result is written: the model's weights with the trained tensors in their places.

    Args:
        trained: whole, on the CPU. What was left unfinished of other values is not continued.
        is_adapter: whether the result holds none of the model's weights; peft writes its own.
    """
    layout = NO_TENSORS if is_adapter else model.layout()
    checksums = [[name, zlib.crc32(_raw(tensor).data)] for name, tensor in trained.items()]
    what = (model.verb, is_adapter, str(model.located.folder), checksums)
    return Staging(target, layout, partial(_fill, trained), read, *what, reporter=reporter)


def _fill(trained: Mapping[str, torch.Tensor], job: Job) -> Iterator[Block]:
    """Return the bytes of a job: trained rows in the dtype that the tensor has in its file, the others as they are."""
    if job.tensor.name not in trained:
        yield from fill_copy(job)
        return
    dtype = getattr(torch, TORCH_NAMES[job.tensor.dtype])
    for start, stop in portions(job.start, job.stop, job.tensor.row_bytes, BLOCK_BYTES):
        yield 0, _raw(trained[job.tensor.name][start:stop].to(dtype))


def _raw(tensor: torch.Tensor) -> Raw:
    """Return a tensor's bytes."""
    raw: Raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw
