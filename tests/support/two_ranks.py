"""What two processes that train together compute: `python -m tests.support.two_ranks FOLDER`.

They find each other through a file in FOLDER, talk over the loopback interface, and leave their results there.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from tests.support.models import EXPERTS, given_logits, tiny_btx, tokens

COEFFICIENT = 0.5
LAYERS = 2
RANKS = 2
STEPS = 3
"""Micro-batches: the first two are one accumulated batch, the third is one of its own."""


def some_logits(rank: int, step: int) -> list[torch.Tensor]:
    """Of 10 tokens, further from balance on the one rank than on the other."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    tilt = torch.linspace(-1, 1, EXPERTS) * (2 * rank - 1)
    return [(torch.randn(10, EXPERTS, generator=generator) + tilt).requires_grad_() for _ in range(LAYERS)]


def some_mask(rank: int, step: int) -> torch.Tensor:
    """[2, 5]; 10, 7, 9 real tokens on rank 0, and 4, 10, 6 on rank 1."""
    count = [[10, 7, 9], [4, 10, 6]][rank][step]
    return (count > torch.arange(10).reshape(5, 2).T).long()


def some_labels(rank: int, step: int) -> torch.Tensor:
    return tokens(2, 5).masked_fill(some_mask(rank, step) == 0, -100)


def labelled(rank: int, step: int) -> int:
    """Labels that are predicted: the first of a row is not."""
    return int((some_labels(rank, step)[:, 1:] != -100).sum())


def items_of(step: int) -> int:
    """Labelled tokens of the step's whole batch, on all ranks, as Trainer counts them."""
    return sum(labelled(rank, other) for rank in range(RANKS) for other in ((0, 1) if step < 2 else (2,)))


def one_call(rank: int, **changes: Any) -> dict[str, Any]:
    """The balancing loss of a call by itself, and its gradient."""
    model, layers = tiny_btx(**changes).train(), some_logits(rank, 0)
    with given_logits(model, layers):
        out = model(tokens(2, 5), attention_mask=some_mask(rank, 0), output_router_logits=True)
    out.aux_loss.backward()
    return {"value": out.aux_loss.detach(), "gradients": [logits.grad for logits in layers]}


def accumulated(rank: int, coefficient: float) -> list[dict[str, Any]]:
    model = tiny_btx(router_aux_loss_scope="global_batch", router_aux_loss_coef=coefficient).train()
    results = []
    for step in range(STEPS):
        layers = some_logits(rank, step)
        with given_logits(model, layers):
            out = model(
                tokens(2, 5),
                attention_mask=some_mask(rank, step),
                labels=some_labels(rank, step),
                num_items_in_batch=torch.tensor(items_of(step)),
                output_router_logits=True,
            )
        out.loss.backward()
        gradients = [logits.grad for logits in layers]
        results.append({"value": out.aux_loss.detach(), "loss": out.loss.detach(), "gradients": gradients})
    return results


def equal_counts(rank: int) -> list[torch.Tensor]:
    """The routers' gradients from rows of which each rank has half."""
    model = tiny_btx(router_aux_loss_scope="global_batch").train()
    model(tokens(4, 6)[2 * rank : 2 * rank + 2], output_router_logits=True).aux_loss.backward()
    return [layer.mlp.gate.weight.grad for layer in model.model.layers]


def moved_bias(rank: int) -> list[torch.Tensor]:
    """Rank 0 sends 10 tokens to expert 0, rank 1 sends 4 to expert 1 and, in a second call, 10 to expert 2."""
    model = tiny_btx(router_selection_bias=True, num_experts_per_tok=1).train()
    for step, expert in [(0, rank), *([(1, 2)] if rank else [])]:
        with given_logits(model, [5 * torch.eye(EXPERTS)[expert].expand(10, -1)] * LAYERS):
            model(tokens(2, 5), attention_mask=some_mask(rank, step))
    model.update_router_bias(0.25)
    return [layer.mlp.routing.e_score_correction_bias.clone() for layer in model.model.layers]


def moved_bias_under_ddp(rank: int) -> list[torch.Tensor]:
    """Rank 0 sends 7 tokens to expert 2, then 10 to expert 0; rank 1 sends 10, then 4 to expert 1."""
    model = tiny_btx(router_selection_bias=True, num_experts_per_tok=1).train()
    for layer in model.model.layers:
        layer.mlp.gate.weight.requires_grad_(False)  # it is not asked here
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for step, expert in [(1, [2, 1][rank]), (0, [0, 1][rank])]:
        with given_logits(model, [5 * torch.eye(EXPERTS)[expert].expand(10, -1)] * LAYERS):
            parallel(tokens(2, 5), attention_mask=some_mask(rank, step), labels=tokens(2, 5)).loss.backward()
    model.update_router_bias(0.25)
    return [layer.mlp.routing.e_score_correction_bias.clone() for layer in model.model.layers]


def evaluated_alone(rank: int) -> None:
    """Only one rank evaluates. If that asked the other ranks, they would not answer."""
    if rank == 0:
        model = tiny_btx(router_aux_loss_scope="global_batch", router_selection_bias=True)
        model(tokens(2, 5), labels=tokens(2, 5), output_router_logits=True)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting_point",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    evaluated_alone(rank)
    results = {
        "one call": one_call(rank, router_aux_loss_scope="global_batch"),
        "micro": one_call(rank),
        "dense": one_call(rank, router_aux_loss_scope="global_batch", router_grad="dense"),
        "with": accumulated(rank, COEFFICIENT),
        "without": accumulated(rank, 0.0),
        "equal": equal_counts(rank),
        "bias": moved_bias(rank),
        "ddp": moved_bias_under_ddp(rank),
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # Forked, so that the imports, which take longest, are done once; torch has not run anything yet.
    torch.multiprocessing.start_processes(main, (Path(sys.argv[1]),), nprocs=RANKS, start_method="fork")
