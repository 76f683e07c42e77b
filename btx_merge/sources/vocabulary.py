"""The vocabulary of a result: which row of which source's embedding becomes which of its rows.

Tokens are matched by their string. Ids of the seed stay; tokens that sources added get the ids after them, and
their rows are averaged over the sources that own them. Rows without a token (padding) are kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from btx_merge.errors import InputError, Problem
from btx_merge.files.bounded_json import parse_json
from btx_merge.files.folder import read_bytes
from btx_merge.reporting import first_line, short
from btx_merge.sources.byte_pairs import Pair, read_differently
from btx_merge.sources.reading_rules import differing_rules
from btx_merge.sources.segments import Segment, runs
from btx_merge.sources.source import Source
from btx_merge.sources.tokenizer_files import NO_SENTENCEPIECE, VOCABULARY_FILES, load_tokenizer, vocabulary_file

_SHOWN = 3
"""Tokens that an error names: enough to see what kind they are."""


@dataclass(frozen=True)
class Tokenizer:
    """What of a tokenizer the merge needs."""

    folder: Path
    base: Any
    """The base vocabulary, which nobody changes by adding tokens."""
    merges: Sequence[Pair]
    """How tokens of the base vocabulary are made of others, by rank; none where they are not made of others."""
    rules: Mapping[str, Any]
    """What else tokenizer.json says about how a text is read."""
    ids: Mapping[str, int]
    """Every token's id, base and added."""
    added: Mapping[str, Mapping[str, Any]]
    """The added tokens' entries by their string."""


@dataclass(frozen=True)
class Vocabulary:
    """The result's vocabulary and where its rows come from."""

    size: int
    """Rows of the result's embedding."""
    segments: Mapping[str, tuple[Segment, ...]]
    """Per source, the rows that it owns."""
    new_tokens: tuple[Mapping[str, Any], ...] = ()
    """Entries of tokenizer.json's `added_tokens` that the seed lacks, in the order of their new ids."""
    ids: Mapping[str, int] | None = None
    """The union; None where the seed has no tokenizer or all are the same."""


def plan_vocabulary(sources: Sequence[Source]) -> Vocabulary:
    """Plan the union of the sources' vocabularies; the first source is the seed.

    Raises:
        InputError: a source's base vocabulary is another, gives an id of the seed's to another token, has more
            tokens than rows, or other rows than the seed and no tokenizer to tell what they are.
    """
    rows = {source.name: source.config["vocab_size"] for source in sources}
    tokenizers, problems = _read_tokenizers(sources)
    seed = sources[0]
    seed_tokenizer = tokenizers.get(seed.name)
    # A seed without a tokenizer is taken to have the one that all others agree on.
    reference = seed_tokenizer or next(filter(None, tokenizers.values()), None)
    for source in sources:
        if source.name not in tokenizers:
            continue
        tokenizer = tokenizers[source.name]
        nameless = seed if seed_tokenizer is None else source
        if None in (tokenizer, seed_tokenizer) and rows[source.name] != rows[seed.name]:
            found = f"{rows[source.name]:,} rows, and {nameless.name} has no tokenizer"
            expected = f"{rows[seed.name]:,} rows as in the seed, or a tokenizer.json that names the others"
            remedy = f"Copy the files of {nameless.name}'s tokenizer into its folder."
            problems.append(Problem(source.name, "vocabulary", found, expected, remedy))
        elif tokenizer is not None and reference is not None:
            problems += _token_problems(source, tokenizer, reference, seed_tokenizer is None)
    if problems:
        raise InputError(problems)
    size = max(rows.values())
    same_rows = len(set(rows.values())) == 1
    if seed_tokenizer is None or (same_rows and all(t in (None, seed_tokenizer) for t in tokenizers.values())):
        return Vocabulary(size, {name: (Segment(0, 0, count),) for name, count in rows.items()})
    return _union(rows, seed_tokenizer, tokenizers)


def _union(rows: Mapping[str, int], seed: Tokenizer, tokenizers: Mapping[str, Tokenizer | None]) -> Vocabulary:
    """Join the sources' tokens: the seed's under their ids, then each token that others added, once.

    Args:
        rows: every source's number of embedding rows.
        seed: the tokenizer of the seed, and of sources without one.
    """
    ids = dict(seed.ids)
    new_tokens: list[Mapping[str, Any]] = []
    first_new = max(ids.values(), default=-1) + 1
    for tokenizer in tokenizers.values():
        for token, entry in tokenizer.added.items() if tokenizer else ():
            if token not in ids:
                ids[token] = first_new + len(new_tokens)
                new_tokens.append({**entry, "id": ids[token]})
    size = max(*rows.values(), first_new + len(new_tokens))
    # Three passes decide who owns a row of the result: padding that a source has there itself, then its tokens, which
    # come first, then rows that nobody owns because a source has moved the token that was there.
    source_rows = np.full((len(rows), size), -1)  # of every row of the result; -1 where the source owns nothing
    taken = np.fromiter(ids.values(), int, len(ids))
    for source_row, (name, count) in zip(source_rows, rows.items(), strict=True):
        own = (tokenizers[name] or seed).ids
        padding = np.setdiff1d(np.arange(count), np.fromiter(own.values(), int, len(own)))  # rows without a token
        source_row[padding] = padding
        source_row[taken] = -1  # a token's row is never taken from another source's padding
        for token, row in own.items():
            source_row[ids[token]] = row
    unowned = np.flatnonzero((source_rows < 0).all(axis=0))  # a source moved the token that had this row
    for source_row, count in zip(source_rows, rows.values(), strict=True):
        source_row[unowned[unowned < count]] = unowned[unowned < count]
    segments = {name: runs(source_row) for name, source_row in zip(rows, source_rows, strict=True)}
    return Vocabulary(size, segments, tuple(new_tokens), ids)


def _token_problems(source: Source, tokenizer: Tokenizer, seed: Tokenizer, seed_is_nameless: bool) -> list[Problem]:
    """Compare a source's tokenizer with `seed`, the seed's or that of another source."""
    where = f"{tokenizer.folder.name}/{vocabulary_file(tokenizer.folder)}"
    rows = source.config["vocab_size"]
    problems = []
    if tokenizer.ids and max(tokenizer.ids.values()) >= rows:
        found = f"a token has id {max(tokenizer.ids.values()):,}, but the embedding has {rows:,} rows"
        remedy = "Resize the model to its tokenizer: model.resize_token_embeddings(len(tokenizer))."
        problems.append(Problem(source.name, where, found, "a row for every token", remedy))
    if tokenizer is seed:
        return problems
    if seed_is_nameless and tokenizer.ids != seed.ids:
        found = f"other tokens than in {seed.folder.name}, and the seed has no tokenizer"
        remedy = "Copy the files of the seed's tokenizer into its folder."
        return [*problems, Problem(source.name, where, found, "the seed's tokens and added ones", remedy)]
    tokens = {row: token for token, row in tokenizer.ids.items()}
    conflicts = []
    for token, row in seed.ids.items():
        if row in tokens and tokens[row] != token:
            conflicts.append(f"{row} is {tokens[row]!r} here and {token!r} in the seed")
    if conflicts:
        found = f"{len(conflicts)} ids name other tokens than in the seed: {'; '.join(conflicts[:_SHOWN])}"
        remedy = "Only added tokens may differ; use experts that kept the seed's vocabulary."
        problems.append(Problem(source.name, where, found, "the seed's tokens under the seed's ids", remedy))
    elif difference := _base_difference(tokenizer, seed, seed.folder.name if seed_is_nameless else "the seed"):
        new = [token for token in tokenizer.ids if token not in seed.ids and token not in tokenizer.added]
        remedy = "Only tokens added with add_tokens can be joined."
        if new:
            difference += f" ({len(new)} other tokens: {', '.join(map(repr, new[:_SHOWN]))})"
        else:
            remedy += " If the model was trained with the seed's tokenizer, copy the seed's tokenizer.json there."
        problems.append(Problem(source.name, where, difference, "the seed's", remedy))
    else:
        name = seed.folder.name if seed_is_nameless else "the seed"
        for key, own, expected in differing_rules(tokenizer.rules, seed.rules, seed.base, seed.merges):
            found = f"{key} is {short(own)}, so it reads texts otherwise than {name}"
            remedy = "If the model was trained with the seed's tokenizer, copy the seed's tokenizer.json there."
            problems.append(Problem(source.name, where, found, short(expected), remedy))
    return problems


def _base_difference(tokenizer: Tokenizer, seed: Tokenizer, name: str) -> str:
    """Return in what a source's base vocabulary and merges differ from the seed's; nothing where texts do not show it.

    Args:
        name: of the seed.
    """
    # sets of a hundred thousand merges take a while, and most merges are equal as they stand
    if tokenizer.base != seed.base or (tokenizer.merges != seed.merges and set(tokenizer.merges) != set(seed.merges)):
        return f"its base vocabulary or its merges differ from those of {name}"
    if tokenizer.merges == seed.merges:
        return ""
    try:
        different = read_differently(seed.rules, seed.base, seed.merges, tokenizer.merges)
    except ValueError as error:
        return f"its merges differ from those of {name} and cannot be compared ({error})"
    if different is None:
        return ""
    text, before, after = different
    return f"its merges have another order than those of {name}, which reads {text!r} as {before}; here it is {after}"


def _read_tokenizers(sources: Sequence[Source]) -> tuple[dict[str, Tokenizer | None], list[Problem]]:
    """Read every source's tokenizer, and find why others cannot be read. Byte-identical files become one object."""
    read: dict[bytes, Tokenizer] = {}
    out: dict[str, Tokenizer | None] = {}
    problems: list[Problem] = []
    for source in sources:
        folder = source.tokenizer_folder
        if folder is None:
            out[source.name] = None
            continue
        try:
            key = _content(folder)
            if key not in read:
                read[key] = _parse(folder, tokenizer_json(folder))
            out[source.name] = read[key]
        except InputError as error:
            for problem in error.problems:  # a package that is not installed is named once, not for each source
                if problem.found != NO_SENTENCEPIECE or all(known.found != NO_SENTENCEPIECE for known in problems):
                    problems.append(replace(problem, source=source.name))
        except Exception as error:  # of any kind: transformers reads the old format, with code for every family
            found = f"unreadable tokenizer ({type(error).__name__}: {first_line(error)})"
            expected, remedy = "what tokenizer.save_pretrained writes", "Save it again, or copy the seed's."
            problems.append(Problem(source.name, f"{folder.name}/{vocabulary_file(folder)}", found, expected, remedy))
    return out, problems


def _parse(folder: Path, content: bytes) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        ValueError, KeyError, TypeError: it is no tokenizer's.
    """
    data = parse_json(content)
    vocab = data["model"]["vocab"]
    base = {piece: row for row, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    added = {entry["content"]: entry for entry in data.get("added_tokens") or []}
    ids = base | {token: entry["id"] for token, entry in added.items()}
    if not all(type(row) is int and row >= 0 for row in ids.values()):
        raise ValueError("a token's id is no number")
    rules = {**data, "model": {key: value for key, value in data["model"].items() if key not in ("vocab", "merges")}}
    return Tokenizer(folder, vocab, _pairs(data["model"].get("merges") or []), rules, ids, added)


def _pairs(merges: Sequence[Any]) -> list[Pair]:
    """Return the merges as pairs: they are written "a b" until tokenizers 0.20, ["a", "b"] since.

    >>> _pairs(["a b", ["ab", "c"]])
    [('a', 'b'), ('ab', 'c')]
    """
    out = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2 or not (isinstance(pair[0], str) and isinstance(pair[1], str)):
            raise ValueError(f"a merge of {merge!r}")
        out.append((pair[0], pair[1]))
    return out


def token_ids(vocabulary: Vocabulary, sources: Sequence[Source]) -> Mapping[str, int] | None:
    """Return every token of a planned result with its row; None where no source has a tokenizer."""
    if vocabulary.ids is not None:
        return vocabulary.ids
    folder = next((source.tokenizer_folder for source in sources if source.tokenizer_folder), None)
    return _parse(folder, tokenizer_json(folder)).ids if folder else None


def _content(folder: Path) -> bytes:
    """Return the bytes that a folder's tokens depend on; equal ones need to be read once only."""
    parts = []
    for name in VOCABULARY_FILES:
        if (folder / name).exists():
            parts.append(name.encode() + b"\0" + read_bytes(folder / name))
            if name == "tokenizer.json":
                return parts[0]  # the other files repeat what it says
    if (folder / "tokenizer_config.json").exists():
        parts.append(read_bytes(folder / "tokenizer_config.json"))
    return b"\0".join(parts)


def tokenizer_json(folder: Path) -> bytes:
    """Return a folder's tokenizer.json, or what transformers makes of its other files.

    Raises:
        InputError: the files cannot be read; a package that transformers lacks is named.
    """
    if os.path.lexists(folder / "tokenizer.json"):
        return read_bytes(folder / "tokenizer.json")
    return str(load_tokenizer(folder).backend_tokenizer.to_str()).encode()
