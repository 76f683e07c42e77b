"""Time the model beside transformers' Mixtral with the same weights and a dense Llama of the same shape.

    python benchmarks/model.py                                      a third of SmolLM2-135M's layers, 4 experts
    python benchmarks/model.py --dtype bfloat16 --num-hidden-layers 30 --vocab-size 49152
    python benchmarks/model.py --device cuda --dtype bfloat16 --hidden-size 2048 --intermediate-size 5632

Prefill, decode and training step in turns in one process, on random weights in memory; ratios are taken round by
round. On a CPU one thread is the default: its CPU seconds are the wall seconds of an idle machine, while two threads
wait for each other at the end of each operation, for milliseconds where another process has a core.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import bench
import torch
from btx_merge.modeling import BTXConfig, BTXForCausalLM
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

SHAPE = {  # SmolLM2-135M has 30 layers and a vocabulary of 49152
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 16384,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
RUN = {"batch_size": 1, "sequence_length": 512, "new_tokens": 16, "rounds": 5, "threads": 1}
COEF = 0.01
MODELS = ("BTX", "Mixtral", "dense Llama")


Step = Callable[[], object]
Costs = dict[str, list[bench.Cost]]


def build(options: argparse.Namespace, **changes: int) -> dict[str, Any]:
    """BTX and Mixtral share their weights. Both give the same logits, or like would not be compared with like."""
    common = bench.shape_of(options, SHAPE) | changes
    common |= {"rms_norm_eps": 1e-5, "max_position_embeddings": options.sequence_length + options.new_tokens}
    common |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    sparse = common | bench.shape_of(options, EXPERTS) | {"router_aux_loss_coef": COEF}
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "BTX": BTXForCausalLM(BTXConfig(**sparse)),
        "Mixtral": MixtralForCausalLM(MixtralConfig(**sparse)),
        "dense Llama": LlamaForCausalLM(LlamaConfig(**common)),
    }
    models["Mixtral"].load_state_dict(models["BTX"].state_dict(), assign=True)
    ids = torch.randint(common["vocab_size"], (1, 64))
    with torch.no_grad():
        ours, theirs = (models[name].eval()(ids).logits for name in ("BTX", "Mixtral"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    for name, model in models.items():
        for parameter in model.parameters():  # and no buffers: rotary frequencies are float32 in any model
            parameter.data = parameter.data.to(getattr(torch, options.dtype))
        model.to(options.device)
        if options.experts_implementation and name != "dense Llama":
            model.set_experts_implementation(options.experts_implementation)
    models["Mixtral"].load_state_dict(models["BTX"].state_dict(), assign=True)
    return models


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor) -> Any:
    return model.eval()(ids, use_cache=True, logits_to_keep=1)


def decode(model: Any, ids: torch.Tensor, options: argparse.Namespace) -> Step:
    """After a prompt which is not timed. Greedy, without what `generate` does around the model."""
    start = prefill(model, ids)

    @torch.no_grad()
    def step() -> None:
        cache, token = start.past_key_values, start.logits.argmax(-1)
        model.eval()
        for _ in range(options.new_tokens):
            token = model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
        cache.crop(-options.new_tokens)

    return step


def train(model: Any, ids: torch.Tensor, balanced: bool = True) -> None:
    """Forward and backward pass without the optimizer, which costs the same per parameter in any model."""
    torch.autograd.backward(loss_of(model.train(), ids, balanced))
    model.zero_grad()


def loss_of(model: Any, ids: torch.Tensor, balanced: bool) -> torch.Tensor:
    """With the balancing loss of the model, ours or Mixtral's, where it has one."""
    extra: dict[str, Any] = {}
    if isinstance(model, BTXForCausalLM):
        model.config.router_aux_loss_coef = COEF if balanced else 0.0
    elif isinstance(model, MixtralForCausalLM):
        extra = {"output_router_logits": balanced}  # there the loss hangs on it
    loss: torch.Tensor = model(ids, labels=ids, use_cache=False, **extra).loss
    return loss


def measure(step: Step, device: str) -> bench.Cost:
    """Return what a step costs, with the memory that it takes of a GPU."""
    if device != "cuda":
        return bench.timed(step, device)[1]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return bench.timed(step, device)[1]._replace(peak=torch.cuda.max_memory_allocated() - before)


def costs_of(steps: dict[str, Step], options: argparse.Namespace) -> Costs:
    """Measure steps in turns."""
    ways = {name: partial(measure, step, options.device) for name, step in steps.items()}
    return bench.in_turns(ways, options.rounds)


def routing_parts(options: argparse.Namespace, name: str, ids: torch.Tensor) -> dict[str, Step]:
    """Training steps of a model without experts and attention: with routing and loss, with routing, with neither.

    Their differences are what routing and loss cost, free of the noise of the large matrix products.
    """
    steps: dict[str, Step] = {}
    for part in ("both", "routing", "neither"):
        model = build(options, intermediate_size=8, vocab_size=64)[name]
        for layer in model.model.layers:
            layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
            layer.mlp.experts.forward = lambda hidden, _, weights: hidden * weights.sum(-1, True).to(hidden.dtype)
            if part == "neither":
                layer.mlp.forward = lambda hidden, *_, **__: hidden
        steps[part] = partial(train, model, ids % 64, balanced=part == "both")
    return steps


def saved_bytes(model: Any, ids: torch.Tensor, balanced: bool) -> int:
    """What autograd keeps from the forward pass of a training step for the backward pass, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model.train(), ids, balanced)  # while it lives, no two of them have one address
    return sum(kept.values()) if loss.requires_grad else 0


def products(options: argparse.Namespace, experts: int, router: int, context: float, heads: float) -> float:
    """Multiplications for one token in matrix products, with a language modelling head for `heads` of the tokens.

    Per layer: query and output, key and value; scores and sums over `context` keys; feed-forward blocks; router.
    """
    hidden, inner = options.hidden_size, options.intermediate_size
    narrow = hidden // options.num_attention_heads * options.num_key_value_heads
    layer = 2 * hidden * hidden + 2 * hidden * narrow + 2 * hidden * context + 3 * experts * hidden * inner
    return float(options.num_hidden_layers * (layer + hidden * router) + heads * hidden * options.vocab_size)


def flops_to_dense(task: str, options: argparse.Namespace) -> float:
    """Active FLOPs of BTX by those of the dense model. A backward pass doubles both."""
    tokens = options.sequence_length
    context = tokens + options.new_tokens / 2 if task == "decode" else tokens / 2
    rest = (context, 1 / tokens if task == "prefill" else 1)
    sparse = products(options, options.num_experts_per_tok, options.num_local_experts, *rest)
    return sparse / products(options, 1, 0, *rest)


def rows_of(task: str, costs: Costs, options: argparse.Namespace) -> list[list[str]]:
    active, rows = flops_to_dense(task, options), []
    for name in MODELS:
        wall, cpu, peak = zip(*costs[name], strict=True)
        row = [task, name, bench.spread(wall), bench.spread(cpu), *([f"{max(peak) / 1e6:.0f}"] if any(peak) else [])]
        row.append(bench.spread(bench.ratios(costs["Mixtral"], costs[name], options)) if name == "BTX" else "")
        to_dense = bench.ratios(costs[name], costs["dense Llama"], options)
        over = statistics.median(to_dense) / active
        compared = [bench.spread(to_dense), f"{active:.2f}", f"{over:.2f}, {'yes' if over <= 1.1 else 'no'}"]
        rows.append(row + (["", "", ""] if name == "dense Llama" else compared))
    return rows


def report(models: dict[str, Any], options: argparse.Namespace) -> str:
    ids = torch.randint(options.vocab_size, (options.batch_size, options.sequence_length)).to(options.device)
    tasks: dict[str, dict[str, Step]] = {
        "prefill": {name: partial(prefill, model, ids) for name, model in models.items()},
        "decode": {name: decode(model, ids, options) for name, model in models.items()},
        "training step": {name: partial(train, model, ids) for name, model in models.items()},
    }
    tasks["training step"]["without loss"] = partial(train, models["BTX"], ids, balanced=False)
    costs = {task: costs_of(steps, options) for task, steps in tasks.items()}
    head = ["task", "model", "wall s", "CPU s", *(["peak MB"] if options.device != "cpu" else [])]
    head += ["Mixtral's time / its", "its time / dense", "active FLOPs / dense", "time by FLOPs, within 1.1"]
    text = bench.table(head, [row for task in tasks for row in rows_of(task, costs[task], options)])

    steps = costs["training step"]
    with_loss = [100 * (ratio - 1) for ratio in bench.ratios(steps["BTX"], steps["without loss"], options)]
    rows = []
    for name in MODELS[:2]:
        parts = costs_of(routing_parts(options, name, ids), options)
        both, routing, neither = (bench.times(part, options) for part in parts.values())
        whole = statistics.median(bench.times(steps[name], options)) / 100
        pairs = ((routing, neither), (both, routing), (both, neither))
        shares = [bench.spread([(a - b) / whole for a, b in zip(*pair, strict=True)]) for pair in pairs]
        rows.append([name, *shares, bench.spread(with_loss) if name == "BTX" else ""])
    head = ["% of a training step", "routing", "balancing loss", "both (goal: < 3)", "loss, by the whole step"]
    text += bench.table(head, rows)

    rows = []
    logits = ids.numel() * options.num_hidden_layers * options.num_local_experts * models["BTX"].dtype.itemsize
    for name in MODELS[:2]:
        plain, balanced = (saved_bytes(models[name], ids, on) for on in (False, True))
        rows.append([name, f"{plain:,}", f"{balanced - plain:,}", f"{(balanced - plain) / logits:.2f}"])
    head = ["bytes kept for the backward pass", "without loss", "more with it", f"times the router logits' {logits:,}"]
    return text + bench.table(head, rows)


def facts(models: dict[str, Any], options: argparse.Namespace) -> str:
    chosen = (models[name].config._experts_implementation for name in MODELS[:2])
    experts = " and ".join(map(str, dict.fromkeys(chosen)))
    task = f"{options.batch_size} x {options.sequence_length} tokens, {options.new_tokens} decoded after them"
    return bench.facts(options, experts=experts, task=task)


def main() -> None:
    parser = bench.parser_of(__doc__, SHAPE | EXPERTS | RUN)
    parser.add_argument("--experts-implementation", help="of BTX and Mixtral (transformers' choice)")
    options = bench.parse(parser, "float16")
    models = build(options)
    print(facts(models, options), end="", flush=True)
    print(report(models, options), end="")


if __name__ == "__main__":
    main()
