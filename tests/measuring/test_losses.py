"""The losses of windows, against a plain loop in float64: one window at a time, without padding."""

from __future__ import annotations

import random

import pytest
import torch

from btx_merge.measuring import losses
from btx_merge.measuring.windows import windows_of
from tests.support.common import WORDS, load_float32, tiny_tokenizer


def documents() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS[:100], k=rng.randint(1, 60))) for _ in range(40)]


def slow_losses(model, window, **call) -> list[float]:
    """The definition: -log p(token | the window's tokens before it), softmax in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([window.ids]), **call).logits[0].double()  # [C + T, V]
    first = len(window.ids) - window.scored
    return [
        float(torch.logsumexp(logits[place - 1], 0) - logits[place - 1, window.ids[place]])
        for place in range(first, len(window.ids))
    ]


def assert_as_slow(model, found, **call) -> None:
    exact = {window: slow_losses(model.double(), window, **call) for window, _ in found}
    for window, ours in found:
        torch.testing.assert_close(
            ours.double(), torch.tensor(exact[window], dtype=torch.float64), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("tokens", [1, 40, 1000])
def test_losses_are_those_of_a_plain_loop(family, tokens):
    model = load_float32(family.code)
    windows = list(windows_of(documents(), tiny_tokenizer(), 16))
    found = list(losses.token_losses(model, windows, tokens))
    assert sorted(window.ids for window, _ in found) == sorted(window.ids for window in windows)
    assert_as_slow(model, found)


def test_a_merged_model_may_be_told_which_experts_run(merged):
    model = load_float32(merged)
    windows = list(windows_of(documents()[:10], tiny_tokenizer(), 16))
    found = list(losses.token_losses(model, windows, 64, active_experts=["math"]))
    model.set_experts_implementation("eager")  # grouped_mm knows no float64
    assert_as_slow(model, found, active_experts=["math"])


def test_a_model_whose_logits_are_no_plain_head_has_its_own(family, monkeypatch):
    monkeypatch.setattr(losses, "_PLAIN_HEADS", ())
    monkeypatch.setattr(losses, "_NUMBERS_AT_ONCE", 1000)  # several parts, the last of them not full
    model = load_float32(family.code)
    windows = list(windows_of(documents()[:10], tiny_tokenizer(), 16))
    assert_as_slow(model, list(losses.token_losses(model, windows, 64)))


def test_a_model_with_scaled_logits_is_not_taken_for_one_with_a_plain_head():
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        logit_scale=0.3,
        max_position_embeddings=64,
    )
    model = CohereForCausalLM(config).eval()
    windows = list(windows_of(documents()[:5], tiny_tokenizer(), 16))
    assert_as_slow(model, list(losses.token_losses(model, windows, 64)))


def test_batches_hold_every_window_and_no_more_than_they_may():
    windows = list(windows_of(documents(), tiny_tokenizer(), 16))
    made = list(losses.batches(iter(windows), 48))
    assert sorted(w.ids for batch in made for w in batch.windows) == sorted(w.ids for w in windows)
    for batch in made:
        assert batch.ids.numel() <= 48
        for row, window in enumerate(batch.windows):
            assert batch.ids[row][batch.mask[row] == 1].tolist() == list(window.ids[:-1])
            assert int(batch.is_scored[row].sum()) == window.scored
