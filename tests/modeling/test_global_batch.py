"""`router_aux_loss_scope="global_batch"`: balance over all micro-batches of a step and all ranks (2501.11873).

The value is `E * sum_i U_i P_i` of the token-weighted means so far; a call's own gradient goes through its own u and
p, with the other factor taken as constant: `E * sum_i (P_i du_i + U_i dp_i)`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from btx_merge.modeling import BTXConfig

from tests.modeling.test_balancing import in_float64, random_logits
from tests.support import two_ranks, warm
from tests.support.models import EXPERTS, Routed, given_logits, slow_balancing_loss, slow_shares, tiny_btx, tokens

Call = tuple[Sequence[torch.Tensor], Routed]


def slow_global_loss(
    config: BTXConfig, steps: Sequence[Sequence[Call]]
) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Per step, in which every rank makes one call: the value, and per rank what has its call's gradient."""
    values, parts = [], []
    for now in range(len(steps)):
        value, own = torch.zeros((), dtype=torch.float64), [0.0 for _ in steps[now]]
        for layer in range(config.num_hidden_layers):
            shares = [
                [slow_shares(config, logits[layer], layer, routed) for logits, routed in step]
                for step in steps[: now + 1]
            ]
            seen = [call for step in shares for call in step]
            count = sum(n for _, _, n in seen)
            for e in range(EXPERTS):
                mean_u = sum(n / count * u[e].detach() for u, _, n in seen)
                mean_p = sum(n / count * p[e].detach() for _, p, n in seen)
                value = value + EXPERTS * mean_u * mean_p
                for rank, (u, p, _) in enumerate(shares[now]):
                    own[rank] = own[rank] + EXPERTS * (mean_p * u[e] + mean_u * p[e])
        values.append(value)
        parts.append(own)
    return values, parts


def assert_close(ours: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-5) -> None:
    """A few roundings of float32."""
    torch.testing.assert_close(ours.double(), expected.detach().double(), atol=1e-6, rtol=rtol)


# --- one process, several micro-batches ------------------------------------------------------------------------

MASKS = [
    torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
    torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]),
    torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]),
]


def train(model: Any, batches: Sequence[Sequence[int]], **options: Any) -> list[dict[str, Any]]:
    """Every batch names the masks of its micro-batches."""
    results: list[dict[str, Any]] = []
    for batch in batches:
        labels = [tokens(2, 5).masked_fill(MASKS[number] == 0, -100) for number in batch]
        items = sum(int((label[:, 1:] != -100).sum()) for label in labels)
        for number, label in zip(batch, labels, strict=True):
            layers = random_logits(10, seed=len(results))
            call = {"attention_mask": MASKS[number], "num_items_in_batch": items, "labels": label, **options}
            with given_logits(model, layers):
                out = model(tokens(2, 5), output_router_logits=True, use_cache=False, **call)
                out.loss.backward()  # here, for what is run again must find the same logits
            share = int((label[:, 1:] != -100).sum()) / items
            results.append({"value": out.aux_loss, "loss": out.loss, "layers": layers, "share": share})
    return results


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"router_grad": "dense"}, {"router_type": "switch"}, {"router_type": "soft"}], ids=str
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
def test_accumulated_micro_batches(changes, checkpointing):
    """A small batch, a larger one that it would fit into, two more: each begins anew."""
    batches = [[2], [0, 1, 2], [2, 0], [1]]
    results = {}
    for coefficient in (0.5, 0.0):
        model = tiny_btx(**changes, router_aux_loss_scope="global_batch", router_aux_loss_coef=coefficient).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        results[coefficient] = train(model, batches)
    first = 0
    for batch in batches:
        ours, plain = (results[coefficient][first : first + len(batch)] for coefficient in (0.5, 0.0))
        first += len(batch)
        slow = [in_float64(one["layers"]) for one in ours]
        steps = [[(layers, Routed(True, MASKS[n]))] for layers, n in zip(slow, batch, strict=True)]
        values, parts = slow_global_loss(model.config, steps)
        for one, without, value, (part,), layers in zip(ours, plain, values, parts, slow, strict=True):
            assert_close(one["value"], value)
            assert_close(one["loss"] - without["loss"], 0.5 * one["share"] * value)
            (0.5 * one["share"] * part).backward()
            for mine, other, reference in zip(one["layers"], without["layers"], layers, strict=True):
                assert_close(mine.grad - other.grad, reference.grad)


def test_one_micro_batch_is_the_same_in_both_scopes():
    results = [train(tiny_btx(router_aux_loss_scope=scope).train(), [[1], [2]]) for scope in SCOPES]
    for one, other in zip(*results, strict=True):
        assert_close(one["value"], other["value"], rtol=1e-6)
        assert_close(one["loss"], other["loss"], rtol=1e-6)
        for mine, theirs in zip(one["layers"], other["layers"], strict=True):
            assert_close(mine.grad, theirs.grad)


SCOPES = ["micro_batch", "global_batch"]


@pytest.mark.parametrize("scope", SCOPES)
def test_without_a_number_of_items_every_call_is_by_itself(scope):
    model = tiny_btx(router_aux_loss_scope=scope).train()
    for one, number in zip(train(model, [[0, 1], [2]], num_items_in_batch=None), [0, 1, 2], strict=True):
        slow = in_float64(one["layers"])
        assert_close(one["value"], slow_balancing_loss(model.config, slow, Routed(True, MASKS[number])))


def test_evaluation_in_between_is_by_itself_and_changes_nothing():
    model = tiny_btx(router_aux_loss_scope="global_batch", router_aux_loss_coef=0.5).train()
    expected = train(model, [[0, 1, 2]])
    layers = random_logits(10, seed=9)

    def evaluate(*_: Any) -> None:
        handle.remove()
        model.eval()
        with given_logits(model, layers), torch.no_grad():
            out = model(tokens(2, 5), labels=tokens(2, 5), output_router_logits=True, num_items_in_batch=100)
        evaluations.append(out.aux_loss)
        model.train()

    evaluations: list[torch.Tensor] = []
    handle = model.register_forward_hook(evaluate)  # after the first micro-batch
    ours = train(model, [[0, 1, 2]])
    assert_close(evaluations[0], slow_balancing_loss(model.config, in_float64(layers)))
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one["value"], other["value"])


# --- two processes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Started once; one result per rank."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.support.two_ranks", folder]
    ran = warm.run(command, cwd=Path(__file__).parents[2], timeout=180, level="package")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(two_ranks.RANKS)]


def slow_steps(*steps: int) -> list[list[Call]]:
    return [
        [
            (in_float64(two_ranks.some_logits(rank, step)), Routed(True, two_ranks.some_mask(rank, step)))
            for rank in range(two_ranks.RANKS)
        ]
        for step in steps
    ]


@pytest.mark.parametrize(("scenario", "changes"), [("one call", {}), ("dense", {"router_grad": "dense"})])
def test_two_ranks(ranks, scenario, changes):
    steps = slow_steps(0)
    (value,), (parts,) = slow_global_loss(tiny_btx(**changes).config, steps)
    for rank, (part, (layers, _)) in enumerate(zip(parts, steps[0], strict=True)):
        assert_close(ranks[rank][scenario]["value"], value)
        part.backward()
        for mine, reference in zip(ranks[rank][scenario]["gradients"], layers, strict=True):
            assert_close(mine, reference.grad)


def test_two_ranks_keep_to_themselves_in_the_micro_batch_scope(ranks):
    config = tiny_btx().config
    for rank, (layers, routed) in enumerate(slow_steps(0)[0]):
        expected = slow_balancing_loss(config, layers, routed)
        assert_close(ranks[rank]["micro"]["value"], expected)
        expected.backward()
        for mine, reference in zip(ranks[rank]["micro"]["gradients"], layers, strict=True):
            assert_close(mine, reference.grad)
    assert (ranks[0]["micro"]["value"] - ranks[1]["micro"]["value"]).abs() > 1e-2


def test_two_ranks_accumulate(ranks):
    """The number of items is that of all ranks; so is the end of a batch."""
    config = tiny_btx().config
    for batch in ([0, 1], [2]):
        steps = slow_steps(*batch)
        values, parts = slow_global_loss(config, steps)
        for step, calls, value, own in zip(batch, steps, values, parts, strict=True):
            for rank, (layers, _) in enumerate(calls):
                ours, plain = ranks[rank]["with"][step], ranks[rank]["without"][step]
                tokens = [int(some_routed.mask.sum()) for _, some_routed in calls]
                both = sum(two_ranks.labelled(other, step) for other in range(two_ranks.RANKS))
                share = tokens[rank] / sum(tokens) * both / two_ranks.items_of(step)
                weight = two_ranks.COEFFICIENT * share
                assert_close(ours["value"], value)
                assert_close(ours["loss"] - plain["loss"], weight * value)
                (weight * own[rank]).backward()
                for mine, other, reference in zip(ours["gradients"], plain["gradients"], layers, strict=True):
                    assert_close(mine - other, reference.grad)


def test_the_mean_over_ranks_with_equal_counts_is_the_gradient_of_the_whole_batch(ranks):
    model = tiny_btx().train()
    model(tokens(4, 6), output_router_logits=True).aux_loss.backward()
    for layer, (mine, theirs) in zip(model.model.layers, zip(*(r["equal"] for r in ranks), strict=True), strict=True):
        assert (mine - theirs).abs().max() > 1e-3
        assert_close((mine + theirs) / 2, layer.mlp.gate.weight.grad, rtol=1e-4)


def test_counts_of_a_rank_survive_distributed_data_parallel(ranks):
    """Loads of 10, 14, 7 and 0 in two forwards: DDP hands rank 0's buffers to all ranks before each."""
    for rank in ranks:
        for bias in rank["ddp"]:
            torch.testing.assert_close(bias, torch.tensor([-0.25, -0.25, 0.25, 0.25]))


def test_the_selection_bias_follows_the_load_of_all_ranks(ranks):
    """Loads of 10, 4, 10 and 0: the mean is 6."""
    for rank in ranks:
        for bias in rank["bias"]:
            torch.testing.assert_close(bias, torch.tensor([-0.25, 0.25, -0.25, 0.25]))
