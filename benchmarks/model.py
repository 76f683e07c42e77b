"""Speed and memory of the model, beside transformers' Mixtral and a dense Llama of the same shape.

Prefill, decode and training step, in turns in one process, on random weights that BTX and Mixtral share. Ratios are
taken round by round, between calls that follow each other: this survives a noisy machine.

    python benchmarks/model.py [--dtype bfloat16] [--device cuda] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from btx_merge.modeling import BTXConfig, BTXForCausalLM
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import btx_merge  # noqa: F401

Step = Callable[[Any], None]
Times = dict[str, list[tuple[float, float]]]
"""By model: wall and CPU seconds of each round."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    run = {"batch_size": 4, "sequence_length": 512, "new_tokens": 24, "rounds": 7, "threads": torch.get_num_threads()}
    for name, default in {**shape, **run}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--experts-implementation", help="of BTX and Mixtral; transformers' default where not given")
    options = parser.parse_args()
    options.shape = {name: getattr(options, name) for name in shape}
    return options


def build(options: argparse.Namespace) -> dict[str, Any]:
    """BTX, the same without its router loss, Mixtral with the same weights, and a dense Llama."""
    torch.manual_seed(0)
    shape = {**options.shape, "initializer_range": 0.05, "max_position_embeddings": 4096}
    dense = {name: value for name, value in shape.items() if "experts" not in name}
    models: dict[str, Any] = {
        "BTX": BTXForCausalLM(BTXConfig(**shape)),
        "BTX without router loss": BTXForCausalLM(BTXConfig(**shape, router_aux_loss_coef=0.0)),
        "Mixtral": MixtralForCausalLM(
            MixtralConfig(**shape, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
        ),
        "Llama": LlamaForCausalLM(LlamaConfig(**dense)),
    }
    for name in ("BTX without router loss", "Mixtral"):
        models[name].load_state_dict(models["BTX"].state_dict())
    ids = prompt(options)[:, :64].cpu()
    with torch.no_grad():
        ours, theirs = (models[name].eval()(ids).logits for name in ("BTX", "Mixtral"))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)  # like is compared with like
    for name, model in models.items():
        model.to(options.device, getattr(torch, options.dtype))
        if options.experts_implementation and name != "Llama":
            model.set_experts_implementation(options.experts_implementation)
    return models


def prompt(options: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (options.batch_size, options.sequence_length)
    return torch.randint(options.vocab_size, shape, generator=generator).to(options.device)


def steps(options: argparse.Namespace) -> dict[str, Step]:
    ids = prompt(options)

    @torch.no_grad()
    def prefill(model: Any) -> None:
        model.eval()(ids, logits_to_keep=1)

    @torch.no_grad()
    def decode(model: Any) -> None:
        cache = model.eval()(ids[:1, :32], use_cache=True).past_key_values
        for _ in range(options.new_tokens):
            cache = model(ids[:1, :1], past_key_values=cache, use_cache=True).past_key_values

    def train(model: Any) -> None:
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    return {"prefill": prefill, "decode": decode, "training step": train}


def measure(models: dict[str, Any], step: Step, options: argparse.Namespace) -> Times:
    """In turns, the order reversed every other round, after one round to warm up."""
    times: Times = {name: [] for name in models}
    for turn in range(options.rounds + 1):
        for name in list(models)[:: -1 if turn % 2 else 1]:
            wait(options)
            wall, cpu = time.perf_counter(), time.process_time()
            step(models[name])
            wait(options)
            if turn:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def wait(options: argparse.Namespace) -> None:
    if options.device != "cpu":
        torch.cuda.synchronize()


def flops(options: argparse.Namespace, experts: int, tokens: int, context: float, heads: int) -> float:
    """Multiplications of a pass over `tokens` with `experts` of a feed-forward block's width each.

    Projections of attention, its scores and sums over `context` keys, feed-forward blocks, router, and the head for
    as many tokens as it is run on.
    """
    h: int = options.hidden_size
    head_dim = h // options.num_attention_heads
    projections = 2 * h * h + 2 * h * head_dim * options.num_key_value_heads
    router = h * options.num_local_experts if experts > 1 else 0
    layer: float = projections + 2 * context * h + experts * 3 * h * options.intermediate_size + router
    return float(tokens * layer * options.num_hidden_layers + heads * h * options.vocab_size)


def flop_ratio(task: str, options: argparse.Namespace) -> float:
    """Of BTX to dense."""
    tokens = options.batch_size * options.sequence_length
    sizes = {
        "prefill": (tokens, options.sequence_length / 2, options.batch_size),
        "decode": (1, 32 + options.new_tokens / 2, 1),
        "training step": (tokens, options.sequence_length / 2, tokens),
    }[task]
    return flops(options, options.num_experts_per_tok, *sizes) / flops(options, 1, *sizes)


def ratio(times: Times, over: str, under: str, kind: int) -> str:
    pairs = [one[kind] / other[kind] for one, other in zip(times[over], times[under], strict=True)]
    return f"{statistics.median(pairs):.2f} [{min(pairs):.2f}-{max(pairs):.2f}]"


def report(task: str, times: Times, options: argparse.Namespace) -> None:
    for name in ("BTX", "Mixtral", "Llama"):
        wall, cpu = ([pair[kind] for pair in times[name]] for kind in (0, 1))
        cells = [task, name, f"{statistics.median(wall) * 1000:.0f} [{min(wall) * 1000:.0f}-{max(wall) * 1000:.0f}]"]
        cells += [f"{statistics.median(cpu) * 1000:.0f}", "1", "1"]
        kind = 1 if options.device == "cpu" else 0
        if name == "BTX":
            cells[-2:] = [ratio(times, "Mixtral", "BTX", kind), ratio(times, "BTX", "Llama", kind)]
        elif name == "Mixtral":
            cells[-1] = ratio(times, "Mixtral", "Llama", kind)
        cells.append(f"{flop_ratio(task, options):.2f}" if name != "Llama" else "1")
        print(f"| {' | '.join(cells)} |", flush=True)


def saved_bytes(model: Any, ids: torch.Tensor) -> int:
    """What autograd keeps for the backward pass of a training step, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(ids, labels=ids, use_cache=False).loss
    size = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    model.zero_grad()
    return size


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    models = build(options)
    print(f"{options.dtype}, {options.device}, {options.threads} threads, {options.batch_size} x ", end="")
    print(f"{options.sequence_length} tokens; {', '.join(f'{k} {v}' for k, v in options.shape.items())}\n")
    unit = "CPU seconds" if options.device == "cpu" else "wall seconds"
    print(f"Ratios of {unit}, median [smallest-largest] over {options.rounds} rounds.\n")
    print("| | | wall ms | CPU ms | Mixtral's time / BTX's | times dense | active FLOPs, times dense |")
    print("|---|---|---|---|---|---|---|")
    for task, step in steps(options).items():
        if task != "training step":
            times = measure({name: model for name, model in models.items() if "without" not in name}, step, options)
        else:
            times = measure(models, step, options)
        report(task, times, options)
    kind = 1 if options.device == "cpu" else 0
    print(f"\nStep with router loss / without: {ratio(times, 'BTX', 'BTX without router loss', kind)}")
    ids = prompt(options)
    grown = saved_bytes(models["BTX"], ids) - saved_bytes(models["BTX without router loss"], ids)
    logits = ids.numel() * options.num_local_experts * options.num_hidden_layers * 4
    print(f"Kept for the backward pass because of the router loss: {grown:,} bytes; the router logits: {logits:,}")


if __name__ == "__main__":
    main()
