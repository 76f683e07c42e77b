"""The result of a finetuning: the checkpoint that it began with, with other bytes where something was trained.

All is written as a merge writes (`Staging`): whatever ends it, the target is absent or as it was, and `--resume`
writes what is missing.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from btx_merge.checkpoints.copying import CopyLayout, fill_copy, same_layout
from btx_merge.checkpoints.dtypes import TORCH_NAMES, Raw
from btx_merge.checkpoints.layout import BLOCK_BYTES, Block, Job, portions
from btx_merge.checkpoints.staging import Staging
from btx_merge.checkpoints.tensor_files import stored_tensors
from btx_merge.errors import InputError, NonFiniteError, Problem
from btx_merge.files.changes import ReadFiles
from btx_merge.model.card_update import update_card
from btx_merge.model.files import PICTURE, ROUTING
from btx_merge.model.held_out import OF_THIS_MODEL, training_results
from btx_merge.model.records import append_record
from btx_merge.reporting import Reporter
from btx_merge.sources.cards import code_in_card
from btx_merge.sources.locate import Located


def check_stored(folder: Path, trained: Mapping[str, torch.Tensor]) -> None:
    """Refuse a checkpoint in which a trained tensor has no place.

    Raises:
        InputError: tensors that are missing, or of another shape or kind.
    """
    stored, problems = stored_tensors(folder), []
    for name, tensor in trained.items():
        place = stored.get(name)
        if place is None or place.shape != tuple(tensor.shape) or place.dtype not in TORCH_NAMES:
            found = f"{name}: {place.dtype} {list(place.shape)}" if place else f"{name} is missing"
            problems.append(Problem("model", str(folder), found, f"a float tensor {list(tensor.shape)}"))
    if problems:
        raise InputError(problems)


def check_finite(folder: Path, trained: Mapping[str, torch.Tensor], work: Path) -> None:
    """Refuse trained values that the checkpoint cannot hold.

    Args:
        folder: the model's, in whose dtypes the values are written; what has no place there keeps its own.
        work: where the run's checkpoints are kept.

    Raises:
        NonFiniteError: a value that is NaN, Inf or outside of the dtype's range.
    """
    stored = stored_tensors(folder)
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
    model: Located,
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
    layout = CopyLayout((), (), {}) if is_adapter else same_layout(model.folder)
    checksums = [[name, zlib.crc32(_raw(tensor).data)] for name, tensor in trained.items()]
    fill = partial(_fill, trained)
    return Staging(target, layout, fill, read, "train", is_adapter, str(model.folder), checksums, reporter=reporter)


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


def write_records(
    folder: Path, entry: Mapping[str, Any], history: Sequence[Mapping[str, Any]], located: Located
) -> None:
    """Write the training's part of the recipe and the card, and the load of every layer at each logging step."""
    from btx_merge.finetuning.metrics import LOAD_PER_LAYER

    lines = [
        json.dumps({"step": item["step"], "load": item[LOAD_PER_LAYER]}) for item in history if LOAD_PER_LAYER in item
    ]
    (folder / ROUTING).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    append_record(folder, "training", entry)
    update_card(
        folder,
        training_section(entry, history),
        " Trained: see [below](#training).",
        located=None if entry["train"] == "lora" else located,  # an adapter's card names its base already
        results=training_results(entry),
    )


def training_section(entry: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    """Write what the card says: what was trained, on what mixture, with which curve."""
    held_out = entry["held_out_perplexity"]
    total = sum(domain["weight"] for domain in entry["data"])
    rows = []
    for domain in entry["data"]:
        before, after = held_out["before"].get(domain["name"]), held_out["after"].get(domain["name"])
        figures = [f"{value:.4g}" if value is not None else "" for value in (before, after)]
        texts = ", ".join(map(code_in_card, domain["references"]))
        rows.append([domain["name"], texts, f"{domain['weight'] / total:.0%}", *figures])
    table = _table(["domain", "texts", "share", "held-out perplexity before", "after"], rows)
    logged = [item for item in history if "loss" in item]
    shown = logged[:: max(1, -(-len(logged) // 10))]
    if logged and shown[-1] is not logged[-1]:
        shown.append(logged[-1])
    keys = [key for key in ("loss", "aux_loss", "dead_experts") if logged and key in logged[-1]]
    titles = {"loss": "loss", "aux_loss": "balancing loss", "dead_experts": "dead experts"}
    curve = _table(
        ["step", *(titles[key] for key in keys)],
        [[str(item["step"]), *(f"{item[key]:.4g}" if key in item else "" for key in keys)] for item in shown],
    )
    arguments = entry["arguments"]
    return f"""## Training

`btx train --train {entry["train"]}`: {entry["trained_parameters"]:,} parameters, {entry["steps"]} steps,
{entry["tokens"]:,} tokens in windows of {entry["max_length"]}, learning rate {arguments["learning_rate"]:g}.

{OF_THIS_MODEL}

{table}
{curve}
![losses, learning rate, perplexities and loads of the run]({PICTURE})
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in [head, ["---"] * len(head), *rows])
