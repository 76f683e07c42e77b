"""Tensor, expert and fully sharded data parallelism: two real processes beside one.

`torchrun` starts `tests.support.distributed_worker` once for a table of cases; each test judges what one measured.
Differences are relative to the largest expected value of a tensor, and the worst of both processes counts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from btx_merge.modeling import BTXConfig, BTXForCausalLM
from transformers import LlamaForCausalLM

from tests.support import warm
from tests.support.common import tensors_of, tiny_config
from tests.support.models import EXPERTS, tiny_btx

ROOT = Path(__file__).parents[2]
EXACT = 1e-5
"""Logits, losses and weights in float32: the same sums in another order."""
GRADIENT = 3e-5
"""Gradients in float32: some, a key's bias above all, are sums that nearly cancel."""
BF16 = 2**-6
"""Gradients from bfloat16: four of its roundings."""

TP, EP, FSDP, FSDP_EP = {"tp_size": 2}, {"tp_size": 2, "ep_size": 2}, {"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}
MIXED = {
    "distributed": {**FSDP, "fsdp_mixed_precision": True},
    "reference": {"dtype": "bfloat16", "experts_implementation": "grouped_mm"},
}

CASES: dict[str, dict[str, Any]] = {  # one start, seconds
    "tp": {"kind": "step", "distributed": TP},
    "tp, tied": {"kind": "step", "distributed": TP, "model": "tied"},
    "ep": {"kind": "step", "distributed": EP},
    "fsdp": {"kind": "step", "distributed": FSDP},
    "fsdp and ep": {"kind": "step", "distributed": FSDP_EP},
    "generate, tp": {"kind": "generate", "distributed": TP},
    "save, fsdp": {"kind": "save", "distributed": FSDP, "model": "tied"},
    "trainer, ddp": {"kind": "trainer", "model": "without balancing"},
    "trainer, ddp, balancing": {"kind": "trainer"},
    "trainer, fsdp": {"kind": "trainer", "distributed": FSDP},
}
MORE_CASES: dict[str, dict[str, Any]] = {  # one start, more seconds
    "tp, eager": {"kind": "step", "distributed": TP, "experts": "eager"},
    "tp, batched_mm": {"kind": "step", "distributed": TP, "experts": "batched_mm"},
    "tp, checkpointing": {"kind": "step", "distributed": TP, "checkpointing": True},
    "ep, eager": {"kind": "step", "distributed": EP, "experts": "eager"},
    "ep, batched_mm": {"kind": "step", "distributed": EP, "experts": "batched_mm"},
    "ep, tied": {"kind": "step", "distributed": EP, "model": "tied"},
    "ep, all_reduce": {"kind": "step", "distributed": {**EP, "ep_implementation": "all_reduce"}},
    "ep, checkpointing": {"kind": "step", "distributed": EP, "checkpointing": True},
    "fsdp, tied": {"kind": "step", "distributed": FSDP, "model": "tied"},
    "fsdp, checkpointing": {"kind": "step", "distributed": FSDP, "checkpointing": True},
    "fsdp and ep, eager": {"kind": "step", "distributed": FSDP_EP, "experts": "eager"},
    "fsdp and ep, batched_mm": {"kind": "step", "distributed": FSDP_EP, "experts": "batched_mm"},
    "fsdp, mixed precision": {"kind": "step", **MIXED},
    "fsdp, mixed precision, tied": {"kind": "step", **MIXED, "model": "tied"},
    "generate, tp, tied": {"kind": "generate", "distributed": TP, "model": "tied"},
    "generate, ep": {"kind": "generate", "distributed": EP},
    "generate, fsdp": {"kind": "generate", "distributed": FSDP},
    "save, tp": {"kind": "save", "distributed": TP},
    "save, tp, tied": {"kind": "save", "distributed": TP, "model": "tied"},
    "save, ep": {"kind": "save", "distributed": EP},
    "save, fsdp and ep": {"kind": "save", "distributed": FSDP_EP},
    "trainer, fsdp, without balancing": {"kind": "trainer", "distributed": FSDP, "model": "without balancing"},
    "trainer, fsdp and ep": {"kind": "trainer", "distributed": FSDP_EP},
}
EMBEDDINGS = "model.embed_tokens.weight"
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "without balancing": {"router_aux_loss_coef": 0.0},
}


def missing_feature(case: dict[str, Any]) -> str | None:
    from transformers.distributed import DistributedConfig

    needed = set(case.get("distributed", {}))
    if needed & {"tp_size", "ep_size"}:  # what came before cannot split 61 words, or halves experts' gradients
        needed.add("ep_implementation")
    missing = needed - {field.name for field in dataclasses.fields(DistributedConfig)}
    return f"this transformers' DistributedConfig has no {', '.join(sorted(missing))}" if missing else None


def of_kind(kind: str) -> list[Any]:
    """The names of a kind's cases, for parametrize."""
    marks = [([], CASES), ([pytest.mark.slow], MORE_CASES)]
    return [
        pytest.param(name, marks=mark) for mark, cases in marks for name, case in cases.items() if case["kind"] == kind
    ]


def start(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Two processes by torchrun, on the CPU and on this machine; what each of them measured, by case."""
    for name, changes in MODELS.items():
        config = {"router_aux_loss_coef": 0.5, "pad_token_id": 0, **changes}
        tiny_btx(**config).save_pretrained(folder / name)
    todo = {name: {"model": "untied", **case} for name, case in cases.items() if not missing_feature(case)}
    (folder / "cases.json").write_text(json.dumps(todo))
    run = warm.run(
        warm.torchrun("package", "-m", "tests.support.distributed_worker", folder),
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"},
        timeout=600,
        level="torch",
    )
    assert run.returncode == 0, run.stderr[-5000:]
    lines = (folder / "results.jsonl").read_text().splitlines()
    return {line["name"]: line["ranks"] for line in map(json.loads, lines)}


@dataclasses.dataclass(frozen=True)
class Outcome:
    case: dict[str, Any]
    ranks: list[dict[str, Any]]
    folder: Path

    @property
    def saved(self) -> Path:
        return self.folder / "saved" / self.case["name"]

    @property
    def original(self) -> Path:
        return self.folder / self.case.get("model", "untied")


@pytest.fixture(scope="session")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """What a case measured; its table is started when the first of its cases is asked for."""
    started: dict[bool, tuple[Path, dict[str, list[dict[str, Any]]]]] = {}

    def look_up(name: str) -> Outcome:
        cases = CASES if name in CASES else MORE_CASES
        if reason := missing_feature(cases[name]):
            pytest.skip(reason)
        if (key := cases is CASES) not in started:
            folder = tmp_path_factory.mktemp("distributed")
            started[key] = (folder, start(folder, cases))
        folder, results = started[key]
        for rank in results[name]:
            assert "error" not in rank, rank["error"]
        return Outcome({"name": name, **cases[name]}, results[name], folder)

    return look_up


def assert_below(differences: dict[str, float], allowed: float) -> None:
    too_large = {name: value for name, value in differences.items() if not value <= allowed}
    assert not too_large, f"more than {allowed:.1e}: {too_large}"


def assert_sharded(outcome: Outcome) -> None:
    """Every parameter but those that the plan leaves whole lies in pieces that add up to it; experts as planned."""
    distributed = outcome.case["distributed"]
    left_whole = "nothing" if "fsdp_size" in distributed else r"mlp\.gate\.|norm\.|o_proj\.bias"
    for name, (shape, _, _) in outcome.ranks[0]["pieces"].items():
        held = [rank["pieces"][name][1] for rank in outcome.ranks]
        if re.search(left_whole, name):
            assert held in ([None, None], [shape, shape]), name
        else:
            assert None not in held, f"{name} is no DTensor"
            sizes = [math.prod(piece) for piece in held]
            assert max(sizes) < sum(sizes) == math.prod(shape), f"{name} is {shape}, and held are {held}"
    for tensor, by_tp, by_expert in (
        ("gate_up_proj", [EXPERTS, 24, 32], [EXPERTS // 2, 48, 32]),
        ("down_proj", [EXPERTS, 32, 12], [EXPERTS // 2, 32, 24]),
    ):
        _, held, axes = outcome.ranks[0]["pieces"][f"model.layers.1.mlp.experts.{tensor}"]
        if "ep_size" in distributed:
            expected = (by_expert, "ep")
        else:
            expected = (by_expert, "fsdp") if "fsdp_size" in distributed else (by_tp, "tp")
        assert (held, axes[-1]) == expected


@pytest.mark.parametrize("name", of_kind("step"))
def test_forward_and_backward(outcome, name):
    """Logits, loss and gradients of a padded batch, without and with the balancing loss.

    Where each process has a part of the batch, `eval` is beside one process with all of it, and `train` beside one
    process with the parts in turn: balance is a matter of each part.
    """
    seen = outcome(name)
    assert_sharded(seen)
    mixed = "reference" in seen.case
    for rank in seen.ranks:
        for mode in ("eval", "train"):
            measured = rank[mode]
            assert_below({"logits": measured["logits"], "with gradients": measured["logits with gradients"]}, EXACT)
            assert measured["loss"] < EXACT
            assert_below(measured["gradients"], BF16 if mixed else GRADIENT)
            assert measured["gradient dtypes"] == ["torch.float32"]
        balancing = rank["train"]["loss value"] - rank["eval"]["loss value"]
        assert balancing > 0.5  # 0.5 for each of two layers, roughly


@pytest.mark.parametrize("name", of_kind("generate"))
def test_generate(outcome, name):
    seen = outcome(name)
    assert_sharded(seen)
    for rank in seen.ranks:
        assert rank["same tokens"]
        assert rank["scores"] < EXACT


def code_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.py")}


@pytest.mark.parametrize("name", of_kind("save"))
def test_saved_from_two_processes_and_loaded_by_one(outcome, name):
    """The checkpoint is the one that was loaded, with its code: the same names and bits.

    One name may come on top: transformers gathers a tied head and writes it beside the embeddings.
    """
    seen = outcome(name)
    assert_sharded(seen)
    assert code_of(seen.saved) == code_of(seen.original)
    config = json.loads((seen.saved / "config.json").read_text())
    assert config == json.loads((seen.original / "config.json").read_text())
    ours, expected = tensors_of(seen.saved), tensors_of(seen.original)
    if "lm_head.weight" not in expected:
        assert torch.equal(ours.pop("lm_head.weight", expected[EMBEDDINGS]), expected[EMBEDDINGS])
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    model, info = BTXForCausalLM.from_pretrained(seen.saved, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, BTXForCausalLM.from_pretrained(seen.original)(ids).logits)


@pytest.mark.parametrize("name", of_kind("trainer"))
def test_trainer(outcome, name):
    """Two steps of two processes, each accumulating two sequences, are two steps of one process.

    The language model's loss is that of the whole batch at once. Balancing is beside the same sequences in turn.
    Sequences differ in length: a mean over processes or micro-batches of their means would be something else.
    """
    seen = outcome(name)
    if not seen.ranks[0]["counts shifted labels"]:
        pytest.skip("this transformers' Trainer counts labels that are not predicted")
    if seen.case.get("distributed"):
        assert_sharded(seen)
    else:
        assert seen.ranks[0]["wrapper"] == "DistributedDataParallel"
    for rank in seen.ranks:
        assert len(rank["loss"]) == len(rank["gradients"]) == 2
        assert max(rank["loss"]) < EXACT
        for gradients in rank["gradients"]:
            assert_below(gradients, GRADIENT)
        assert_below(rank["saved"], EXACT)
    assert code_of(seen.saved) == code_of(seen.original)


# --- the plans, without processes ------------------------------------------------------------------------------


def generic_names(model: torch.nn.Module) -> set[str]:
    """Modules and parameters, with `*` for the layer's number, as plans name them."""
    names = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
    return {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}


@pytest.mark.parametrize("kind", ["tp", "ep", "fsdp", "pp"])
def test_every_rule_of_a_plan_names_a_part_of_the_model(kind):
    model = tiny_btx()
    plan = getattr(model, f"_{kind}_plan", None) or {}
    if not plan:
        pytest.skip(f"this transformers' models have no {kind} plan")
    assert plan.keys() <= generic_names(model)


@pytest.mark.parametrize("kind", ["tp", "ep"])
def test_plans_shard_every_expert(kind):
    """Left out of a plan, the experts would be whole on every process, and no output would tell."""
    plan = getattr(BTXConfig, f"base_model_{kind}_plan")
    parameters = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in tiny_btx().model.named_parameters()}
    experts = {name for name in parameters if ".experts." in name}
    assert len(experts) == 2
    assert experts <= plan.keys()
    assert "layers.*.mlp.experts" in plan


@pytest.mark.parametrize("kind", ["tp", "fsdp", "pp"])
def test_plans_for_everything_but_the_experts_are_llamas(kind):
    """Attention, embeddings and head; also where a version of transformers has no rule for one of them."""
    plans = [getattr(model, f"_{kind}_plan", None) or {} for model in (tiny_btx(), LlamaForCausalLM(tiny_config()))]
    ours, llamas = ({name: rule for name, rule in plan.items() if ".mlp." not in name} for plan in plans)
    assert ours == llamas
