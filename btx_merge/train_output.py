"""The result of a finetuning: the checkpoint that it began with, other bytes where something was trained.

All is written into a folder beside the target, which takes the target's name when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from btx_merge.dtypes import TORCH_NAMES
from btx_merge.errors import InputError, Problem
from btx_merge.files import PICTURE, ROUTING, append_record, copy_model_code
from btx_merge.folder_files import copy_file, small_files
from btx_merge.held_out import OF_THIS_MODEL, training_results
from btx_merge.hub import Located
from btx_merge.tensorfiles import stored_tensors
from btx_merge.tokenizer_files import copy_templates


def check_stored(folder: Path, trained: Mapping[str, torch.Tensor]) -> None:
    """Refuses a checkpoint in which a trained tensor has no place.

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


def write_model(source: Path, folder: Path, trained: Mapping[str, torch.Tensor]) -> None:
    """Copies a checkpoint and puts the trained tensors in their places, in the dtype that they had there."""
    for file in [*small_files(source).values(), *source.glob("*.safetensors")]:
        copy_file(file, folder / file.name)
    copy_templates(source, folder)
    copy_model_code(folder)
    stored = stored_tensors(folder)
    for name, tensor in trained.items():
        place = stored[name]
        with place.file.open("rb+") as stream:
            stream.seek(place.start)
            stream.write(tensor.to(getattr(torch, TORCH_NAMES[place.dtype])).view(torch.uint8).numpy().tobytes())


def write_records(
    folder: Path, entry: Mapping[str, Any], history: Sequence[Mapping[str, Any]], located: Located
) -> None:
    """The recipe's and the card's part of a training, and the load of every layer at each logging step."""
    from btx_merge.train_metrics import LOAD_PER_LAYER

    lines = [
        json.dumps({"step": item["step"], "load": item[LOAD_PER_LAYER]}) for item in history if LOAD_PER_LAYER in item
    ]
    (folder / ROUTING).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    append_record(
        folder,
        "training",
        entry,
        training_section(entry, history),
        " Trained: see [below](#training).",
        located=None if entry["train"] == "lora" else located,  # an adapter's card names its base already
        results=training_results(entry),
    )


def training_section(entry: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    """What the card says: what was trained, on what mixture, with which curve."""
    held_out = entry["held_out_perplexity"]
    total = sum(domain["weight"] for domain in entry["data"])
    rows = []
    for domain in entry["data"]:
        before, after = held_out["before"].get(domain["name"]), held_out["after"].get(domain["name"])
        figures = [f"{value:.4g}" if value is not None else "" for value in (before, after)]
        texts = ", ".join(f"`{reference}`" for reference in domain["references"])
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
