"""Rules for what transformers refuses to load, checked without importing it: that takes seconds and needs torch.

A test holds these rules against transformers' own classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from btx_merge.errors import Problem

_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
_CACHES = (
    *("static", "offloaded_static", "dynamic", "offloaded", "quantized", "paged"),
    *("sliding_window", "hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"),
)
_IDS = (
    *("bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"),
)
_FOR_GENERATE = {
    *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus"),
    *("assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask"),
}
_METHODS = {"validate", "to_dict", "to_diff_dict", "to_json_string", "dict_dtype_to_str", "update"}
_WATERMARK = ("greenlist_ratio", "bias", "hashing_key", "seeding_scheme", "context_width")
_REMEDY = "transformers could not load the result: correct the file."


def config_refusals(name: str, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Find what keeps transformers from loading a model of this normalised config."""
    rope = config["rope_parameters"]
    kind = rope["rope_type"]
    if kind not in _ROPE_NEEDS:
        where = "config.json: rope_parameters.rope_type"
        yield Problem(name, where, repr(kind), f"one of {', '.join(_ROPE_NEEDS)}", _REMEDY)
    for key in _ROPE_NEEDS.get(kind, ()):
        value, is_list = rope.get(key), key in _ROPE_NEEDS["longrope"]
        parts = value if is_list and isinstance(value, list) else [value]
        if any(type(part) not in (int, float) for part in parts) or is_list != isinstance(value, list):
            where, found = f"config.json: rope_parameters.{key}", "missing" if value is None else repr(value)[:80]
            expected = f"{'a list of numbers' if is_list else 'a number'}, for rope_type {kind}"
            yield Problem(name, where, found, expected, _REMEDY)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if hidden % heads:
        where = "config.json: hidden_size"
        yield Problem(name, where, str(hidden), f"a multiple of the {heads} attention heads", _REMEDY)
    head_dim = config["head_dim"]
    # transformers turns a head in two halves, so an odd one fails, unless only a part of it is turned
    share = rope.get("partial_rotary_factor", 1.0)
    whole = type(share) in (int, float) and int(head_dim * share) == head_dim
    if head_dim > 4 and head_dim % 2 and whole:
        yield Problem(name, "config.json: head_dim", str(head_dim), "an even number", _REMEDY)
    if config["initializer_range"] > 1:
        where = "config.json: initializer_range"
        yield Problem(name, where, str(config["initializer_range"]), "a number in [0, 1]", _REMEDY)
    pad, rows = config["pad_token_id"], config["vocab_size"]
    if type(pad) is int and not -rows <= pad < rows:
        expected = f"a row of the embedding, which has {rows:,}"
        yield Problem(name, "config.json: pad_token_id", str(pad), expected, _REMEDY)


def generation_refusals(name: str, file: str, values: Mapping[str, Any]) -> Iterator[Problem]:
    """Find what keeps transformers from reading a generation config, and token ids that are none."""
    for key, expected in _odd_generation_values(values):
        yield Problem(name, f"{file}: {key}", repr(values[key])[:80], expected, _REMEDY)


def _odd_generation_values(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Find keys with a value that will not do, and what is expected there."""
    for key in values:
        if key in _FOR_GENERATE:
            yield key, "no such key: it is an argument of generate()"
        elif key in _METHODS or key.startswith("__"):
            yield key, "no such key: it names a part of the class"
    yield from _odd_token_ids(values)
    early = values.get("early_stopping")
    if not (early is None or isinstance(early, bool) or early == "never"):
        yield "early_stopping", 'true, false or "never"'
    for key in ("max_new_tokens", "num_return_sequences", "num_beams"):
        if values.get(key) is not None and not _at_least_1(values[key]):
            yield key, "a whole number above 0"
    cache = values.get("cache_implementation")
    if cache is not None and cache not in _CACHES:
        yield "cache_implementation", f"one of {', '.join(_CACHES)}"
    weight = values.get("assistant_ensemble_weight")
    if weight is not None and not (type(weight) is float and 0 < weight < 1):
        yield "assistant_ensemble_weight", "a number between 0 and 1"
    if values.get("compile_config") is not None:
        yield "compile_config", "no such key: it is an object of Python, which no file holds"
    mark = values.get("watermarking_config")
    if mark is not None and not (isinstance(mark, Mapping) and _is_watermark(mark)):
        yield "watermarking_config", f"an object of {', '.join(_WATERMARK)}"
    beams, results = _count(values, "num_beams"), _count(values, "num_return_sequences")
    if results > 1 and results > beams and not (beams == 1 and values.get("do_sample")):
        yield "num_return_sequences", f"at most num_beams ({beams}), or do_sample true with one beam"


def _odd_token_ids(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    lists = {}
    for key in _IDS:
        ids = values.get(key)
        lists[key] = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if any(type(token) is not int for token in lists[key]):
            yield key, "a token's id, or a list of them"
            lists[key] = []
    if values.get("pad_token_id") is not None and type(values["pad_token_id"]) is not int:
        yield "pad_token_id", "a token's id"
    suppressed = values.get("suppress_tokens")
    if suppressed is not None and not isinstance(suppressed, list):
        yield "suppress_tokens", "a list of token ids"
    for key in ("forced_bos_token_id", "forced_eos_token_id"):
        if lists[key] and set(lists[key]) <= set(lists["suppress_tokens"]):
            yield key, "a token that suppress_tokens leaves"


def _is_watermark(values: Mapping[str, Any]) -> bool:
    share, width = values.get("greenlist_ratio", 0.25), values.get("context_width", 1)
    return (
        set(values) <= set(_WATERMARK)
        and type(share) in (int, float)
        and 0 <= share <= 1
        and _at_least_1(width)
        and values.get("seeding_scheme", "lefthash") in ("lefthash", "selfhash")
    )


def _count(values: Mapping[str, Any], key: str) -> int:
    """Return a number that is 1 where the file leaves it out; one that is odd has been told already."""
    value = values.get(key)
    return int(value) if value is not None and _at_least_1(value) else 1


def _at_least_1(value: Any) -> bool:
    return type(value) is int and value >= 1
