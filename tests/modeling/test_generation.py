"""`generate` in every way of decoding and with every cache, held against forward passes over the whole text.

Legend: B batch, T tokens, H hidden, L layers, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from btx_merge.modeling import BTXForCausalLM
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    pipeline,
)
from transformers.integrations.executorch import convert_and_export_with_cache

from tests.support.common import VOCAB, tiny_tokenizer
from tests.support.models import tiny_btx, tokens

NEW = 8
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 0},
    "beams": {"num_beams": 3},
    "sampled beams": {"do_sample": True, "top_k": 0, "num_beams": 3},
}
CACHES = {
    "none": {"use_cache": False},
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static"},
}
after_5_0 = pytest.mark.skipif(
    not hasattr(GenerationMixin, "_prepare_position_ids_for_generation"),
    reason="does not work in transformers 5.0, with no model",
)


def endless_btx(**changes: Any) -> BTXForCausalLM:
    """It knows a padding token and no last token, so every text gets as long as it may."""
    return tiny_btx(**{"pad_token_id": 0, "eos_token_id": None, **changes})


def generate(model: Any, ids: torch.Tensor | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **options})


# --- slow references: the whole text goes through the model for every token ------------------------------------


def slow_greedy(model: BTXForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def slow_sampled(model: BTXForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    for _ in range(NEW):
        likelihood = model(ids, use_cache=False).logits[:, -1].softmax(dim=-1)
        ids = torch.cat([ids, torch.multinomial(likelihood, 1)], dim=1)
    return ids


def slow_beams(model: BTXForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Of each prompt's three likeliest texts every continuation is looked at, and the three likeliest are kept."""
    best = []
    for prompt in ids:
        kept = [(0.0, prompt)]
        for _ in range(NEW):
            longer = []
            for score, text in kept:
                likelihood = model(text[None], use_cache=False).logits[0, -1].log_softmax(dim=-1)
                longer += [
                    (score + one.item(), torch.cat([text, one.new_tensor([token], dtype=torch.long)]))
                    for token, one in enumerate(likelihood)
                ]
            kept = sorted(longer, key=lambda pair: -pair[0])[:3]
        best.append(kept[0][1])
    return torch.stack(best)


SLOW = {"greedy": slow_greedy, "sampled": slow_sampled, "beams": slow_beams}


@pytest.fixture(scope="module")
def model() -> BTXForCausalLM:
    return endless_btx()


@pytest.fixture(scope="module")
@torch.no_grad()
def expected(model) -> dict[str, torch.Tensor]:
    return {way: slow(model, tokens(2, 6)) for way, slow in SLOW.items()}


@pytest.mark.parametrize("cache", list(CACHES))
@pytest.mark.parametrize("way", list(SLOW))
def test_every_cache_continues_as_the_whole_text_would(model, expected, way, cache):
    torch.testing.assert_close(generate(model, tokens(2, 6), **WAYS[way], **CACHES[cache]), expected[way])
    others = [text for name, text in expected.items() if name != way]
    assert not any(torch.equal(expected[way], other) for other in others)  # or nothing would be seen here


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_sampled_beams_are_those_without_a_cache(model, cache):
    options = {**WAYS["sampled beams"], "num_return_sequences": 2}
    plain = generate(model, tokens(2, 6), **options, use_cache=False)
    assert plain.shape == (4, 6 + NEW)
    torch.testing.assert_close(generate(model, tokens(2, 6), **options, **CACHES[cache]), plain)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_experts_implementation_generates_the_same(model, expected, implementation):
    model = copy.deepcopy(model)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(generate(model, tokens(2, 6)), expected["greedy"])


def test_the_prompt_in_parts(model, expected):
    """Of 4 tokens and 2, into a cache of one's own: transformers 5.0 makes none for a prompt in parts."""
    cache = DynamicCache(config=model.config)
    in_parts = generate(model, tokens(2, 6), prefill_chunk_size=4, past_key_values=cache)
    torch.testing.assert_close(in_parts, expected["greedy"])


@after_5_0
def test_the_prompt_with_its_positions(model, expected):
    with_positions = generate(model, tokens(2, 6), position_ids=torch.arange(6).expand(2, 6))
    torch.testing.assert_close(with_positions, expected["greedy"])


def test_only_the_last_token_of_the_prompt_goes_through_the_head(model):
    seen = []
    hook = model.lm_head.register_forward_pre_hook(lambda head, inputs: seen.append(tuple(inputs[0].shape)))
    generate(model, tokens(2, 6), max_new_tokens=3)
    hook.remove()
    assert seen == [(2, 1, 32)] * 3


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_generate_returns_on_request(way, use_cache):
    """Step by step: the prompt first, then one token each with a cache, and the whole text without."""
    model = endless_btx(attn_implementation="eager")
    asked = ("scores", "logits", "attentions", "hidden_states")
    out = generate(
        model,
        tokens(2, 6),
        **WAYS[way],
        use_cache=use_cache,
        return_dict_in_generate=True,
        **{f"output_{kind}": True for kind in asked},
    )
    rows = 2 * WAYS[way].get("num_beams", 1)
    assert out.sequences.shape == (2, 6 + NEW)
    for kind in asked:
        assert len(getattr(out, kind)) == NEW
    for step in range(NEW):
        keys = 6 + step
        queries = keys if step == 0 or not use_cache else 1
        assert out.scores[step].shape == out.logits[step].shape == (rows, 61)
        assert [tuple(state.shape) for state in out.hidden_states[step]] == [(rows, queries, 32)] * 3
        assert [tuple(layer.shape) for layer in out.attentions[step]] == [(rows, 4, queries, keys)] * 2
        torch.testing.assert_close(model.lm_head(out.hidden_states[step][-1][:, -1]), out.logits[step])
        if rows == 2:  # beams change places
            whole = model(out.sequences[:, :keys]).logits[:, -1]
            torch.testing.assert_close(out.logits[step], whole, atol=1e-5, rtol=0)
    if use_cache:
        cache = out.past_key_values
        assert cache.get_seq_length() == 6 + NEW - 1
        assert [tuple(layer.keys.shape) for layer in cache.layers] == [(rows, 2, 6 + NEW - 1, 8)] * 2
        assert [tuple(layer.values.shape) for layer in cache.layers] == [(rows, 2, 6 + NEW - 1, 8)] * 2
    else:
        assert out.past_key_values is None


def test_router_logits_from_the_config_do_not_disturb(model, expected):
    config = copy.deepcopy(model)
    config.config.output_router_logits = True
    torch.testing.assert_close(generate(config, tokens(2, 6)), expected["greedy"])


# --- continuing, and other inputs than ids ---------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
def test_continuing_from_a_cache_reads_new_tokens_only(model, expected, static):
    cache = StaticCache(config=model.config, max_cache_len=6 + NEW) if static else None
    begun = generate(
        model, tokens(2, 6), max_new_tokens=3, return_dict_in_generate=True, past_key_values=cache, use_cache=True
    )
    seen = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    whole = generate(model, begun.sequences, max_new_tokens=NEW - 3, past_key_values=begun.past_key_values)
    hook.remove()
    torch.testing.assert_close(whole, expected["greedy"])
    assert seen == [1] * (NEW - 3)


def test_continuing_with_words_in_between(model):
    """A conversation: the cache of what was said, and then more than one new token."""
    begun = generate(model, tokens(1, 6), max_new_tokens=3, return_dict_in_generate=True)
    text = torch.cat([begun.sequences, tokens(1, 4)], dim=1)
    continued = generate(model, text, past_key_values=copy.deepcopy(begun.past_key_values))
    torch.testing.assert_close(continued, generate(model, text, use_cache=False))


@pytest.mark.parametrize("cache", list(CACHES))
@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_embeddings_in_place_of_ids(model, expected, way, cache):
    ids = tokens(2, 6)
    options = {**WAYS[way], **CACHES[cache]}
    embeddings = model.get_input_embeddings()(ids).detach()
    continuation = generate(model, inputs_embeds=embeddings, **options)
    torch.testing.assert_close(continuation, expected[way][:, 6:])
    torch.testing.assert_close(generate(model, ids, inputs_embeds=embeddings, **options), expected[way])
    assert not torch.equal(generate(model, inputs_embeds=-embeddings, **options), continuation)


# --- padding and masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", list(CACHES))
@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_a_left_padded_batch_is_its_prompts_alone(way, cache, attention):
    model = endless_btx(attn_implementation=attention)
    short, long = tokens(1, 5), tokens(1, 9)
    ids = torch.cat([torch.nn.functional.pad(short, (4, 0)), long])
    options = {**WAYS[way], **CACHES[cache]}
    together = generate(model, ids, attention_mask=(ids != 0).long(), **options)[:, 9:]
    alone = [generate(model, prompt, **options)[0, prompt.shape[1] :] for prompt in (short, long)]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_three_endings_of_one_text_in_one_row(attention):
    """A mask [B, 1, T, T] of one's own, with positions that belong to it; as a batch of three texts."""
    model = endless_btx(attn_implementation=attention)
    text, endings = tokens(1, 6), torch.tensor([[7], [11], [13]])
    row = torch.cat([text, endings.T], dim=1)
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()
    allowed[6:, 6:] = torch.eye(3, dtype=torch.bool)
    mask = torch.zeros(1, 1, 9, 9).masked_fill(~allowed, torch.finfo(torch.float32).min)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 6, 6]])
    with torch.no_grad():
        packed = model(row, attention_mask=mask, position_ids=positions).logits[0, 6:]
        batch = model(torch.cat([text.expand(3, 6), endings], dim=1)).logits[:, -1]
    torch.testing.assert_close(packed, batch, atol=1e-5, rtol=0)


# --- decoding with a draft -------------------------------------------------------------------------------------


def draft_options(draft: str, model: BTXForCausalLM) -> dict[str, Any]:
    dense = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    torch.manual_seed(3)
    if draft == "its own first layer":
        return {"assistant_early_exit": 1}
    if draft == "the prompt":
        return {"prompt_lookup_num_tokens": 3}
    assistant = {
        "the model itself": lambda: copy.deepcopy(model),
        "a smaller BTX": lambda: tiny_btx(num_hidden_layers=1, num_local_experts=2, pad_token_id=0),
        "a dense Llama": lambda: LlamaForCausalLM(LlamaConfig(**dense)).eval(),
    }[draft]()
    assistant.generation_config.assistant_confidence_threshold = 0  # it drafts on, however unsure
    return {"assistant_model": assistant}


@pytest.mark.parametrize(
    "draft",
    [
        "the model itself",
        "a smaller BTX",
        "a dense Llama",
        pytest.param("its own first layer", marks=after_5_0),
        "the prompt",
    ],
)
def test_a_draft_changes_nothing_but_the_number_of_passes(draft):
    model = tiny_btx(pad_token_id=0)
    plain = generate(model, tokens(1, 12), max_new_tokens=16)
    prompt = torch.cat([plain, plain[:, :14]], dim=1)  # so that there is something to look up
    plain = generate(model, prompt, max_new_tokens=16)
    assert plain.shape == (1, 42 + 16)
    options = draft_options(draft, model)
    passes = []
    hook = model.model.norm.register_forward_hook(lambda *inputs: passes.append(model.config.num_hidden_layers))
    torch.testing.assert_close(generate(model, prompt, max_new_tokens=16, **options), plain)
    hook.remove()
    if draft in ("the model itself", "the prompt"):
        assert len(passes) < (3 if draft == "the model itself" else 16)
    if draft == "its own first layer":
        assert set(passes) == {1, 2}

    last = plain[0, -6].item()
    stopped = generate(model, prompt, max_new_tokens=16, eos_token_id=last, **options)
    torch.testing.assert_close(stopped, generate(model, prompt, max_new_tokens=16, eos_token_id=last))
    assert stopped[0, -1] == last
    assert stopped.shape < plain.shape


# --- compiled and exported -------------------------------------------------------------------------------------


def test_a_static_cache_compiles_to_one_graph(model, expected):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = copy.deepcopy(model)
    compiled = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compiled._compile_all_devices = True  # transformers compiles on accelerators only, unless told
    torch.compiler.reset()
    out = generate(model, tokens(2, 6), cache_implementation="static", compile_config=compiled)
    torch.testing.assert_close(out, expected["greedy"])
    assert len(graphs) == 1


def test_a_decoding_step_exported_with_its_cache(expected):
    """Token by token, first the prompt's and then its own."""
    model = endless_btx()
    model.set_experts_implementation("batched_mm")  # transformers 5.0's grouped_mm does not trace in float32
    cache = {"batch_size": 1, "max_cache_len": 6 + NEW}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=cache)
    step = convert_and_export_with_cache(model, torch.tensor([[1]]), torch.tensor([0])).module()
    text = tokens(2, 6)[:1]
    for position in range(6 + NEW - 1):
        logits = step(input_ids=text[:, position, None], cache_position=torch.tensor([position]))
        if position >= 5:
            text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
    torch.testing.assert_close(text, expected["greedy"][:1])


@after_5_0
def test_continuous_batching(model, expected):
    """Requests of different lengths share a paged cache."""
    from transformers import ContinuousBatchingConfig

    pages = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=32)
    prompts = [*tokens(2, 6).tolist(), tokens(1, 3)[0].tolist()]
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    out = copy.deepcopy(model).generate_batch(prompts, settings, pages)
    said = [out[f"req_{number}"].generated_tokens for number in range(3)]
    assert said[:2] == expected["greedy"][:, 6:].tolist()
    assert said[2] == generate(model, tokens(1, 3))[0, 3:].tolist()


# --- the pipeline ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator():
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "left", "</s>"
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    model = tiny_btx(vocab_size=VOCAB, bos_token_id=VOCAB - 2, eos_token_id=VOCAB - 1)
    return pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")


def test_pipeline_says_what_generate_says(generator):
    ids = generator.tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    words = generator.tokenizer.decode(generate(generator.model, ids)[0, 3:], skip_special_tokens=True)
    [said] = generator("w1 w2 w3", max_new_tokens=NEW, do_sample=False, return_full_text=False)
    assert said["generated_text"].split() == words.split()
    assert words.split()


def test_pipeline_batches_prompts_of_different_lengths(generator):
    prompts = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w10"]
    options = {"max_new_tokens": NEW, "do_sample": False}
    alone = [generator(prompt, **options) for prompt in prompts]
    assert generator(prompts, batch_size=3, **options) == alone
    several = generator(prompts[0], **{**options, "do_sample": True, "num_return_sequences": 3})
    assert len(several) == 3


def test_pipeline_chats(generator):
    chat = [{"role": "user", "content": "w1 w2 w3"}]
    [said] = generator(chat, max_new_tokens=NEW, do_sample=False)
    [plain] = generator("w1 w2 w3", max_new_tokens=NEW, do_sample=False, return_full_text=False)
    assert said["generated_text"][:1] == chat
    assert said["generated_text"][1]["role"] == "assistant"
    assert said["generated_text"][1]["content"].split() == plain["generated_text"].split()
