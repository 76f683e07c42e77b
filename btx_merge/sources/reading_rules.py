"""Whether two tokenizers with the same tokens and merges cut a text alike before they merge."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from btx_merge.sources.byte_pairs import Pair, needs_ignored_merges

_PARTS = ("normalizer", "pre_tokenizer")
_OF_MODEL = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
_SPACE = "\u2581"  # what stands for a space in a vocabulary of SentencePiece
_TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}


def differing_rules(
    own: Mapping[str, Any], seed: Mapping[str, Any], vocabulary: Any, merges: Sequence[Pair]
) -> Iterator[tuple[str, Any, Any]]:
    """Find the keys of tokenizer.json by which texts are read differently, and both values.

    Values that mean the same are the same: a default that is left out, an older spelling, and the two forms that
    transformers gives to a Llama's `tokenizer.model`, which differ in texts that begin with two spaces alone.

    Args:
        vocabulary: and `merges`: of both.
    """
    if any(own.get(key) != seed.get(key) for key in _PARTS):
        own_form, seed_form = _normal_form(own), _normal_form(seed)
        for key in _PARTS:
            if own_form[key] != seed_form[key]:
                yield key, own.get(key), seed.get(key)
    models = own["model"], seed["model"]
    for key in _OF_MODEL:
        if (models[0].get(key) or None) != (models[1].get(key) or None):
            yield f"model.{key}", models[0].get(key), models[1].get(key)
    ignored = [bool(model.get("ignore_merges")) for model in models]
    if ignored[0] != ignored[1] and needs_ignored_merges(seed, vocabulary, merges):
        yield "model.ignore_merges", ignored[0], ignored[1]


def _normal_form(rules: Mapping[str, Any]) -> dict[str, Any]:
    """Return normalizer and pre-tokenizer as the `tokenizers` library spells them, without what changes no token."""
    from tokenizers import Tokenizer

    parts = {key: rules.get(key) for key in _PARTS}
    empty: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {}, "merges": []},
        **parts,
    }
    try:
        spelled = json.loads(Tokenizer.from_str(json.dumps(empty)).to_str())
    except Exception:  # of no exact kind: a rule that the library does not know is compared as it stands
        return parts
    parts = {key: _without_offsets(spelled[key]) for key in parts}
    return _one_metaspace(parts) or parts


def _without_offsets(part: Any) -> Any:
    """Return a rule without `trim_offsets`, which moves no token."""
    if isinstance(part, list):
        return [_without_offsets(item) for item in part]
    if isinstance(part, dict):
        return {key: _without_offsets(value) for key, value in part.items() if key != "trim_offsets"}
    return part


def _one_metaspace(parts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return one form for both ways to write a Llama's spaces; None where neither is used."""
    normalizer, pre = parts["normalizer"], parts["pre_tokenizer"]
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    if pre is None and steps in ([_PREPEND, _TO_SPACE], [_TO_SPACE]):
        return {"normalizer": None, "pre_tokenizer": [_SPACE, len(steps) == 2, False]}
    if normalizer is None and pre is not None and pre["type"] == "Metaspace":
        begins = pre["prepend_scheme"] != "never"
        return {"normalizer": None, "pre_tokenizer": [pre["replacement"], begins, pre["split"]]}
    return None
