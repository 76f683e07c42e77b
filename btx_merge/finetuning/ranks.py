"""The ranks that a launcher has started, by its environment variables, and whether a finetuning can use them.

torchrun and `accelerate launch` set WORLD_SIZE, RANK and LOCAL_RANK; launchers of MPI have names of their own. The
names, and their order, are those that accelerate reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from btx_merge.errors import InputError, Problem

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")


def _started() -> tuple[str, int]:
    """Return how many ranks the environment speaks of, after the name of the variable; 1 where it speaks of none."""
    return _first(_SIZES, 1)


def own_rank() -> int:
    """Return this process's number among all ranks."""
    return _first(_RANKS, 0)[1]


def own_local_rank() -> int:
    """Return this process's number among the ranks of its host."""
    return _first(_LOCAL_RANKS, 0)[1]


def _first(names: tuple[str, ...], otherwise: int) -> tuple[str, int]:
    for name in names:
        value = os.environ.get(name, "")
        if value.isdecimal():
            return name, int(value)
    return names[0], otherwise


def _torchrun(ranks: int, verb: str) -> str:
    return f"`torchrun --nproc-per-node {ranks} -m btx_merge {verb} ...`"


def check_launch(verb: str) -> None:
    """Refuse ranks that could not find each other; accelerate would wait for them, or fail.

    Args:
        verb: the command's, for the remedy.

    Raises:
        InputError: several ranks were started, and no address at which they meet.
    """
    name, size = _started()
    if size > 1 and not os.environ.get("MASTER_ADDR"):
        remedy = f"Start them by {_torchrun(size, verb)}; for one process unset {name}."
        raise InputError([Problem("command", name, f"{size}, but MASTER_ADDR is not set", "", remedy)])


def check_ranks(verb: str, sizes: Mapping[str, int], args: Any) -> None:
    """Refuse ranks that do not train together, and a number of them that the recipe does not want.

    Args:
        verb: the command's, for the remedies.
        sizes: how many ranks the recipe wants, by its key: `fsdp_size`, `ep_size`.
        args: the `TrainingArguments`, which have met the other ranks.

    Raises:
        InputError: a reason not to train.
    """
    import transformers
    from transformers.distributed import DistributedConfig

    problems = []
    if args.n_gpu > 1:
        found, expected = f"{args.n_gpu} in one process", "a process for each"
        remedy = f"Start it by {_torchrun(args.n_gpu, verb)}, or let it see one of them: CUDA_VISIBLE_DEVICES=0."
        problems.append(Problem("command", "GPUs", found, expected, remedy))
    name, size = _started()
    if size != args.world_size:
        found = f"{size}, but this process trains with {args.world_size} on {args.device.type}"
        remedy = f"Start it by {_torchrun(size, verb)}; for one process unset {name}."
        if "LOCAL_RANK" in os.environ:  # torchrun has started it, and accelerate cannot join ranks on this device
            remedy = "Train on the CPU by --use-cpu, or in one process without torchrun."
        problems.append(Problem("command", name, found, "", remedy))
    elif (shards := sizes["fsdp_size"]) not in (1, args.world_size):
        found, remedy = f"{shards} on {args.world_size} ranks", f"Start it by {_torchrun(shards, verb)}."
        problems.append(Problem("recipe", "fsdp_size", found, "the number of ranks", remedy))
    known = {field.name for field in fields(DistributedConfig)}
    # what came before ep_implementation halves the gradients of experts
    for option, needed in (("fsdp_size", "fsdp_size"), ("ep_size", "ep_implementation")):
        if sizes.get(option, 1) > 1 and needed not in known:
            found = f"transformers {transformers.__version__}"
            problems.append(Problem("recipe", option, found, "5.23 or newer", "pip install -U transformers"))
    if problems:
        raise InputError(problems)
