"""What the model computes, against a slow reference made of loops and against transformers' Mixtral.

Legend: B batch, T tokens, N = B * T, H hidden, E experts, K experts per token, L layers, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from btx_merge.modeling import BTXConfig, BTXForCausalLM
from btx_merge.modeling.modeling_btx import load_balancing_loss
from transformers import MixtralConfig, MixtralForCausalLM

EXPERTS = 4
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def tiny_btx(**changes) -> BTXForCausalLM:
    """Weights large enough for every part to matter: logits of about 1, gates that decide, experts that differ."""
    values = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model = BTXForCausalLM(BTXConfig(**{**values, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(1))


# --- the slow reference: one token, one head, one expert at a time, in float64 ---------------------------------


def slow_logits(config: BTXConfig, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of Llama with section 3.2's layer in place of its feed-forward block."""
    return torch.stack([slow_sequence(config, weights, row) for row in ids])


def slow_sequence(config: BTXConfig, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    hidden = [weights["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        normed = [rms_norm(config, x, own["input_layernorm.weight"]) for x in hidden]
        hidden = [x + a for x, a in zip(hidden, slow_attention(config, own, normed), strict=True)]
        normed = [rms_norm(config, x, own["post_attention_layernorm.weight"]) for x in hidden]
        hidden = [x + slow_experts(config, own, y) for x, y in zip(hidden, normed, strict=True)]
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return torch.stack([head @ rms_norm(config, x, weights["model.norm.weight"]) for x in hidden])


def rms_norm(config: BTXConfig, x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    return gamma * x / torch.sqrt((x * x).mean() + config.rms_norm_eps)


def slow_attention(config: BTXConfig, own: dict[str, torch.Tensor], xs: list[torch.Tensor]) -> list[torch.Tensor]:
    size = config.head_dim
    groups = config.num_attention_heads // config.num_key_value_heads

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        return own[f"self_attn.{name}.weight"] @ x + own.get(f"self_attn.{name}.bias", 0)

    def rotate(x: torch.Tensor, position: int) -> torch.Tensor:  # pairs (i, i + size / 2)
        frequency = [10000.0 ** (-2 * i / size) for i in range(size // 2)]
        if config.rope_parameters["rope_type"] == "llama3":
            frequency = [llama3(f) for f in frequency]
        cos = torch.tensor([math.cos(position * f) for f in frequency], dtype=x.dtype)
        sin = torch.tensor([math.sin(position * f) for f in frequency], dtype=x.dtype)
        first, second = x[: size // 2], x[size // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin])

    def llama3(frequency: float) -> float:
        length = 2 * math.pi / frequency
        if length < 16 / 4:
            return frequency
        if length > 16 / 1:
            return frequency / 4
        share = (16 / length - 1) / (4 - 1)
        return (1 - share) * frequency / 4 + share * frequency

    out = []
    for t, x in enumerate(xs):
        heads = []
        for head in range(config.num_attention_heads):
            shared = head // groups
            query = rotate(project("q_proj", x)[head * size : (head + 1) * size], t)
            scores, values = [], []
            for s in range(t + 1):
                key = rotate(project("k_proj", xs[s])[shared * size : (shared + 1) * size], s)
                values.append(project("v_proj", xs[s])[shared * size : (shared + 1) * size])
                scores.append(query @ key / math.sqrt(size))
            weight = torch.softmax(torch.stack(scores), 0)
            heads.append(sum(w * v for w, v in zip(weight, values, strict=True)))
        out.append(project("o_proj", torch.cat(heads)))
    return out


def slow_experts(config: BTXConfig, own: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    logits = own["mlp.gate.weight"] @ x
    chosen = sorted(range(len(logits)), key=lambda e: -logits[e].item())[: config.num_experts_per_tok]
    total = sum(torch.exp(logits[e]) for e in chosen)
    out = torch.zeros_like(x)
    for e in chosen:
        gate, up = own["mlp.experts.gate_up_proj"][e].chunk(2)
        gated = gate @ x
        block = own["mlp.experts.down_proj"][e] @ (gated * torch.sigmoid(gated) * (up @ x))
        out = out + torch.exp(logits[e]) / total * block
    return out


def weights_of(model: BTXForCausalLM) -> dict[str, torch.Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}


VARIANTS = {
    "top 2": {},
    "top 1": {"num_experts_per_tok": 1},
    "all": {"num_experts_per_tok": EXPERTS},
    "one expert": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "wide heads": {"head_dim": 16, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_logits_and_gradients_against_the_slow_reference(variant, implementation):
    """float32 against float64: 1e-5 of the largest value, about ten roundings of a long sum."""
    model = tiny_btx(**VARIANTS[variant])
    model.set_experts_implementation(implementation)
    weights, ids = weights_of(model), tokens()
    expected = slow_logits(model.config, weights, ids)
    ours = model(ids).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(ours.double(), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)

    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * direction).sum().backward()
    (expected * direction.double()).sum().backward()
    for name, parameter in model.named_parameters():
        gradient = weights[name].grad
        assert gradient.abs().max() > 0 or (name.endswith("gate.weight") and model.config.num_experts_per_tok == 1)
        atol = 1e-5 * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(parameter.grad.double(), gradient, atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("experts_per_token", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_parity_with_mixtral(experts_per_token, tied):
    """transformers' Mixtral: softmax over all, top-k, renormalise. The same numbers, with the same weights."""
    model = tiny_btx(num_experts_per_tok=experts_per_token, tie_word_embeddings=tied)
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "dtype")}
    theirs = MixtralForCausalLM(MixtralConfig(**config, sliding_window=None)).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    ids = tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        ours = model(ids, attention_mask=mask).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        model.generate(ids[:, :5], max_new_tokens=8, do_sample=False),
        theirs.generate(ids[:, :5], max_new_tokens=8, do_sample=False),
    )


# --- the balancing loss ----------------------------------------------------------------------------------------


def slow_balancing_loss(layers: list[torch.Tensor], per_token: int, mask: list[int]) -> torch.Tensor:
    """alpha * E * sum_i u_i p_i without alpha, token by token and expert by expert (section 3.2)."""
    total = torch.zeros((), dtype=torch.float64)
    for logits in layers:
        real = [row for row, keep in zip(logits, mask, strict=True) if keep]
        experts = logits.shape[1]
        u, p = [0.0] * experts, [0.0] * experts
        for row in real:
            chosen = sorted(range(experts), key=lambda e: -row[e].item())[:per_token]
            in_chosen, in_all = sum(row[e].exp() for e in chosen), sum(row[e].exp() for e in range(experts))
            for e in range(experts):
                u[e] = u[e] + (row[e].exp() / in_chosen if e in chosen else 0) / len(real)
                p[e] = p[e] + row[e].exp() / in_all / len(real)
        total = total + experts * sum(u[e] * p[e] for e in range(experts))
    return total


@pytest.mark.parametrize("per_token", [1, 2, 3, 4])
@pytest.mark.parametrize("mask", [None, [1] * 7, [1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1]])
def test_balancing_loss_against_the_slow_reference(per_token, mask):
    generator = torch.Generator().manual_seed(per_token)
    layers = [torch.randn(7, EXPERTS, generator=generator, requires_grad=True) for _ in range(3)]
    slow = [logits.detach().double().requires_grad_() for logits in layers]
    ours = load_balancing_loss(tuple(layers), per_token, None if mask is None else torch.tensor(mask))
    expected = slow_balancing_loss(slow, per_token, mask or [1] * 7)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, atol=0, rtol=1e-6)  # a few roundings of float32
    ours.backward()
    expected.backward()
    for mine, reference in zip(layers, slow, strict=True):
        torch.testing.assert_close(mine.grad.double(), reference.grad, atol=1e-7, rtol=1e-5)
        assert reference.grad.abs().max() > 0
        for row, keep in zip(mine.grad, mask or [1] * 7, strict=True):
            assert keep or not row.any()


@pytest.mark.parametrize("per_token", [1, 2, 3, 4])
def test_balancing_loss_is_1_per_layer_at_balance(per_token):
    """Every expert is first, second, ... equally often. For each K, not K itself as with Mixtral's loss."""
    turns = torch.tensor([[3.0, 1.0, -0.5, -2.0]]).repeat(4, 1)
    balanced = torch.stack([row.roll(shift) for shift, row in enumerate(turns)])
    assert load_balancing_loss((balanced,), per_token).item() == pytest.approx(1, abs=1e-6)
    assert load_balancing_loss((balanced, balanced.flip(0)), per_token).item() == pytest.approx(2, abs=1e-6)


def test_balancing_loss_at_collapse():
    """Every token to expert 2 with certainty: E. With K equal shares of it, still above balance."""
    collapsed = torch.zeros(5, EXPERTS)
    collapsed[:, 2] = 50
    assert load_balancing_loss((collapsed,), 1).item() == pytest.approx(EXPERTS, abs=1e-5)
    assert load_balancing_loss((collapsed,) * 3, 2).item() == pytest.approx(3 * EXPERTS, abs=1e-5)


def test_balancing_loss_of_bf16_logits_is_computed_in_float32():
    logits = torch.randn(1000, EXPERTS, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = load_balancing_loss((logits,), 2)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, load_balancing_loss((logits.float(),), 2), atol=0, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    """Logits, loss and balancing loss of a padded batch are those of its sequences alone."""
    model = tiny_btx(pad_token_id=0).train()
    long, short = tokens(1, 11), tokens(1, 7)
    padding = torch.zeros(1, 4, dtype=torch.long)
    padded, real = {
        "left": (torch.cat([padding, short], 1), slice(4, 11)),
        "right": (torch.cat([short, padding], 1), slice(0, 7)),
    }[side]
    ids, mask = torch.cat([long, padded]), torch.ones(2, 11, dtype=torch.long)
    mask[1] = 0
    mask[1, real] = 1
    out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), output_router_logits=True)
    alone = [model(sequence, output_router_logits=True) for sequence in (long, short)]
    torch.testing.assert_close(out.logits[1, real], alone[1].logits[0], atol=1e-5, rtol=0)
    layers = [torch.cat(pair) for pair in zip(*(one.router_logits for one in alone), strict=True)]
    expected = slow_balancing_loss([layer.double() for layer in layers], 2, [1] * 18)
    torch.testing.assert_close(out.aux_loss.double(), expected, atol=0, rtol=1e-5)
    assert [tuple(layer.shape) for layer in out.router_logits] == [(22, EXPERTS)] * 2
    unmasked = load_balancing_loss(out.router_logits, 2)
    assert (unmasked - out.aux_loss).abs() > 1e-3  # it would have counted


def test_the_mask_of_a_continued_sequence_is_the_last_tokens_part():
    """With a cache the mask covers what came before too; the router has seen the new tokens only."""
    model = tiny_btx(pad_token_id=0)
    ids = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens(1, 7)], 1), tokens(1, 11)])
    mask = (ids != 0).long()
    with torch.no_grad():
        cache = model(ids[:, :2], attention_mask=mask[:, :2], use_cache=True).past_key_values
        out = model(ids[:, 2:], attention_mask=mask, past_key_values=cache, output_router_logits=True)
    expected = slow_balancing_loss([layer.double() for layer in out.router_logits], 2, [0, 0] + [1] * 16)
    torch.testing.assert_close(out.aux_loss.double(), expected, atol=0, rtol=1e-5)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("requested", [None, False, True])
@pytest.mark.parametrize("in_config", [False, True])
def test_balancing_joins_the_loss_in_training_whatever_is_put_out(requested, in_config):
    model = tiny_btx(router_aux_loss_coef=0.5, output_router_logits=in_config)
    ids = tokens()
    evaluated = model(ids, labels=ids, output_router_logits=requested)
    plain = cross_entropy(evaluated.logits, ids)
    torch.testing.assert_close(evaluated.loss, plain, atol=1e-6, rtol=0)  # never in evaluation

    model.train()
    trained = model(ids, labels=ids, output_router_logits=requested)
    balancing = load_balancing_loss(model(ids, output_router_logits=True).router_logits, 2)
    assert balancing > 2
    torch.testing.assert_close(trained.loss, plain + 0.5 * balancing, atol=1e-5, rtol=0)
    shown = in_config if requested is None else requested
    assert (trained.router_logits is not None) == shown
    assert (evaluated.router_logits is not None) == shown
    assert model(ids, output_router_logits=requested).loss is None  # nor without labels


def test_balancing_trains_the_routers_only_with_a_coefficient():
    ids = tokens()
    gradients = {}
    for coefficient in (0.0, 0.01, 1.0):
        model = tiny_btx(router_aux_loss_coef=coefficient).train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        gradients[coefficient] = model.model.layers[0].mlp.gate.weight.grad
        if coefficient == 0:
            torch.testing.assert_close(loss, cross_entropy(model(ids).logits, ids), atol=1e-6, rtol=0)
            assert model(ids, labels=ids).aux_loss is None  # and costs nothing
    added = gradients[1.0] - gradients[0.0]
    assert added.abs().max() > 1e-4
    torch.testing.assert_close(gradients[0.01] - gradients[0.0], 0.01 * added, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_accumulated_micro_batches_are_the_token_weighted_mean(as_tensor):
    """As Trainer calls it: every part divides by the number of labelled tokens in all parts."""
    model = tiny_btx(router_aux_loss_coef=0.3).train()
    ids = tokens(2, 11)
    parts = [(ids[:1], ids[:1].clone()), (ids[1:], ids[1:].clone())]
    parts[1][1][:, :8] = -100
    counts = [10, 3]  # labels that are predicted
    separate = [model(part, labels=labels) for part, labels in parts]
    expected = sum(count / 13 * out.loss for count, out in zip(counts, separate, strict=True))
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    items = torch.tensor(13) if as_tensor else 13
    together = [model(part, labels=labels, num_items_in_batch=items).loss for part, labels in parts]
    torch.testing.assert_close(sum(together), expected, atol=1e-6, rtol=0)
    for loss in together:
        loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)


# --- checkpointing ---------------------------------------------------------------------------------------------


def gradients_of(model: BTXForCausalLM) -> dict[str, torch.Tensor]:
    ids = tokens()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


SWITCHES = [name for name in ("gradient", "activation") if hasattr(BTXForCausalLM, f"{name}_checkpointing_enable")]


def switch_on(model: BTXForCausalLM, name: str, kwargs: dict | None) -> None:
    getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": kwargs})


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}])
def test_gradient_checkpointing_gives_the_same_gradients(switch, kwargs):
    """The same operations are run again: equal to the last bit, up to the order in which experts are added."""
    model = tiny_btx(router_aux_loss_coef=1.0).train()
    expected = gradients_of(model)
    switch_on(model, switch, kwargs)
    assert model.model.layers[0].gradient_checkpointing
    ours = gradients_of(model)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], atol=1e-6, rtol=1e-5)
    without_balancing = tiny_btx(router_aux_loss_coef=0.0).train()
    name = "model.layers.0.mlp.gate.weight"
    assert (gradients_of(without_balancing)[name] - expected[name]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize(
    "kwargs", [{"use_reentrant": True}, {}, {"preserve_rng_state": True}, {"use_reentrant": None}]
)
def test_reentrant_checkpointing_is_refused(switch, kwargs):
    """torch's default is reentrant, so leaving it open is refused too: PEFT calls with an empty dict."""
    model = tiny_btx().train()
    with pytest.raises(ValueError, match=r"routers' gradients.*'use_reentrant': False"):
        switch_on(model, switch, kwargs)
    with pytest.raises(ValueError, match="use_reentrant"):
        switch_on(model.model, switch, kwargs)
    assert not model.model.layers[0].gradient_checkpointing


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_(en|dis)able. is deprecated")
def test_gradient_checkpointing_can_be_switched_off():
    model = tiny_btx().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.gradient_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


# --- experts' implementations, and using a model ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token", [1, 2, 4])
def test_experts_implementations_agree(dtype, per_token):
    """float32: the order of a sum. bf16: a few of its roundings, 2**-8 each, on logits of up to about 5."""
    model = tiny_btx(num_experts_per_tok=per_token)
    assert model.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        exact = model(tokens()).logits
        model.to(dtype)
        outputs = {}
        for implementation in IMPLEMENTATIONS:
            model.set_experts_implementation(implementation)
            outputs[implementation] = model(tokens()).logits
            assert outputs[implementation].dtype == dtype
    if dtype == torch.float32:
        for output in outputs.values():
            torch.testing.assert_close(output, exact, atol=1e-5, rtol=0)
    else:  # a token may choose another expert where two router logits are close: the median is what bf16 costs
        for output in outputs.values():
            assert (output.float() - exact).abs().median() < 8 * 2**-8


def test_eager_forward_runs_no_expert_without_tokens():
    """An expert that nobody chooses gets a gradient of zero, not none: optimisers and DDP need that."""
    model = tiny_btx(num_experts_per_tok=1)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = layer.mlp.gate.weight[:3].mean(dim=0)  # never the largest
    model(tokens()).logits.sum().backward()
    gradient = model.model.layers[0].mlp.experts.down_proj.grad
    assert not gradient[3].any()
    assert gradient[:3].any()


def test_another_number_of_experts_per_token_takes_effect_on_a_loaded_model(tmp_path):
    tiny_btx().save_pretrained(tmp_path)
    model = BTXForCausalLM.from_pretrained(tmp_path)
    ids = tokens()
    with torch.no_grad():
        for per_token in (1, 2, 3, 4):
            model.config.num_experts_per_tok = per_token
            expected = slow_logits(model.config, weights_of(model), ids)
            torch.testing.assert_close(model(ids).logits.double(), expected, atol=1e-4, rtol=0)
        at_load = BTXForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=1)
        model.config.num_experts_per_tok = 1
        torch.testing.assert_close(at_load(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_generate_with_and_without_cache(tied):
    model = tiny_btx(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    ids = tokens(2, 6)
    expected = ids
    with torch.no_grad():
        for _ in range(10):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    torch.testing.assert_close(model.generate(ids, **options), expected)
    torch.testing.assert_close(model.generate(ids, **options, use_cache=False), expected)


def test_generate_a_left_padded_batch():
    model = tiny_btx(pad_token_id=0)
    short, long = tokens(1, 5), tokens(1, 9)
    ids = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1), long])
    mask = (ids != 0).long()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, **options)[:, 9:]
    alone = [model.generate(one, **options)[0, one.shape[1] :] for one in (short, long)]
    torch.testing.assert_close(together, torch.stack(alone))


def test_outputs():
    model = tiny_btx()
    out = model(tokens(), output_hidden_states=True, output_router_logits=True, logits_to_keep=2)
    assert out.logits.shape == (2, 2, 61)
    assert [tuple(state.shape) for state in out.hidden_states] == [(2, 11, 32)] * 3
    assert [tuple(logits.shape) for logits in out.router_logits] == [(22, EXPERTS)] * 2
    torch.testing.assert_close(out.logits, model(tokens()).logits[:, -2:])
    as_tuple = model(tokens(), return_dict=False)
    torch.testing.assert_close(as_tuple[0], model(tokens()).logits)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks for it
def test_router_logits_are_the_ones_that_route_also_under_a_lora():
    """Recorded at the gate, a LoRA on the gate would be missing from them, and from the balancing loss."""
    from peft import LoraConfig, get_peft_model

    model = tiny_btx(router_aux_loss_coef=1.0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["gate"], init_lora_weights=False))
    inputs = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    out = adapted(tokens(), output_router_logits=True)
    for layer, hidden, logits in zip(model.model.layers, inputs, out.router_logits, strict=True):
        gate = layer.mlp.gate
        delta = gate.scaling["default"] * gate.lora_B["default"].weight @ gate.lora_A["default"].weight
        expected = hidden @ (gate.base_layer.weight + delta).T
        assert delta.abs().max() > 0.01
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    adapted.train()(tokens(), labels=tokens()).loss.backward()
    assert model.model.layers[0].mlp.gate.lora_A["default"].weight.grad.abs().max() > 0


def test_new_models_are_initialised_everywhere():
    """Nothing is left as torch.empty had it."""
    torch.manual_seed(0)
    model = BTXForCausalLM(tiny_btx(initializer_range=0.02, hidden_size=64, intermediate_size=128).config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        else:  # 20 standard errors of the smallest tensor's deviation
            assert parameter.std().item() == pytest.approx(0.02, rel=0.25), name
