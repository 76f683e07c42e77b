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
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from btx_merge.modeling import BTXConfig, BTXForCausalLM

from btx_merge.finetuning.trainee_btx import is_trained

SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
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
    shape = {name: getattr(options, name) for name in SHAPE}
    model: Any = BTXForCausalLM(BTXConfig(**shape, use_cache=False)).to(options.device, dtype).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(mode, name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1, fused=True)
    ids = torch.randint(options.vocab_size, (options.batch_size, options.sequence_length)).to(options.device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    before = torch.cuda.memory_allocated() if cuda else resident()
    parent.send((sum(p.numel() for p in trained), weights))
    while parent.recv():
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.autocast(options.device, dtype, enabled=dtype != torch.float32):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        parent.send((time.perf_counter() - wall, time.process_time() - cpu))
    parent.send((torch.cuda.max_memory_allocated() if cuda else field("VmHWM")) - before)


def measure(modes: Sequence[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each mode's steps: the first of each is to warm up; the order is reversed every other round."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, out = {}, [], {}
    for mode in modes:
        pipes[mode], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(mode, options, theirs), daemon=True))
        processes[-1].start()
        trained, weights = pipes[mode].recv()
        out[mode] = {"trained": trained, "weights": weights, "steps": []}
    for number in range(-1, options.rounds):
        for mode in modes[:: -1 if number % 2 else 1]:
            pipes[mode].send(True)
            step = pipes[mode].recv()
            if number >= 0:
                out[mode]["steps"].append(step)
    for mode in modes:
        pipes[mode].send(False)
        out[mode]["memory"] = pipes[mode].recv()
    for process in processes:
        process.join()
    return out


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}-{max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (SHAPE | RUN).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{default}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    modes = ("all", "shared", "routers")
    measured = measure(modes, options)

    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.search("model name\\s*: (.*)", known)
    device = torch.cuda.get_device_name() if options.device == "cuda" else cpu[1] if cpu else platform.machine()
    print(f"- command: {shlex.join(['python', *sys.argv])}")
    print(f"- device: {device}, {options.threads} threads, {options.dtype}")
    print(f"- versions: torch {torch.__version__}, transformers {transformers.__version__}\n")
    clock = 1 if options.device == "cpu" and options.threads == 1 else 0
    print("| trained | parameters | wall s | CPU s | its time / all's | MB above the weights | its memory / all's |")
    print("|---|---|---|---|---|---|---|")
    whole = measured["all"]
    for mode, own in measured.items():
        wall, cpu_seconds = zip(*own["steps"], strict=True)
        ratios = [a[clock] / b[clock] for a, b in zip(own["steps"], whole["steps"], strict=True)]
        memory = own["memory"] / whole["memory"]
        cells = [mode, f"{own['trained']:,}", spread(wall), spread(cpu_seconds), spread(ratios)]
        print("| " + " | ".join([*cells, f"{own['memory'] / 1e6:.0f}", f"{memory:.2f}"]) + " |")
    print(f"\nweights {whole['weights'] / 1e6:.0f} MB; goals of routers: {GOALS['time']} and {GOALS['memory']}")


if __name__ == "__main__":
    main()
