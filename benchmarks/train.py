"""Time and memory of a training step with only the routers trained, beside one with everything trained.

    python benchmarks/train.py                        148 M parameters, 4 experts, float32, 512 tokens
    python benchmarks/train.py --device cuda --dtype bfloat16 --hidden-size 2048 --intermediate-size 5632

Each way of training has a process of its own, with the model, what `btx train` trains in float32, and AdamW; they take
their steps in turns. A step is forward and backward pass, clipping and the optimizer. Memory is the largest during the
steps, above what lies there when the model is loaded. Ratios are taken step by step.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import bench
import torch
from btx_merge.modeling import BTXConfig, BTXForCausalLM

RUN = {"batch_size": 1, "sequence_length": 512, "rounds": 9, "threads": 1}
GOALS = {"time": 0.55, "memory": 0.25}


def resident() -> int:
    """Bytes of this process in memory. It forgets the peak so far, where the system allows that."""
    Path("/proc/self/clear_refs").write_text("5")
    return field("VmRSS")


def field(name: str) -> int:
    match = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def work(mode: str, options: argparse.Namespace, parent: Connection) -> None:
    """A process: builds the model, then takes a step whenever it is asked, until it is asked for its memory."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cuda, dtype = options.device == "cuda", getattr(torch, options.dtype)
    config = BTXConfig(**bench.shape_of(options, bench.BTX_SHAPE), use_cache=False)
    model: Any = BTXForCausalLM(config).to(options.device, dtype).train()
    trained = bench.trained_parameters(model, mode)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1, fused=True)
    ids = torch.randint(options.vocab_size, (options.batch_size, options.sequence_length)).to(options.device)
    step = partial(bench.training_step, model, {"input_ids": ids, "labels": ids}, optimizer, options)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    before = torch.cuda.memory_allocated() if cuda else resident()
    parent.send((sum(p.numel() for p in trained), weights))
    while parent.recv():
        parent.send(bench.timed(step, options.device)[1])
    parent.send((torch.cuda.max_memory_allocated() if cuda else field("VmHWM")) - before)


def measure(modes: Sequence[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Start a process for each mode, and let them take their steps in turns."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, out = {}, [], {}
    for mode in modes:
        pipes[mode], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(mode, options, theirs), daemon=True))
        processes[-1].start()
        trained, weights = pipes[mode].recv()
        out[mode] = {"trained": trained, "weights": weights}

    def step(mode: str) -> bench.Cost:
        pipes[mode].send(True)
        cost: bench.Cost = pipes[mode].recv()
        return cost

    for mode, steps in bench.in_turns({mode: partial(step, mode) for mode in modes}, options.rounds).items():
        out[mode]["steps"] = steps
    for mode in modes:
        pipes[mode].send(False)
        out[mode]["memory"] = pipes[mode].recv()
    for process in processes:
        process.join()
    return out


def main() -> None:
    options = bench.parse(bench.parser_of(__doc__, bench.BTX_SHAPE | RUN))
    measured = measure(("all", "shared", "routers"), options)
    whole, rows = measured["all"], []
    for mode, own in measured.items():
        wall, cpu, _ = zip(*own["steps"], strict=True)
        compared = bench.spread(bench.ratios(own["steps"], whole["steps"], options))
        memory = [f"{own['memory'] / 1e6:.0f}", f"{own['memory'] / whole['memory']:.2f}"]
        rows.append([mode, f"{own['trained']:,}", bench.spread(wall), bench.spread(cpu), compared, *memory])
    print(bench.facts(options), end="")
    head = ["trained", "parameters", "wall s", "CPU s", "its time / all's", "MB above weights", "its memory / all's"]
    print(bench.table(head, rows), end="")
    print(f"weights {whole['weights'] / 1e6:.0f} MB; goals of routers: {GOALS['time']} and {GOALS['memory']}")


if __name__ == "__main__":
    main()
